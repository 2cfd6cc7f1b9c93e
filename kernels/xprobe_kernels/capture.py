"""Copies chosen rows of a block's output into a row buffer, one row or a mean per span."""

from __future__ import annotations

import torch
from torch import Tensor

from xprobe_kernels.unembedding import describe


def capture(hidden: Tensor, spans: Tensor, out: Tensor) -> None:
    """Writes the mean of ``hidden[batch, start:stop]`` for every span into ``out``; keeps no view of ``hidden``.

    Parameters
    ----------
    hidden : Tensor [B, T, D]
        Output of one block.
    spans : Tensor [S, 3], int64
        (batch, start, stop) with ``0 <= batch < B`` and ``0 <= start < stop <= T``. One position: ``stop = start + 1``,
        copied bit for bit; a longer span is averaged in fp32.
    out : Tensor [S, D]
        Written in place, in its own dtype.

    Raises
    ------
    ValueError
        Names the argument, its value and what was expected.
    """
    if hidden.ndim != 3:
        raise ValueError(f"hidden must have shape [B, T, D], got {describe(hidden)}")
    batch, length, width = hidden.shape
    if spans.ndim != 2 or spans.shape[1] != 3 or spans.dtype != torch.int64:
        raise ValueError(f"spans must be an int64 tensor of shape [S, 3], got {describe(spans)}")
    if tuple(out.shape) != (spans.shape[0], width):
        raise ValueError(f"out must have shape [{spans.shape[0]}, {width}], got {describe(out)}")
    rows, starts, stops = spans.unbind(1)
    bad = (rows < 0) | (rows >= batch) | (starts < 0) | (starts >= stops) | (stops > length)
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"spans[{where}] = {spans[where].tolist()} is not (batch, start, stop) within [{batch}, {length}]"
        )

    spans = spans.to(hidden.device)
    rows, starts, stops = spans.unbind(1)
    single = stops - starts == 1
    out[single] = hidden[rows[single], starts[single]].to(out.dtype)
    for index in (~single).nonzero().flatten().tolist():
        row, start, stop = spans[index].tolist()
        out[index] = hidden[row, start:stop].float().mean(0).to(out.dtype)
