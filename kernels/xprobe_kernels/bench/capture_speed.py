"""The speed of ``capture``, compared with torch indexing and with keeping the whole block output in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xprobe_kernels.bench.measure import Call, clock, time_in_turn
from xprobe_kernels.bench.shapes import Head
from xprobe_kernels.capture import capture

POSITIONS, SPANS = "single positions", "spans of 16, averaged"
PER_SEQUENCE, SPAN = 3, 16
COPY, PLAIN, OURS = "whole block in fp32", "torch indexing", "capture"


@dataclass(frozen=True, eq=False)
class Block:
    """The output of one block and the spans to capture from it."""

    hidden: Tensor  # [B, T, D]
    spans: Tensor  # [S, 3], on the device of the block, as in a run
    spans_list: list[list[int]]  # the same on the host
    out: Tensor  # [S, D]

    @property
    def touched(self) -> int:
        """Bytes that any method must read and write."""
        rows = sum(stop - start for _, start, stop in self.spans_list)
        return (rows * self.hidden.shape[2] + self.out.numel()) * self.hidden.element_size()


def make(width: int, case: str, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> Block:
    random = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(batch, length, width, generator=random, device=device).to(dtype)
    span_length = 1 if case == POSITIONS else SPAN
    starts = torch.linspace(0, length - span_length, PER_SEQUENCE).long().repeat(batch)
    rows = torch.arange(batch).repeat_interleave(PER_SEQUENCE)
    spans = torch.stack([rows, starts, starts + span_length], 1)
    out = torch.full((len(spans), width), torch.nan, dtype=dtype, device=device)
    return Block(hidden, spans.to(device), spans.tolist(), out)


def plain(block: Block) -> Tensor:
    """Torch indexing, or one mean per span."""
    if all(stop - start == 1 for _, start, stop in block.spans_list):
        return block.hidden[block.spans[:, 0], block.spans[:, 1]]
    means = [block.hidden[row, start:stop].float().mean(0) for row, start, stop in block.spans_list]
    return torch.stack(means).to(block.hidden.dtype)


def ours(block: Block) -> Tensor:
    capture(block.hidden, block.spans, block.out, check=False)  # as in a run, where the spans were checked before
    return block.out


def whole(block: Block) -> Tensor:
    return block.hidden.to(torch.float32, copy=True)


def compare(
    head: Head, case: str, *, device: torch.device, dtype: torch.dtype, rounds: int | None, seconds: float, quick: bool
) -> dict[str, Any]:
    """Figures of every variant for blocks of the head's width."""
    batch, length = (2, 64) if quick else (32, 512) if device.type == "cuda" else (8, 512)
    block = make(head.width, case, batch, length, device, dtype)
    expected = plain(block).clone()
    wrong: set[str] = set()

    def check(result: Any) -> None:
        error = float((result.float() - expected.float()).abs().nan_to_num(torch.inf).max())
        bound = 0.0 if case == POSITIONS else 2 * torch.finfo(dtype).eps * float(expected.abs().max())
        if not error <= bound:
            wrong.add(OURS)
            raise ArithmeticError(f"off by {error:.3g}, bound {bound:.3g}")

    functions: dict[str, Callable[[Block], Tensor]] = {COPY: whole, PLAIN: plain, OURS: ours}
    calls: dict[str, Call] = {name: _bound(function, block) for name, function in functions.items()}
    samples = time_in_turn(calls, clock(device), {OURS: check}, rounds=rounds, seconds=seconds)
    copied = block.hidden.numel() * (block.hidden.element_size() + 4)
    entries = []
    for name, sample in samples.items():
        status = "wrong" if name in wrong else "failed" if sample.message else "ok"
        entry: dict[str, Any] = {"name": name, "status": status, "message": sample.message}
        if status == "ok":
            seconds_of = {other: samples[other].median for other in (COPY, PLAIN) if not samples[other].message}
            entry |= {
                "times_whole": seconds_of[COPY] / sample.median if COPY in seconds_of else None,
                "times_plain": seconds_of[PLAIN] / sample.median if PLAIN in seconds_of else None,
                "seconds": sample.median,
                "spread": sample.spread,
                "rounds": sample.seconds,
                "bytes_per_second": (copied if name == COPY else block.touched) / sample.median,
                "extra_bytes": sample.extra_bytes,
            }
        entries.append(entry)
    return {
        "name": f"{head.name}/{case}",
        "text": f"Block output of {head.title}, [{batch}, {length}, {head.width}], {len(block.spans)} {case}",
        "case": case,
        "batch": batch,
        "length": length,
        "width": head.width,
        "spans": len(block.spans),
        "dtype": str(dtype).removeprefix("torch."),
        "touched_bytes": block.touched,
        "variants": entries,
    }


def _bound(function: Callable[[Block], Tensor], block: Block) -> Call:
    return lambda turn: function(block)
