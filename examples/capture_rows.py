"""Keeps hidden rows of requests of one's own: python examples/capture_rows.py [MODEL]"""

import sys

from xprobe.capture.engine import Engine
from xprobe.capture.requests import Each, Mean, Request
from xprobe.models.anatomy import inspect
from xprobe.models.loading import load, resolve

loaded = load(resolve(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"))
engine = Engine(loaded.model, inspect(loaded.model), batch_tokens=1024)
texts = ["The boat is red.", "The boat is new.", "Das Boot ist rot."]
prompts = [tuple(loaded.tokenizer(text).input_ids) for text in texts]
# the caller names the rows: the last token's, and the mean over all tokens
requests = [Request(ids, {"last": Each((len(ids) - 1,)), "mean": Mean(0, len(ids))}) for ids in prompts]
engine.choose_strategy(requests)  # the fastest one that gives this model the rows of its own plain runs
rows = engine.capture(requests)
print("strategy:", engine.strategy)
print("last:", tuple(rows["last"].shape), " mean:", tuple(rows["mean"].shape), " [layers, prompts, width]")
