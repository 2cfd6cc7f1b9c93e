"""How the Triton kernels read a tile of logits while it is in registers, and what they carry to the next tile.

``State`` holds, per row and in fp32: the running maximum m, the sums of e^(z-m) and of e^(z-m) * (z-m), the number of
tokens above the threshold of each looked-up token, and the k largest logits. All sums are relative to m, so an offset
common to all logits costs no digits.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # replaces the -inf of a real token; -inf marks an empty place
NO_ID = tl.constexpr(2147483647)


class State(NamedTuple):
    """What a program carries from tile to tile for its BM rows."""

    peak: Any  # [BM] running maximum m
    total: Any  # [BM] sum of e^(z-m)
    moment: Any  # [BM] sum of e^(z-m) * (z-m)
    above: Any  # [BM, LOOKUPS] int32: tokens above the threshold of each looked-up token
    top: Any  # [BM, PLACES] the largest logits before the soft-cap, in no order
    top_ids: Any  # [BM, PLACES] int32: their tokens


class Lookups(NamedTuple):
    """The A looked-up tokens of each of R rows."""

    tokens: Any  # pointer to [R, A] int64
    thresholds: Any  # pointer to [R, A] fp32 (ties.py)
    count: Any  # A


@triton.jit
def softcapped(z, cap):
    """cap * tanh(z / cap) through exp. Near 0 the exponential form cancels, so the Taylor series is used there."""
    x = z / cap
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return cap * tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def scaled(product, columns, bias_ptr, vocabulary, scale, HAS_BIAS: tl.constexpr):
    """Adds bias and scale to a product: raw logits [BM, BN], as ``Unembedding.bias_and_scale``."""
    if HAS_BIAS:
        product += tl.load(bias_ptr + tl.minimum(columns, vocabulary - 1)).to(tl.float32)[None, :]
    return product * scale


@triton.jit
def start(
    vocabulary,
    BM: tl.constexpr,
    LOOKUPS: tl.constexpr,  # power of 2 that is at least A
    K: tl.constexpr,
    PLACES: tl.constexpr,  # power of 2 that is at least K
):
    """The state before the first tile."""
    peak = tl.full([BM], -INFINITY, tl.float32)
    total = tl.zeros([BM], tl.float32)
    moment = tl.zeros([BM], tl.float32)
    above = tl.zeros([BM, LOOKUPS], tl.int32)
    places = tl.arange(0, PLACES)
    # places past K hold +inf, so that nothing ever replaces them; each place has its own id
    top = tl.zeros([BM, PLACES], tl.float32) + tl.where(places < K, -INFINITY, INFINITY)[None, :]
    top_ids = tl.zeros([BM, PLACES], tl.int32) + (vocabulary + places)[None, :]
    return State(peak, total, moment, above, top, top_ids)


@triton.jit
def fold(
    z,  # [BM, BN] raw logits: with bias and scale, without soft-cap
    columns,  # [BN] token ids of the tile
    rows,  # [BM] row indices, int64, inside R
    state,
    lookups,
    vocabulary,  # V
    cap,
    HAS_CAP: tl.constexpr,
    LOOKUPS: tl.constexpr,
    K: tl.constexpr,
):
    """The state after one more tile."""
    inside = columns < vocabulary
    above = state.above
    for a in range(lookups.count):
        threshold = tl.load(lookups.thresholds + rows * lookups.count + a)
        token = tl.load(lookups.tokens + rows * lookups.count + a).to(tl.int32)
        larger = (z > threshold[:, None]) & (columns[None, :] != token[:, None]) & inside[None, :]
        count = tl.sum(larger.to(tl.int32), 1)
        above += tl.where(tl.arange(0, LOOKUPS)[None, :] == a, count[:, None], 0)

    shown = z
    if HAS_CAP:
        shown = softcapped(z, cap)
    shown = tl.where(inside[None, :], shown, -INFINITY)
    highest = tl.maximum(state.peak, tl.max(shown, 1))
    shift = tl.where(highest == -INFINITY, 0.0, highest)  # keeps the sums at zero while all logits of a row are -inf
    seen = state.peak != -INFINITY
    move = tl.where(seen, state.peak - shift, 0.0)
    rescale = tl.where(seen, tl.exp(move), 0.0)
    shown = shown - shift[:, None]
    weights = tl.exp(shown)
    moment = rescale * (state.moment + move * state.total) + tl.sum(weights * tl.where(weights > 0, shown, 0.0), 1)
    total = rescale * state.total + tl.sum(weights, 1)

    top = state.top
    top_ids = state.top_ids
    if K > 0:
        left = tl.where(inside[None, :], tl.maximum(z, LOWEST), -INFINITY)
        best = tl.max(left, 1)
        worst = tl.min(top, 1)
        # ids rise from tile to tile, so a later token takes a place only with a strictly larger logit
        while tl.max((best > worst).to(tl.int32), 0) > 0:
            winner = tl.min(tl.where(left == best[:, None], columns[None, :], NO_ID), 1)
            out = tl.max(tl.where(top == worst[:, None], top_ids, -1), 1)
            place = (top_ids == out[:, None]) & (best > worst)[:, None]
            top = tl.where(place, best[:, None], top)
            top_ids = tl.where(place, winner[:, None], top_ids)
            left = tl.where(columns[None, :] == winner[:, None], -INFINITY, left)
            best = tl.max(left, 1)
            worst = tl.min(top, 1)
    return State(highest, total, moment, above, top, top_ids)


@triton.jit
def store(
    state,
    rows,  # [BM] row indices, int64; rows from R on are not written
    count,  # R
    part,  # index of this split of the vocabulary
    lookups,  # A
    sums_ptr,  # [S, 3, R]
    above_ptr,  # [S, R, A]
    top_ptr,
    top_ids_ptr,  # [S, R, K]
    LOOKUPS: tl.constexpr,
    K: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Writes the state of one split."""
    valid = rows < count
    part = tl.cast(part, tl.int64)  # Triton compiles an argument of 1 in as a plain number
    base = sums_ptr + part * 3 * count + rows
    tl.store(base, state.peak, mask=valid)
    tl.store(base + count, state.total, mask=valid)
    tl.store(base + 2 * count, state.moment, mask=valid)
    index = part * count + rows
    a = tl.arange(0, LOOKUPS)
    mask = valid[:, None] & (a < lookups)[None, :]
    tl.store(above_ptr + index[:, None] * lookups + a[None, :], state.above, mask=mask)
    if K > 0:
        place = tl.arange(0, PLACES)
        mask = valid[:, None] & (place < K)[None, :]
        tl.store(top_ptr + index[:, None] * K + place[None, :], state.top, mask=mask)
        tl.store(top_ids_ptr + index[:, None] * K + place[None, :], state.top_ids, mask=mask)
