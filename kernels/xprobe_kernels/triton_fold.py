"""What the Triton kernels do with a tile of logits: read it while it is in registers, and forget it.

Carried from tile to tile, per row and in fp32: the running maximum m, the sums of e^(z-m) and of e^(z-m) * (z-m), how
many tokens exceed each looked-up token's threshold, and the k largest logits. All sums are relative to m, so that
an offset common to all logits costs no digits.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # stands for -inf of a real token: an empty place holds -inf itself
NO_ID = tl.constexpr(2147483647)


@triton.jit
def softcapped(z, cap):
    """cap * tanh(z / cap), through exp; by its series near 0, where the exponential form cancels."""
    x = z / cap
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return cap * tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def scaled(product, columns, bias_ptr, vocabulary, scale, HAS_BIAS: tl.constexpr):
    """Raw logits [BM, BN] of a product: bias and scale, as ``Unembedding.bias_and_scale``."""
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
    # places past K hold +inf, so that nothing ever takes them; every place has an id of its own
    top = tl.zeros([BM, PLACES], tl.float32) + tl.where(places < K, -INFINITY, INFINITY)[None, :]
    top_ids = tl.zeros([BM, PLACES], tl.int32) + (vocabulary + places)[None, :]
    return peak, total, moment, above, top, top_ids


@triton.jit
def fold(
    z,  # [BM, BN] raw logits: bias and scale applied, soft-cap not
    columns,  # [BN] token ids of the tile
    rows,  # [BM] row indices, int64, inside R
    peak,
    total,
    moment,  # [BM]
    above,  # [BM, LOOKUPS]
    top,
    top_ids,  # [BM, PLACES]
    tokens_ptr,
    thresholds_ptr,  # [R, A]
    lookups,  # A
    vocabulary,  # V
    cap,
    HAS_CAP: tl.constexpr,
    LOOKUPS: tl.constexpr,
    K: tl.constexpr,
):
    """The state after one more tile."""
    inside = columns < vocabulary
    for a in range(lookups):
        threshold = tl.load(thresholds_ptr + rows * lookups + a)
        token = tl.load(tokens_ptr + rows * lookups + a).to(tl.int32)
        larger = (z > threshold[:, None]) & (columns[None, :] != token[:, None]) & inside[None, :]
        count = tl.sum(larger.to(tl.int32), 1)
        above += tl.where(tl.arange(0, LOOKUPS)[None, :] == a, count[:, None], 0)

    shown = z
    if HAS_CAP:
        shown = softcapped(z, cap)
    shown = tl.where(inside[None, :], shown, -INFINITY)
    highest = tl.maximum(peak, tl.max(shown, 1))
    shift = tl.where(highest == -INFINITY, 0.0, highest)  # a row of -inf so far: keep its sums at zero
    seen = peak != -INFINITY
    move = tl.where(seen, peak - shift, 0.0)
    rescale = tl.where(seen, tl.exp(move), 0.0)
    shown = shown - shift[:, None]
    weights = tl.exp(shown)
    moment = rescale * (moment + move * total) + tl.sum(weights * tl.where(weights > 0, shown, 0.0), 1)
    total = rescale * total + tl.sum(weights, 1)

    if K > 0:
        left = tl.where(inside[None, :], tl.maximum(z, LOWEST), -INFINITY)
        best = tl.max(left, 1)
        worst = tl.min(top, 1)
        # ids rise from tile to tile: a later token takes a place only with a strictly larger logit
        while tl.max((best > worst).to(tl.int32), 0) > 0:
            found = tl.min(tl.where(left == best[:, None], columns[None, :], NO_ID), 1)
            out = tl.max(tl.where(top == worst[:, None], top_ids, -1), 1)
            place = (top_ids == out[:, None]) & (best > worst)[:, None]
            top = tl.where(place, best[:, None], top)
            top_ids = tl.where(place, found[:, None], top_ids)
            left = tl.where(columns[None, :] == found[:, None], -INFINITY, left)
            best = tl.max(left, 1)
            worst = tl.min(top, 1)
    return highest, total, moment, above, top, top_ids


@triton.jit
def store(
    peak,
    total,
    moment,
    above,
    top,
    top_ids,
    rows,  # [BM] row indices, int64; those from R on are not written
    count,  # R
    part,  # which split of the vocabulary this is
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
    part = tl.cast(part, tl.int64)  # a plain number where the caller gave 1
    base = sums_ptr + part * 3 * count + rows
    tl.store(base, peak, mask=valid)
    tl.store(base + count, total, mask=valid)
    tl.store(base + 2 * count, moment, mask=valid)
    at = part * count + rows
    a = tl.arange(0, LOOKUPS)
    tl.store(above_ptr + at[:, None] * lookups + a[None, :], above, mask=valid[:, None] & (a < lookups)[None, :])
    if K > 0:
        place = tl.arange(0, PLACES)
        mask = valid[:, None] & (place < K)[None, :]
        tl.store(top_ptr + at[:, None] * K + place[None, :], top, mask=mask)
        tl.store(top_ids_ptr + at[:, None] * K + place[None, :], top_ids, mask=mask)
