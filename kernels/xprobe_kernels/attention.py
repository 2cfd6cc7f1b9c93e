"""Attention over a packed tree of token sequences on a GPU: one kernel, no mask in memory, nothing computed twice.

Sequences with common beginnings are packed so that every shared token stands once, each before those that continue it
(depth first). Then token i attends to token j exactly if ``j <= i < until[j]``, where ``until[j]`` is the end of what
continues j: two numbers per pair decide, and whole blocks are left out by the same rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import util

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xprobe_kernels.readout import interpreted
from xprobe_kernels.transfer import on, upload
from xprobe_kernels.unembedding import describe

MAX_WIDTH = 256  # of a head's queries, keys and values


@dataclass(frozen=True)
class Blocks:
    """How the kernel walks: tiles of queries x keys. ``warps``, ``stages``: as Triton has them."""

    queries: int
    keys: int
    warps: int
    stages: int

    @staticmethod
    def choose(itemsize: int, width: int) -> Blocks:
        """For heads of ``width`` numbers of ``itemsize`` bytes; shared memory stays below 99 KiB."""
        if itemsize == 4:
            return Blocks(32, 32, 4, 2) if width <= 64 else Blocks(16, 16, 4, 2)  # larger ones spill on sm_90
        return Blocks(64, 64, 4, 3 if width <= 64 else 2) if width <= 128 else Blocks(64, 32, 4, 2)


@dataclass(frozen=True, eq=False)
class Reach:
    """Who attends to whom in a packed sequence of N tokens, on one device and for one choice of blocks.

    Attributes
    ----------
    until, positions : Tensor [N], int32
        The end of what continues a token in the packed sequence, and its position in its own sequences.
    bounds : Tensor [Q, 3], int32
        For every block of queries: its first entry in ``visits``, the first one that needs a mask, the end.
    visits : Tensor int32
        Blocks of keys that a block of queries looks at, those seen by all of its queries first.
    """

    until: Tensor
    positions: Tensor
    bounds: Tensor
    visits: Tensor
    blocks: Blocks

    @classmethod
    def of(cls, until: NDArray, positions: NDArray, blocks: Blocks, device: torch.device) -> Reach:
        """From ``until`` and ``positions`` [N] in main memory, without waiting for the device.

        Raises
        ------
        ValueError
            There are no tokens, or one ends before itself or after the last.
        """
        until, positions = (np.ascontiguousarray(values, dtype=np.int32) for values in (until, positions))
        count = len(until)
        if positions.shape != until.shape or not count or (until <= np.arange(count)).any() or until.max() > count:
            raise ValueError(f"until and positions must hold N numbers each, until[i] from i + 1 to N; N is {count}")
        bounds, visits = _visits(until, blocks)
        parts = (until, positions, bounds.ravel(), visits)
        # each at a multiple of 16 bytes: the kernel would be compiled once more for every other alignment
        starts = np.cumsum([0, *(-(-len(part) // 4) * 4 for part in parts)])
        together = np.zeros(starts[-1], dtype=np.int32)
        for start, part in zip(starts, parts, strict=False):
            together[start : start + len(part)] = part
        there = upload(torch.from_numpy(together), device)
        found = [there[start : start + len(part)] for start, part in zip(starts, parts, strict=False)]
        return cls(found[0], found[1], found[2].view(-1, 3), found[3], blocks)


def _visits(until: NDArray, blocks: Blocks) -> tuple[NDArray, NDArray]:
    """``bounds`` and ``visits`` of ``Reach``."""
    count = len(until)
    q_first = np.arange(0, count, blocks.queries)
    q_last = np.minimum(q_first + blocks.queries, count) - 1
    k_first = np.arange(0, count, blocks.keys)
    k_last = np.minimum(k_first + blocks.keys, count) - 1
    farthest, nearest = (reduce.reduceat(until, k_first) for reduce in (np.maximum, np.minimum))
    seen = (k_first <= q_last[:, None]) & (farthest > q_first[:, None])
    whole = (k_last <= q_first[:, None]) & (nearest > q_last[:, None]) & (k_last - k_first + 1 == blocks.keys)
    order = np.argsort(np.where(whole, 0, np.where(seen, 1, 2)), axis=1, kind="stable").astype(np.int32)
    ends = seen.sum(1).cumsum()
    starts = ends - seen.sum(1)
    kept = np.arange(len(k_first)) < seen.sum(1)[:, None]
    return np.stack([starts, starts + whole.sum(1), ends], 1).astype(np.int32), order[kept]


def available(device: torch.device) -> bool:
    """Whether there is a kernel for ``device`` here."""
    return device.type == "cuda" and util.find_spec("triton") is not None


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``tree_attention`` can take these (heads first, tokens, width)."""
    narrow = (torch.float32, torch.float16) + (() if interpreted() else (torch.bfloat16,))
    return (
        (query.device.type == "cuda" or interpreted())
        and util.find_spec("triton") is not None
        and query.dtype in narrow
        and query.dtype == key.dtype == value.dtype
        and max(query.shape[-1], value.shape[-1]) <= MAX_WIDTH
    )


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Reach,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of every token of a packed tree on itself and on what it continues.

    Parameters
    ----------
    query : Tensor [H, N, d]
    key : Tensor [G, N, d]
    value : Tensor [G, N, e]
        fp32, fp16 or bf16; G divides H, and ``H / G`` neighbouring query heads share keys and values. Scores and sums
        are fp32; weights are cast to the dtype of the values before the second product, as libraries do. Values must
        be finite: 0 times infinity is NaN, in every query of a block that visits it.
    reach : Reach
        Of N tokens, on the device of the query.
    scale : float
        Multiplies the dot products.
    window : int, optional
        A token attends to its last ``window`` positions only, its own included. Blocks out of its reach are visited.
    softcap : float, optional
        c in ``c * tanh(scale * score / c)``.
    sinks : Tensor [H], optional
        Logits that take part in each head's denominator and add nothing to its sum.

    Returns
    -------
    Tensor [N, H, e]
        In the dtype of the query.

    Raises
    ------
    ValueError
        Names the argument, its value and what was expected.
    """
    heads, tokens, _ = query.shape
    if key.shape[1:] != query.shape[1:] or value.shape[:2] != key.shape[:2] or heads % key.shape[0]:
        raise ValueError(f"query, key, value do not fit: {describe(query)}, {describe(key)}, {describe(value)}")
    if not serves(query, key, value):
        raise ValueError(f"this needs Triton, a GPU, one narrow dtype and at most {MAX_WIDTH} wide heads: "
                         f"{describe(query)}, {describe(value)}")  # fmt: skip
    if len(reach.until) != tokens or reach.until.device != query.device:
        raise ValueError(f"reach is of {len(reach.until)} tokens on {reach.until.device}, query is {describe(query)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window!r}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must have shape [{heads}], got {describe(sinks)}")
    from xprobe_kernels.triton_attention import attend

    with on(query.device):
        return attend(query, key, value, reach, scale, window, softcap, sinks)
