"""``capture`` copies chosen rows of a block's output to a buffer: single rows, or the mean of a span of rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from xprobe_kernels.transfer import on
from xprobe_kernels.triton_support import kernel_dtypes, kernels_run_on
from xprobe_kernels.unembedding import Unembedding, describe


def capture(
    hidden: Tensor,
    spans: Tensor,
    out: Tensor,
    head: Unembedding | None = None,
    *,
    check: bool = True,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> None:
    """Writes the mean of ``hidden[batch, start:stop]`` for each span to ``out``. Keeps no view of ``hidden``.

    Parameters
    ----------
    hidden : Tensor [B, T, D]
        Output of one block of the model.
    spans : Tensor [S, 3], int64
        (batch, start, stop) with ``0 <= batch < B`` and ``0 <= start < stop <= T``. A single position has
        ``stop = start + 1`` and is copied bit for bit. A longer span is averaged in fp32 (fp64 for fp64 rows). The
        tensor may be on any device; on the device of ``hidden`` it is not copied.
    out : Tensor [S, D]
        Written in place. Rows are cast to its dtype.
    head : Unembedding, optional
        Its final norm is applied to the rows before they are cast. For such rows, pass ``head.without_norm()`` to
        ``lens``.
    check : bool
        False skips the check of ``spans``, for spans that passed it in an earlier call with the same [B, T]. This saves
        a wait for the device.
    backend : "auto", "triton" or "torch"
        "auto" uses the kernel (one launch) if there are Triton and a GPU, and plain torch otherwise.

    Raises
    ------
    ValueError
        Names the argument, its value and what was expected.

    Examples
    --------
    >>> import torch
    >>> from xprobe_kernels import capture
    >>> hidden = torch.arange(8.0).view(1, 4, 2)
    >>> out = torch.empty(2, 2)
    >>> capture(hidden, torch.tensor([[0, 3, 4], [0, 0, 2]]), out)  # the last position, and the mean of the first two
    >>> out.tolist()
    [[6.0, 7.0], [1.0, 2.0]]
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
    if head is not None and (head.width != width or head.weight.device != hidden.device):
        raise ValueError(
            f"head has width {head.width} on {head.weight.device}, hidden has width {width} on {hidden.device}"
        )
    if check:
        check_spans(spans, batch, length)
    with torch.no_grad(), on(hidden.device):
        if _use_kernel(backend, hidden, out):
            from xprobe_kernels.triton_capture import capture_rows

            capture_rows(hidden, spans.to(hidden.device, non_blocking=True), out, head)
        else:
            _gather(hidden, spans, out, head)


def check_spans(spans: Tensor, batch: int, length: int) -> None:
    """Raises a ValueError if one of ``spans`` [S, 3] is outside of [B, T]. Waits for the GPU if the spans are there."""
    rows, starts, stops = spans.unbind(1)
    bad = (rows < 0) | (rows >= batch) | (starts < 0) | (starts >= stops) | (stops > length)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"spans[{index}] = {spans[index].tolist()} is not (batch, start, stop) within [{batch}, {length}]"
        )


def _use_kernel(backend: str, hidden: Tensor, out: Tensor) -> bool:
    dtypes = kernel_dtypes()
    fits = hidden.dtype in dtypes and out.dtype in dtypes and (out.shape[1] <= 1 or out.stride(1) == 1)
    runs = kernels_run_on(hidden.device)
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    if backend == "triton" and not (fits and runs):
        raise ValueError(
            f"backend 'triton' needs Triton and a GPU, {', '.join(map(str, dtypes))} and dense rows of out; "
            f"got hidden {describe(hidden)}, out {describe(out)}"
        )
    return backend == "triton" or (backend == "auto" and fits and runs and hidden.device.type == "cuda")


def _gather(hidden: Tensor, spans: Tensor, out: Tensor, head: Unembedding | None) -> None:
    rows, starts, stops = spans.unbind(1)
    single = stops - starts == 1
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def finish(values: Tensor) -> Tensor:
        return (values if head is None else head.normalize(values.to(wide))).to(out.dtype)

    device, flat = hidden.device, hidden.reshape(-1, hidden.shape[-1])
    first = rows * hidden.shape[1] + starts
    if bool(single.all()):
        out.copy_(finish(flat[first.to(device)]))
        return
    lengths = torch.where(single, 0, stops - starts)
    within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths).cpu()
    tokens = flat[(first.repeat_interleave(lengths) + within.to(first.device)).to(device)].to(wide)
    lengths = lengths[~single].to(device)
    sums = torch.segment_reduce(tokens, "sum", lengths=lengths, axis=0)
    out[(~single).to(device)] = finish(sums / lengths[:, None])
    out[single.to(device)] = finish(flat[first[single].to(device)])
