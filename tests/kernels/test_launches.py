"""Every kernel is specialised and compiled as in a real launch, on a machine without a GPU.

The interpreter skips what a launch does before the kernel runs: it compiles some arguments in, looks at alignment, and
checks that the globals of the kernel have not changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
import numpy as np
import torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")

triton.runtime.driver.set_active(Driver())
from xprobe_kernels import (
    Unembedding, triton_attention, triton_capture, triton_continued, triton_lens, triton_readout, triton_rows,
    triton_top, workspace,
)
from xprobe_kernels.attention import Blocks, Reach
from xprobe_kernels.continuation import Continuation
from xprobe_kernels.request import LensRequest

found = []

class Compiled:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        def launch(*args, **options):
            given = dict(zip(self.kernel.arg_names, args))
            tuples = {"weights_ptr", "peaks_ptr", "masses_ptr"}  # Triton 3.6 keeps no None in a tuple
            assert not any(given[name] is None for name in tuples & given.keys()), given
            self.kernel.warmup(*args, grid=grid, **options)
            found.append(self.kernel.fn.__name__)
        return launch

for module, name in (
    (triton_attention, "tree_attention_kernel"), (triton_capture, "capture_kernel"), (triton_lens, "lens_kernel"),
    (triton_rows, "prepare_kernel"), (triton_rows, "merge_kernel"), (workspace, "row_kernel"),
    (triton_top, "select_kernel"), (triton_top, "order_kernel"), (triton_top, "tiles_kernel"),
    (triton_continued, "continued_attention_kernel"),
):
    setattr(module, name, Compiled(getattr(module, name)))
triton_lens.device_limits = triton_readout.device_limits = lambda device: ("sm_90", 132)
cpu = torch.device("cpu")

for dtype, width, vocabulary, lookups, options in (
    (torch.bfloat16, 64, 4099, 1, {"norm": "rms"}),
    (torch.bfloat16, 64, 4096, 1, {"norm": "rms", "gamma": torch.ones(64), "softcap": 30.0}),
    (torch.float32, 33, 517, 3, {"norm": "layer", "bias": torch.zeros(517), "scale": 0.5}),
):
    head = Unembedding(torch.randn(vocabulary, width).to(dtype), **options)
    for rows in (1, 37, 300):  # few rows and many
        hidden, lookup = torch.randn(rows, width).to(dtype), torch.zeros(rows, lookups, dtype=torch.int64)
        triton_readout.readout(LensRequest(hidden, head, lookup, top_k=5))
        final_rows = torch.full((rows,), rows - 1)
        triton_readout.readout(LensRequest(hidden, head, lookup, final_rows=final_rows))
        workspace.readout(LensRequest(hidden, head, lookup, workspace_bytes=1 << 20))
    hidden, spans = torch.randn(2, 9, width).to(dtype), torch.tensor([[0, 1, 2], [1, 2, 7]])
    triton_capture.capture_rows(hidden, spans, torch.empty(2, width, dtype=dtype), head)
    triton_capture.capture_rows(hidden, spans, torch.empty(2, width, dtype=dtype), None)
    for tokens, heads in ((1, 1), (70, 4)):
        query = torch.randn(tokens, heads, 64).to(dtype).transpose(0, 1)
        key = torch.randn(max(1, heads // 2), tokens, 64).to(dtype)
        blocks = Blocks.choose(dtype.itemsize, 64)
        reach = Reach.from_tree(np.full(tokens, tokens), np.arange(tokens), blocks, cpu)
        triton_attention.attend(query, key, key, reach, 0.1, None, None, None)
        triton_attention.attend(query, key, key, reach, 0.1, 7, 3.0, torch.zeros(heads))
    for tails, most in ((1, 1), (5, 8)):  # in a step of generation, n queries of n tails
        places = Continuation.from_tree(
            np.full(30, 30), np.arange(30), [29] * tails, [most] * tails, [i * most for i in range(tails)], blocks, cpu
        )
        query = torch.randn(tails, 4, 64).to(dtype).transpose(0, 1)
        kept, own = torch.randn(30, 2, 64).to(dtype).transpose(0, 1), torch.randn(2, tails * most, 64).to(dtype)
        triton_continued.attend(query, (kept, kept), (own, own), places, 0.1, None, None, None)
        triton_continued.attend(query, (kept, kept), (own, own), places, 0.1, 7, 3.0, torch.zeros(4))

kinds = len(found)
for tokens in range(64, 73):  # a tree of any length: nothing new is compiled
    reach = Reach.from_tree(np.arange(1, tokens + 1), np.zeros(tokens, dtype=int), Blocks.choose(4, 64), cpu)
    assert all(part.data_ptr() % 16 == 0 for part in (reach.until, reach.positions, reach.bounds, reach.visits))
    ends, slots = [tokens // 2, tokens - 1, tokens - 1], [0, tokens, 2 * tokens]
    places = Continuation.from_tree(
        np.arange(1, tokens + 1), np.zeros(tokens, dtype=int), ends, [tokens] * 3, slots, Blocks.choose(4, 64), cpu
    )
    parts = (places.places, places.query_positions, places.since, places.until, places.positions, places.bounds)
    assert all(part.data_ptr() % 16 == 0 for part in (*parts, places.visits))
json.dump(found[:kinds], sys.stdout)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU every other test launches the kernels on it")
def test_every_kernel_passes_what_a_launch_checks_and_compiles(tmp_path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # PYTHONPATH=DIR tests another Triton: pip install --target DIR --no-deps triton==3.6.0
    places = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "kernels")]))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment | {"PYTHONPATH": places, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found) == {
        *("lens_kernel", "prepare_kernel", "merge_kernel", "select_kernel", "order_kernel", "tiles_kernel"),
        *("row_kernel", "capture_kernel", "tree_attention_kernel", "continued_attention_kernel"),
    }
