"""The capture kernel: one launch reads only the chosen rows of a block's output."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xprobe_kernels.triton_rows import NORMS, normed_row
from xprobe_kernels.triton_support import cdiv, next_power_of_2
from xprobe_kernels.unembedding import Unembedding

BLOCK = 1024  # columns of the width per program, if no norm needs the whole row


@triton.jit
def capture_kernel(
    hidden_ptr,  # [B, T, D]
    batch_stride,
    time_stride,
    width_stride,
    spans_ptr,  # [S, 3] int64: batch, start, stop
    gamma_ptr,
    beta_ptr,  # [D]
    eps,
    out_ptr,  # [S, D], rows out_stride apart
    out_stride,
    width,  # D
    NORM: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
    BD: tl.constexpr,
):
    """Writes BD columns of one span: a row, or the mean of several. With a norm, BD covers the whole width."""
    span = tl.program_id(0).to(tl.int64)
    batch = tl.load(spans_ptr + 3 * span)
    start = tl.load(spans_ptr + 3 * span + 1)
    stop = tl.load(spans_ptr + 3 * span + 2)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = d < width
    base = hidden_ptr + batch * batch_stride + d.to(tl.int64) * width_stride
    row = tl.load(base + start * time_stride, mask=inside, other=0.0).to(tl.float32)
    for t in range(start + 1, stop):
        row += tl.load(base + t * time_stride, mask=inside, other=0.0).to(tl.float32)
    if stop - start > 1:
        row = row / (stop - start).to(tl.float32)
    row = normed_row(row, inside, gamma_ptr, beta_ptr, eps, width, NORM, GAMMA, BETA)
    tl.store(out_ptr + span * out_stride + d, row.to(out_ptr.dtype.element_ty), mask=inside)


def capture_rows(hidden: Tensor, spans: Tensor, out: Tensor, head: Unembedding | None) -> None:
    """Launches the kernel. ``capture`` has checked the arguments; ``spans`` is on the device of ``hidden``."""
    width = hidden.shape[2]
    whole = head is not None and (head.norm != "none" or head.gamma is not None or head.beta is not None)
    block = next_power_of_2(width) if whole else min(next_power_of_2(width), BLOCK)
    if not len(spans):
        return
    capture_kernel[(len(spans), cdiv(width, block))](
        hidden, *hidden.stride(), spans.contiguous(),
        head.gamma if head else None, head.beta if head else None, float(head.eps) if head else 0.0,
        out, out.stride(0), width,
        NORM=NORMS[head.norm] if head else 0,
        GAMMA=head is not None and head.gamma is not None, BETA=head is not None and head.beta is not None,
        BD=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
