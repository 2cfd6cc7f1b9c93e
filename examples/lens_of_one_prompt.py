"""
Read one prompt with the kernels
================================

The logit lens at every layer, by hand: ``python examples/lens_of_one_prompt.py [MODEL]``. One call does the
same: ``xprobe.lens_prompt``.
"""

import sys

import torch
from xprobe_kernels import lens

from xprobe.models.anatomy import inspect, watch_states
from xprobe.models.loading import load, resolve

if len(sys.argv) > 2:
    sys.exit("usage: python examples/lens_of_one_prompt.py [MODEL]")
loaded = load(resolve(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"))
anatomy = inspect(loaded.model)  # finds the blocks, the final norm and the unembedding
ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids.to(loaded.model.device)
rows = []  # the hidden row [D] at the last token, before the final norm, of layers 0 to L
with torch.no_grad(), watch_states(anatomy.blocks, lambda layer, hidden: rows.append(hidden[0, -1])):
    loaded.model(ids)
paris = loaded.tokenizer(" Paris", add_special_tokens=False).input_ids[0]  # its first token, if it has several
word = loaded.tokenizer.decode([paris])
values = lens(torch.stack(rows), anatomy.head, torch.full((len(rows),), paris, device=ids.device), top_k=1)
for layer, (top, rank) in enumerate(zip(values.top_ids[:, 0].tolist(), values.rank[:, 0].tolist(), strict=True)):
    print(f"layer {layer:>2}  top token {loaded.tokenizer.decode([top])!r:<16} rank of {word!r} {rank}")
