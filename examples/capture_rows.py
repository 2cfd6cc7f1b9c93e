"""
Capture hidden rows
===================

The rows that you ask for, under names that you choose: ``python examples/capture_rows.py [MODEL]``
"""

import sys

from xprobe.capture.engine import Engine
from xprobe.capture.requests import Each, Mean, Request
from xprobe.models.anatomy import inspect
from xprobe.models.loading import load, resolve

if len(sys.argv) > 2:
    sys.exit("usage: python examples/capture_rows.py [MODEL]")
loaded = load(resolve(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"))
engine = Engine(loaded.model, inspect(loaded.model), batch_tokens=1024)
texts = ["The boat is red.", "The boat is new.", "Das Boot ist rot."]
prompts = [tuple(loaded.tokenizer(text).input_ids) for text in texts]
# you choose the names: "last" is the row of the last token, "mean" the mean over all tokens
requests = [Request(ids, {"last": Each((len(ids) - 1,)), "mean": Mean(0, len(ids))}) for ids in prompts]
rows = engine.capture(requests)  # by the fastest strategy that gives the same rows as plain runs of the model
print("strategy:", engine.strategy)
print("last:", tuple(rows["last"].shape), " mean:", tuple(rows["mean"].shape), " [layers, prompts, width]")
