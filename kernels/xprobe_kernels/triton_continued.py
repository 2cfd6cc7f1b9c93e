"""The kernel of attention for tokens that continue a packed tree: first over the tree's keys, then over their own."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xprobe_kernels.continuation import Continuation
from xprobe_kernels.triton_attention import LOG2E, add_block, scores
from xprobe_kernels.triton_fold import INFINITY
from xprobe_kernels.triton_support import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["queries", "kept", "tokens", "window"])
def continued_attention_kernel(
    query_ptr,
    query_head,
    query_stride,  # [H, n, d]: strides of heads and tokens
    kept_key_ptr,
    kept_key_head,
    kept_key_stride,  # [G, N, d]
    kept_value_ptr,
    kept_value_head,
    kept_value_stride,  # [G, N, e]
    key_ptr,
    key_head,
    key_stride,  # [G, M, d]
    value_ptr,
    value_head,
    value_stride,  # [G, M, e]
    sinks_ptr,  # [H]
    out_ptr,  # [n, H, e], contiguous
    places_ptr,
    query_positions_ptr,  # [n]
    since_ptr,
    until_ptr,
    positions_ptr,  # [N + M]
    bounds_ptr,  # [Q, 4]
    visits_ptr,
    queries,  # n
    kept,  # N
    tokens,  # M
    heads,  # H
    width,  # d
    value_width,  # e
    scale,
    window,
    cap,
    GROUP: tl.constexpr,  # H / G
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """Attention of one block of queries of one head."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    i = block * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    place = query_ptr + head * query_head + i.to(tl.int64)[:, None] * query_stride + d[None, :]
    q = tl.load(place, mask=(i < queries)[:, None] & (d < width)[None, :], other=0.0)
    places = tl.load(places_ptr + i, mask=i < queries, other=-1)
    peak = tl.full([BM], -INFINITY, tl.float32)
    total = tl.zeros([BM], tl.float32)
    if HAS_SINKS:  # like a key that has no value
        peak = tl.zeros([BM], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total += 1.0
    sums = tl.zeros([BM, BE], tl.float32)
    first = tl.load(bounds_ptr + 4 * block)
    masked = tl.load(bounds_ptr + 4 * block + 1)
    own = tl.load(bounds_ptr + 4 * block + 2)
    last = tl.load(bounds_ptr + 4 * block + 3)
    keys = kept_key_ptr + head // GROUP * kept_key_head
    values = kept_value_ptr + head // GROUP * kept_value_head
    for visit in range(first, masked):
        j = tl.load(visits_ptr + visit) * BN + tl.arange(0, BN)
        s = scores(
            q, keys, kept_key_stride, i, places, j, queries, kept, width, since_ptr, until_ptr, query_positions_ptr,
            positions_ptr, scale, window, cap, HAS_WINDOW, True, HAS_WINDOW, HAS_CAP, BD,
        )  # fmt: skip
        peak, total, sums = add_block(s, values, kept_value_stride, j, kept, value_width, peak, total, sums, BE)
    for visit in range(masked, own):
        j = tl.load(visits_ptr + visit) * BN + tl.arange(0, BN)
        s = scores(
            q, keys, kept_key_stride, i, places, j, queries, kept, width, since_ptr, until_ptr, query_positions_ptr,
            positions_ptr, scale, window, cap, True, True, HAS_WINDOW, HAS_CAP, BD,
        )  # fmt: skip
        peak, total, sums = add_block(s, values, kept_value_stride, j, kept, value_width, peak, total, sums, BE)
    keys = key_ptr + head // GROUP * key_head
    values = value_ptr + head // GROUP * value_head
    for visit in range(own, last):
        j = tl.load(visits_ptr + visit) * BN + tl.arange(0, BN)
        s = scores(
            q, keys, key_stride, i, places, j, queries, tokens, width, since_ptr + kept, until_ptr + kept,
            query_positions_ptr, positions_ptr + kept, scale, window, cap, True, True, HAS_WINDOW, HAS_CAP, BD,
        )  # fmt: skip
        peak, total, sums = add_block(s, values, value_stride, j, tokens, value_width, peak, total, sums, BE)
    total = tl.where(total > 0, total, 1.0)  # rows past the last query attend to no key
    e = tl.arange(0, BE)
    out = out_ptr + (i.to(tl.int64)[:, None] * heads + head) * value_width + e[None, :]
    sums = sums / total[:, None]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=(i < queries)[:, None] & (e < value_width)[None, :])


def attend(
    query: Tensor,
    kept: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    continuation: Continuation,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Launches the kernel. ``continued_attention`` has checked the arguments."""
    query, *tensors = (t if t.stride(2) == 1 else t.contiguous() for t in (query, *kept, *own))
    heads, queries, width = query.shape
    value_width, blocks = own[1].shape[2], continuation.blocks
    out = query.new_empty(queries, heads, value_width)
    operands = [part for t in tensors for part in (t, t.stride(0), t.stride(1))]
    continued_attention_kernel[(cdiv(queries, blocks.queries), heads)](
        query, query.stride(0), query.stride(1), *operands, sinks if sinks is None else sinks.contiguous(), out,
        continuation.places, continuation.query_positions,
        continuation.since, continuation.until, continuation.positions, continuation.bounds, continuation.visits,
        queries, kept[0].shape[1], own[0].shape[1], heads, width, value_width,
        float(scale), window or 0, float(softcap or 0.0),
        GROUP=heads // own[0].shape[0],
        HAS_WINDOW=window is not None, HAS_CAP=softcap is not None, HAS_SINKS=sinks is not None,
        BM=blocks.queries, BN=blocks.keys,
        BD=max(next_power_of_2(width), 16), BE=max(next_power_of_2(value_width), 16),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out
