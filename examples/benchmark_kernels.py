"""
Compare two lens backends
=========================

Rows per second for one vocabulary size: ``python examples/benchmark_kernels.py [VOCABULARY]``
"""

import sys

import torch
from torch.utils.benchmark import Timer
from xprobe_kernels import Unembedding, available_backends, lens

if len(sys.argv) > 2 or not all(text.isdecimal() and int(text) > 0 for text in sys.argv[1:]):
    sys.exit("usage: python examples/benchmark_kernels.py [VOCABULARY]")
vocabulary = int(sys.argv[1]) if len(sys.argv) > 1 else 49152
device = "cuda" if torch.cuda.is_available() else "cpu"
hidden = torch.randn(256, 576, device=device)  # 256 rows, from any layers and positions
head = Unembedding(torch.randn(vocabulary, 576, device=device), norm="rms", gamma=torch.ones(576, device=device))
lookup = torch.zeros(256, dtype=torch.int64, device=device)
best = available_backends(device)[0]  # what "auto" chooses
for backend in (best, "reference"):  # "reference": the definition, in fp64
    variables = {"lens": lens, "hidden": hidden, "head": head, "lookup": lookup, "backend": backend}
    seconds = Timer("lens(hidden, head, lookup, backend=backend)", globals=variables).timeit(3).median
    print(f"{backend:<10} {256 / seconds:>10.0f} rows per second")
