"""The Triton kernels with launches of a test's own choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from xprobe_kernels import Readout
from xprobe_kernels.configs import Config
from xprobe_kernels.request import LensRequest

from support.lens_truth import GPU, STATISTICS, Case, Truth, assert_ranks, assert_statistic, assert_top

DEVICE = "cuda" if GPU else "cpu"
SMALL = Config(16, 64, 16, 4, 2)  # several tiles of rows, of the vocabulary and of the width in a small case


def moved(case: Case) -> Case:
    head = {name: value.to(DEVICE) for name, value in vars(case.head).items() if isinstance(value, torch.Tensor)}
    parts = (case.hidden, case.lookup, case.final_rows)
    hidden, lookup, final_rows = (part.to(DEVICE) for part in parts)
    return replace(case, hidden=hidden, head=replace(case.head, **head), lookup=lookup, final_rows=final_rows)


def launched(
    case: Case, config: Config, splits: int | None, precision: str = "ieee", workspace_bytes: int = 1 << 20
) -> Readout:
    """The kernel with a launch of the test's own choice."""
    there = moved(case)
    request = LensRequest(
        there.hidden, there.head, there.lookup, case.top_k, there.final_rows, precision, workspace_bytes
    )
    from xprobe_kernels import triton_readout

    fields = triton_readout.readout(request, config, splits)
    here: dict[str, Any] = {name: None if value is None else value.cpu() for name, value in fields.items()}
    return Readout(**here, backend="triton", precision=precision)


def assert_right(case: Case, readout: Readout) -> None:
    truth = Truth(case)
    for name in STATISTICS:
        assert_statistic(truth, "triton", readout, name)
    assert_ranks(truth, "triton", readout)
    if case.top_k:
        assert_top(truth, "triton", readout, case.top_k)
