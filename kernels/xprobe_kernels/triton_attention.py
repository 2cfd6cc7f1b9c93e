"""The tree attention kernel: a running softmax over the blocks of keys that a block of queries visits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xprobe_kernels.reach import Reach
from xprobe_kernels.triton_fold import INFINITY, softcapped
from xprobe_kernels.triton_support import next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores(
    q,  # [BM, BD]
    key_ptr,
    key_stride,
    i,  # [BM] queries
    places,  # [BM] of the queries
    j,  # [BN] keys
    queries,  # how many there are
    tokens,  # of the keys
    width,
    since_ptr,
    until_ptr,
    query_positions_ptr,
    positions_ptr,
    scale,
    window,
    cap,
    MASKED: tl.constexpr,
    HAS_SINCE: tl.constexpr,  # otherwise a key's place is j
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BD: tl.constexpr,
):
    """Scores [BM, BN] times log2(e), for exp2; -inf where a query does not attend to a key."""
    inside = j < tokens
    d = tl.arange(0, BD)
    place = key_ptr + j.to(tl.int64)[:, None] * key_stride + d[None, :]
    k = tl.load(place, mask=inside[:, None] & (d < width)[None, :], other=0.0)
    s = tl.dot(q, k.T, input_precision="ieee") * scale
    if HAS_CAP:
        s = softcapped(s, cap)
    s = s * LOG2E
    if MASKED:
        until = tl.load(until_ptr + j, mask=inside, other=0)
        if HAS_SINCE:  # noqa: SIM108 - a branch of constants: without it the pointer is None
            since = tl.load(since_ptr + j, mask=inside, other=0)
        else:
            since = j
        seen = (since[None, :] <= places[:, None]) & (places[:, None] < until[None, :])
        if HAS_WINDOW:
            query_position = tl.load(query_positions_ptr + i, mask=i < queries, other=0)
            key_position = tl.load(positions_ptr + j, mask=inside, other=0)
            seen = seen & (query_position[:, None] - key_position[None, :] < window)
        s = tl.where(seen, s, -INFINITY)
    return s


@triton.jit
def add_block(
    s,  # [BM, BN]
    value_ptr,
    value_stride,
    j,
    tokens,
    value_width,
    peak,
    total,
    sums,
    BE: tl.constexpr,
):
    """Adds a block of scores to the running maximum [BM], denominator [BM] and weighted sum [BM, BE]."""
    e = tl.arange(0, BE)
    place = value_ptr + j.to(tl.int64)[:, None] * value_stride + e[None, :]
    v = tl.load(place, mask=(j < tokens)[:, None] & (e < value_width)[None, :], other=0.0)
    new = tl.maximum(peak, tl.max(s, 1))
    shift = tl.where(new == -INFINITY, 0.0, new)  # the query has seen no key yet
    p = tl.exp2(s - shift[:, None])
    rescale = tl.exp2(peak - shift)
    total = total * rescale + tl.sum(p, 1)
    sums = tl.dot(p.to(v.dtype), v, sums * rescale[:, None], input_precision="ieee")
    return new, total, sums


@triton.jit(do_not_specialize=["tokens", "window"])
def tree_attention_kernel(
    query_ptr,
    query_head,
    query_stride,  # [H, N, d]: strides of heads and tokens
    key_ptr,
    key_head,
    key_stride,  # [G, N, d]
    value_ptr,
    value_head,
    value_stride,  # [G, N, e]
    sinks_ptr,  # [H]
    out_ptr,  # [N, H, e], contiguous
    until_ptr,
    positions_ptr,  # [N]
    bounds_ptr,  # [Q, 3]
    visits_ptr,
    tokens,  # N
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
    q = tl.load(place, mask=(i < tokens)[:, None] & (d < width)[None, :], other=0.0)
    keys = key_ptr + head // GROUP * key_head
    values = value_ptr + head // GROUP * value_head
    peak = tl.full([BM], -INFINITY, tl.float32)
    total = tl.zeros([BM], tl.float32)
    if HAS_SINKS:  # like a key that has no value
        peak = tl.zeros([BM], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total += 1.0
    sums = tl.zeros([BM, BE], tl.float32)
    first = tl.load(bounds_ptr + 3 * block)
    masked = tl.load(bounds_ptr + 3 * block + 1)
    last = tl.load(bounds_ptr + 3 * block + 2)
    for visit in range(first, masked):
        j = tl.load(visits_ptr + visit) * BN + tl.arange(0, BN)
        s = scores(
            q, keys, key_stride, i, i, j, tokens, tokens, width, None, until_ptr, positions_ptr, positions_ptr,
            scale, window, cap, HAS_WINDOW, False, HAS_WINDOW, HAS_CAP, BD,
        )  # fmt: skip
        peak, total, sums = add_block(s, values, value_stride, j, tokens, value_width, peak, total, sums, BE)
    for visit in range(masked, last):
        j = tl.load(visits_ptr + visit) * BN + tl.arange(0, BN)
        s = scores(
            q, keys, key_stride, i, i, j, tokens, tokens, width, None, until_ptr, positions_ptr, positions_ptr,
            scale, window, cap, True, False, HAS_WINDOW, HAS_CAP, BD,
        )  # fmt: skip
        peak, total, sums = add_block(s, values, value_stride, j, tokens, value_width, peak, total, sums, BE)
    total = tl.where(total > 0, total, 1.0)  # queries past the end attend to no key
    e = tl.arange(0, BE)
    out = out_ptr + (i.to(tl.int64)[:, None] * heads + head) * value_width + e[None, :]
    sums = sums / total[:, None]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=(i < tokens)[:, None] & (e < value_width)[None, :])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Reach,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Launches the kernel. ``tree_attention`` has checked the arguments."""
    query, key, value = (t if t.stride(2) == 1 else t.contiguous() for t in (query, key, value))
    heads, tokens, width = query.shape
    value_width, blocks = value.shape[2], reach.blocks
    out = query.new_empty(tokens, heads, value_width)
    tree_attention_kernel[(len(reach.bounds), heads)](
        query, query.stride(0), query.stride(1), key, key.stride(0), key.stride(1),
        value, value.stride(0), value.stride(1), sinks if sinks is None else sinks.contiguous(), out,
        reach.until, reach.positions, reach.bounds, reach.visits,
        tokens, heads, width, value_width, float(scale), window or 0, float(softcap or 0.0),
        GROUP=heads // key.shape[0],
        HAS_WINDOW=window is not None, HAS_CAP=softcap is not None, HAS_SINKS=sinks is not None,
        BM=blocks.queries, BN=blocks.keys,
        BD=max(next_power_of_2(width), 16), BE=max(next_power_of_2(value_width), 16),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out
