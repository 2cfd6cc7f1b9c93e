"""How the Triton kernels read a tile of logits while it is in registers, and what they carry to the next tile.

``State`` holds, per row and in fp32: the running maximum m, the sums of e^(z-m) and of e^(z-m) * (z-m), and the number
of tokens above the threshold of each looked-up token. All sums are relative to m, so an offset common to all logits
does not reduce precision. A soft-cap bounds the logits, so m is then the cap itself and needs no search.

KL(final layer || row) needs the softmax weights of the final row beside the logits of the row. The pass over the final
rows keeps its weights (``KEEP``), and the pass over the other rows multiplies its logits by them (``COMPARE``). This
is one more multiplication for each logit and no second product. Only the final rows have weights in memory.

The k largest logits are carried along by passes over few rows only (``keep_largest``). A pass over many rows writes the
largest logit of each tile, and triton_top.py finds the k largest afterwards.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from xprobe_kernels.precision import BOUNDED_CAP

INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # replaces the logit -inf of a token, because -inf marks an empty place
NO_ID = tl.constexpr(2147483647)
LOG2_E = tl.constexpr(1.4426950408889634)
NO_CAP, SMALL_CAP, LARGE_CAP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_KL, KEEP, COMPARE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def cap_kind(cap: float | None) -> int:
    """The kind of a soft-cap: none, small enough to replace the running maximum, or too large for that."""
    if cap is None:
        return NO_CAP.value
    return (SMALL_CAP if cap <= BOUNDED_CAP else LARGE_CAP).value


def kl_kind(kept: Any, final_of: Any) -> int:
    """What a pass does for KL: nothing, keep the weights of final rows, or compare rows with them."""
    return (NO_KL if kept is None else KEEP if final_of is None else COMPARE).value


class State(NamedTuple):
    """What a program carries from tile to tile for its BM rows."""

    peak: Any  # [BM] running maximum m
    total: Any  # [BM] sum of e^(z-m)
    moment: Any  # [BM] sum of e^(z-m) * (z-m)
    above: Any  # [BM, LOOKUPS] int32: tokens above the threshold of each looked-up token
    top: Any  # [BM, PLACES] the largest logits before the soft-cap, in no order
    top_ids: Any  # [BM, PLACES] int32: their tokens
    mass: Any  # [BM] sum of p over the tokens so far, where p is the distribution of the final row
    expected: Any  # [BM] sum of p * (z-m) over the tokens so far


class Lookups(NamedTuple):
    """The A looked-up tokens of each of R rows."""

    tokens: Any  # pointer to [R, A] int64
    thresholds: Any  # pointer to [R, A] fp32 (ties.py)
    count: Any  # A


class Finals(NamedTuple):
    """The P final rows, whose softmax weights the pass writes or reads.

    A part is what ``fold`` reads at a time: a tile, or the half or quarter of one.
    """

    weights: Any  # pointer to [P, columns]: e^(z-m), where m is the running maximum at that part
    columns: Any  # width of all tiles together
    peaks: Any  # pointer to [P, parts]: m
    masses: Any  # pointer to [P, parts]: sum of the part's weights
    parts: Any  # number of parts
    rows: Any  # [BM] int32: which of the P rows to write or read; P * columns is below 2^31
    logsumexp: Any  # [BM] of these rows, where they are read
    valid: Any  # [BM] whether the program's rows are inside R


@triton.jit
def tanh_near_zero(x):
    """tanh(x) for \\|x\\| <= 1, within 1.5 units in the last place of fp32.

    x * P(x^2): Chebyshev interpolation of tanh(sqrt(u)) / sqrt(u) at 8 points of 0 <= u <= 1, whose error is below
    5e-9.
    """
    u = x * x
    p = 2.2786476629097665e-3 - 3.523280937567492e-4 * u
    p = -7.912485056356281e-3 + u * p
    p = 2.146141015373372e-2 + u * p
    p = -5.386970672436877e-2 + u * p
    p = 1.3332139305170107e-1 + u * p
    p = -3.3333277378133375e-1 + u * p
    p = 9.999999956422981e-1 + u * p
    return x * p


@triton.jit
def softcapped(z, cap):
    """cap * tanh(z / cap). Uses exp for \\|z\\| > cap, and a polynomial near 0, where the formula with exp cancels."""
    x = z / cap
    return cap * tl.where(tl.abs(x) <= 1, tanh_near_zero(x), 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def softcapped_tile(z, cap):
    """``softcapped`` of a whole tile. Few tiles hold a logit beyond the cap; the others need no exp."""
    x = z * (1 / cap)
    if tl.max(tl.max(tl.abs(x), 1), 0) <= 1:  # noqa: SIM108, Triton takes both branches of an expression
        capped = cap * tanh_near_zero(x)
    else:
        capped = softcapped(z, cap)
    return capped


@triton.jit
def below_cap(z, cap):
    """softcapped(z, cap) - cap, as a function of e^z alone: its error is a rounding of the cap."""
    return -2 * cap / (tl.exp2(z * (2 * LOG2_E / cap)) + 1)


@triton.jit
def scaled(product, columns, bias_ptr, vocabulary, scale, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr):
    """Adds bias and scale to a product: raw logits [BM, BN], as ``Unembedding.bias_and_scale``."""
    if HAS_BIAS:
        product += tl.load(bias_ptr + tl.minimum(columns, vocabulary - 1)).to(tl.float32)[None, :]
    if HAS_SCALE:
        product = product * scale
    return product


@triton.jit
def start(
    vocabulary,
    cap,
    BM: tl.constexpr,
    CAP: tl.constexpr,
    LOOKUPS: tl.constexpr,  # power of 2 that is at least A
    K: tl.constexpr,
    PLACES: tl.constexpr,  # power of 2 that is at least K
):
    """The state before the first tile."""
    peak = tl.full([BM], -INFINITY, tl.float32)
    if CAP == SMALL_CAP:
        peak = tl.zeros([BM], tl.float32) + cap
    total = tl.zeros([BM], tl.float32)
    moment = tl.zeros([BM], tl.float32)
    above = tl.zeros([BM, LOOKUPS], tl.int32)
    places = tl.arange(0, PLACES)
    # places past K hold +inf, so that nothing ever replaces them; each place has its own id
    top = tl.zeros([BM, PLACES], tl.float32) + tl.where(places < K, -INFINITY, INFINITY)[None, :]
    top_ids = tl.zeros([BM, PLACES], tl.int32) + (vocabulary + places)[None, :]
    zeros = tl.zeros([BM], tl.float32)
    return State(peak, total, moment, above, top, top_ids, zeros, zeros)


@triton.jit
def finals_of(
    rows, valid, weights_ptr, columns, peaks_ptr, masses_ptr, parts, final_of_ptr, logsumexp_ptr, KL: tl.constexpr
):
    """The final rows of a program's rows, if the pass keeps their weights or compares with them."""
    final = rows.to(tl.int32)
    logsumexp = tl.zeros(rows.shape, tl.float32)
    if KL == COMPARE:
        final = tl.load(final_of_ptr + rows).to(tl.int32)
        logsumexp = tl.load(logsumexp_ptr + final)
    return Finals(weights_ptr, columns, peaks_ptr, masses_ptr, parts, final, logsumexp, valid)


@triton.jit
def exp(x):
    """e^x. ``tl.exp`` takes three more instructions for results below 2^-126, which are 0 here."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def count_above(z, threshold):
    """How many logits of each row are above its threshold [BM] int32, from the signs of the differences.

    An infinite logit minus an infinite threshold is NaN, whose sign depends on the processor. So no threshold is -inf,
    and one of +inf becomes a NaN with the sign of a positive number: nothing is above it.
    """
    bound = tl.where(threshold == INFINITY, float("nan"), tl.where(threshold < LOWEST, LOWEST, threshold))
    return tl.sum(((bound[:, None] - z).to(tl.uint32, bitcast=True) >> 31).to(tl.int32), 1)


@triton.jit
def fold(
    z,  # [BM, BN] raw logits: with bias and scale, without soft-cap
    first,  # token id of the first column
    rows,  # [BM] row indices, int64, inside R
    state,
    lookups,
    finals,
    part,  # index of these columns among all parts
    end,  # the first token id that is not to be read: V, or less
    cap,
    CAP: tl.constexpr,
    LOOKUPS: tl.constexpr,
    K: tl.constexpr,
    KL: tl.constexpr,
):
    """The state after one more tile, and the largest raw logit of the tile [BM]."""
    ragged = first + z.shape[1] > end  # the tile reaches past the end, which happens only for the last tile
    if ragged:
        z = tl.where((first + tl.arange(0, z.shape[1]) < end)[None, :], z, -INFINITY)
    above = state.above
    for a in range(lookups.count):
        threshold = tl.load(lookups.thresholds + rows * lookups.count + a)
        place = tl.load(lookups.tokens + rows * lookups.count + a).to(tl.int32) - first
        count = count_above(z, threshold)
        if tl.max(((place >= 0) & (place < z.shape[1])).to(tl.int32), 0) > 0:  # the tile holds the token of a row
            own = tl.arange(0, z.shape[1])[None, :] == place[:, None]
            count -= (tl.max(tl.where(own, z, -INFINITY), 1) > threshold).to(tl.int32)  # it is not above itself
        above += tl.where(tl.arange(0, LOOKUPS)[None, :] == a, count[:, None], 0)

    largest = tl.max(z, 1)
    peak = state.peak
    total = state.total
    moment = state.moment
    expected = state.expected
    mass = state.mass
    if CAP == SMALL_CAP:
        shifted = below_cap(z, cap)
    else:
        capped = z
        if CAP == LARGE_CAP:
            capped = softcapped_tile(z, cap)
        peak = tl.maximum(peak, largest if CAP == NO_CAP else tl.max(capped, 1))
        shift = tl.where(peak == -INFINITY, 0.0, peak)  # keeps the sums at zero while all logits of a row are -inf
        seen = state.peak != -INFINITY
        move = tl.where(seen, state.peak - shift, 0.0)
        rescale = tl.where(seen, exp(move), 0.0)
        moment = rescale * (moment + move * total)
        total = rescale * total
        expected += move * mass
        shifted = capped - shift[:, None]
    if CAP != NO_CAP:  # noqa: SIM102, the inner condition is known at run time only
        if ragged:
            shifted = tl.where((first + tl.arange(0, z.shape[1]) < end)[None, :], shifted, -INFINITY)
    if KL == COMPARE:
        shifted = tl.maximum(shifted, LOWEST, propagate_nan=tl.PropagateNan.ALL)  # no 0 * -inf below
    weights = exp(shifted)
    tile_total = tl.sum(weights, 1)
    tile_moment = tl.sum(weights * shifted, 1)
    total += tile_total
    if KL == KEEP:
        places = (finals.rows * finals.columns)[:, None] + (first + tl.arange(0, z.shape[1]))[None, :]
        tl.store(finals.weights + places, weights, mask=finals.valid[:, None])
        tl.store(finals.peaks + finals.rows * finals.parts + part, peak, mask=finals.valid)
        tl.store(finals.masses + finals.rows * finals.parts + part, tile_total, mask=finals.valid)
    if KL == COMPARE:
        places = (finals.rows * finals.columns + first)[:, None] + tl.arange(0, z.shape[1])[None, :]
        factor = exp(tl.load(finals.peaks + finals.rows * finals.parts + part) - finals.logsumexp)
        expected += factor * tl.sum(tl.load(finals.weights + places) * shifted, 1)
        mass += factor * tl.load(finals.masses + finals.rows * finals.parts + part)
    elif tl.max((tile_moment != tile_moment).to(tl.int32), 0) > 0:
        # a logit of -inf gave 0 * -inf: a column past the end, or a bias of -inf
        shifted = tl.maximum(shifted, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        tile_moment = tl.sum(exp(shifted) * shifted, 1)
    moment += tile_moment

    top = state.top
    top_ids = state.top_ids
    if K > 0:
        columns = first + tl.arange(0, z.shape[1])
        top, top_ids = keep_largest(z, columns, (columns < end)[None, :], top, top_ids)
    return State(peak, total, moment, above, top, top_ids, mass, expected), largest


@triton.jit
def keep_largest(z, columns, inside, top, top_ids):
    """Merges the tile's logits into the k largest so far.

    Ids rise from tile to tile, so a later token replaces an earlier one only with a strictly larger logit.
    """
    remaining = tl.where(inside, tl.maximum(z, LOWEST), -INFINITY)
    best = tl.max(remaining, 1)
    worst = tl.min(top, 1)
    while tl.max((best > worst).to(tl.int32), 0) > 0:
        winner = tl.min(tl.where(remaining == best[:, None], columns[None, :], NO_ID), 1)
        removed = tl.max(tl.where(top == worst[:, None], top_ids, -1), 1)
        place = (top_ids == removed[:, None]) & (best > worst)[:, None]
        top = tl.where(place, best[:, None], top)
        top_ids = tl.where(place, winner[:, None], top_ids)
        remaining = tl.where(columns[None, :] == winner[:, None], -INFINITY, remaining)
        best = tl.max(remaining, 1)
        worst = tl.min(top, 1)
    return top, top_ids


@triton.jit
def store(
    state,
    rows,  # [BM] row indices, int64; rows from R on are not written
    count,  # R
    part,  # index of this split of the vocabulary
    lookups,  # A
    sums_ptr,  # [S, 5, R]
    above_ptr,  # [S, R, A]
    top_ptr,
    top_ids_ptr,  # [S, R, K]
    LOOKUPS: tl.constexpr,
    K: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Writes the state of one split."""
    valid = rows < count
    part = tl.cast(part, tl.int64)  # Triton makes an argument of 1 a plain number
    base = sums_ptr + part * 5 * count + rows
    tl.store(base, state.peak, mask=valid)
    tl.store(base + count, state.total, mask=valid)
    tl.store(base + 2 * count, state.moment, mask=valid)
    tl.store(base + 3 * count, state.mass, mask=valid)
    tl.store(base + 4 * count, state.expected, mask=valid)
    index = part * count + rows
    a = tl.arange(0, LOOKUPS)
    mask = valid[:, None] & (a < lookups)[None, :]
    tl.store(above_ptr + index[:, None] * lookups + a[None, :], state.above, mask=mask)
    if K > 0:
        place = tl.arange(0, PLACES)
        mask = valid[:, None] & (place < K)[None, :]
        tl.store(top_ptr + index[:, None] * K + place[None, :], state.top, mask=mask)
        tl.store(top_ids_ptr + index[:, None] * K + place[None, :], state.top_ids, mask=mask)
