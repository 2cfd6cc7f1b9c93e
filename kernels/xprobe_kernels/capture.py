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
        copied bit for bit; a longer span is averaged in fp32 (fp64 for fp64 rows).
    out : Tensor [S, D]
        Written in place, in its own dtype.

    Raises
    ------
    ValueError
        Names the argument, its value and what was expected.
    """
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating-point tensor of shape [B, T, D], got {describe(hidden)}")
    batch, length, width = hidden.shape
    if not isinstance(spans, Tensor) or spans.ndim != 2 or spans.shape[1] != 3 or spans.dtype != torch.int64:
        raise ValueError(f"spans must be an int64 tensor of shape [S, 3], got {describe(spans)}")
    shape = (spans.shape[0], width)
    if not isinstance(out, Tensor) or tuple(out.shape) != shape or not out.is_floating_point():
        raise ValueError(f"out must be a floating-point tensor of shape {list(shape)}, got {describe(out)}")
    if out.device != hidden.device:
        raise ValueError(f"out is on {out.device}, hidden is on {hidden.device}: move one of them")
    rows, starts, stops = spans.unbind(1)
    bad = (rows < 0) | (rows >= batch) | (starts < 0) | (starts >= stops) | (stops > length)
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"spans[{where}] = {spans[where].tolist()} is not (batch, start, stop) within [{batch}, {length}]"
        )

    single = stops - starts == 1
    with torch.no_grad():
        places = single.nonzero().flatten().to(hidden.device)
        picked = hidden[rows[single].to(hidden.device), starts[single].to(hidden.device)]
        out[places] = picked.to(out.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        for index in (~single).nonzero().flatten().tolist():
            row, start, stop = spans[index].tolist()
            out[index] = hidden[row, start:stop].to(wide).mean(0).to(out.dtype)
