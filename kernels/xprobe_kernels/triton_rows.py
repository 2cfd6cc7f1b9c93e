"""The two small kernels around the pass over the vocabulary: one prepares rows and look-ups, one merges the splits.

Each runs one program per row. Both are bound by memory and take about one per cent of the time of the pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xprobe_kernels.request import LensRequest
from xprobe_kernels.ties import TIE_ROUNDINGS
from xprobe_kernels.triton_fold import INFINITY, LOWEST, NO_ID, softcapped
from xprobe_kernels.triton_support import next_power_of_2
from xprobe_kernels.unembedding import Unembedding

NORMS = {"none": 0, "rms": 1, "layer": 2}
EPS = tl.constexpr(torch.finfo(torch.float32).eps)
TIES = tl.constexpr(TIE_ROUNDINGS * torch.finfo(torch.float32).eps)
# The kernels write float("nan") instead of using a global: before each launch Triton checks that the globals of a
# kernel are equal to what they were, and NaN is never equal to itself


@triton.jit
def normed_row(
    row,  # [BD] fp32, zero past the width
    inside,
    gamma_ptr,
    beta_ptr,
    eps,
    width,
    NORM: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
):
    """The final norm of one row [BD] in fp32, as ``Unembedding.normalize``; zero past the width."""
    d = tl.arange(0, row.shape[0])
    if NORM == 2:
        row = tl.where(inside, row - tl.sum(row, 0) / width, 0.0)
    if NORM > 0:
        row = row * tl.rsqrt(tl.sum(row * row, 0) / width + eps)
    if GAMMA:
        row = row * tl.load(gamma_ptr + d, mask=inside, other=0.0).to(tl.float32)
    if BETA:
        row = row + tl.load(beta_ptr + d, mask=inside, other=0.0).to(tl.float32)
    return row


@triton.jit
def prepare_kernel(
    hidden_ptr,  # [R, D], rows hidden_stride apart
    hidden_stride,
    gamma_ptr,
    beta_ptr,  # [D]
    eps,
    weight_ptr,  # [V, D], rows weight_stride apart
    weight_stride,
    bias_ptr,  # [V]
    scale,
    cap,
    tokens_ptr,  # [R, A] int64
    lookups,  # A
    normed_ptr,  # [R, D]
    finite_ptr,  # [R] int8
    logits_ptr,
    thresholds_ptr,  # [R, A]
    width,  # D
    vocabulary,  # V
    NORM: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    STORE: tl.constexpr,  # False: the pass takes the rows as they are
    BD: tl.constexpr,
):
    """Writes the normed row, the logits of its looked-up tokens, and their thresholds (ties.py)."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < width
    row = tl.load(hidden_ptr + r * hidden_stride + d, mask=inside, other=0.0).to(tl.float32)
    not_finite = tl.max(((row != row) | (tl.abs(row) == INFINITY)).to(tl.int32), 0)
    row = normed_row(row, inside, gamma_ptr, beta_ptr, eps, width, NORM, GAMMA, BETA)
    row = row.to(normed_ptr.dtype.element_ty).to(tl.float32)
    # a row that overflows in the operands' dtype is not finite either
    not_finite = tl.maximum(not_finite, tl.max(((row != row) | (tl.abs(row) == INFINITY)).to(tl.int32), 0))
    row = tl.where(not_finite > 0, 0.0, row)  # so that its NaN and infinities do not spread
    if STORE:
        tl.store(normed_ptr + r * width + d, row.to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(finite_ptr + r, (1 - not_finite).to(tl.int8))

    size = tl.sqrt(tl.sum(row * row, 0))
    for a in range(lookups):
        token = tl.load(tokens_ptr + r * lookups + a)
        known = (token >= 0) & (not_finite == 0)
        token = tl.minimum(tl.maximum(token, 0), vocabulary - 1)
        weight = tl.load(weight_ptr + token * weight_stride + d, mask=inside, other=0.0).to(tl.float32)
        z = tl.sum(row * weight, 0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + token).to(tl.float32)
        z = z * scale
        slack = TIES * tl.abs(scale) * size * tl.sqrt(tl.sum(weight * weight, 0)) + 2 * EPS * tl.abs(z)
        tl.store(thresholds_ptr + r * lookups + a, tl.where(tl.abs(z) == INFINITY, z, z + slack))
        if HAS_CAP:
            z = softcapped(z, cap)
        tl.store(logits_ptr + r * lookups + a, tl.where(known, z, float("nan")))


@triton.jit(do_not_specialize=["splits", "lists", "count"])
def merge_kernel(
    sums_ptr,  # [S, 5, R]
    above_ptr,  # [S, R, A] int32
    top_ptr,
    top_ids_ptr,  # [lists, R, K]
    tokens_ptr,  # [R, A]
    finite_ptr,  # [R] int8
    cap,
    splits,  # S
    lists,  # of candidates for the K largest logits
    count,  # R
    lookups,  # A
    logsumexp_ptr,
    entropy_ptr,
    cross_ptr,  # [R]
    rank_ptr,  # [R, A] int64
    out_ptr,
    out_ids_ptr,  # [R, K]
    HAS_CAP: tl.constexpr,
    COMPARED: tl.constexpr,  # whether the rows were compared with their final rows
    K: tl.constexpr,
    BS: tl.constexpr,  # power of 2 that is at least S
    BC: tl.constexpr,  # power of 2 that is at least lists * K
):
    """Merges the splits of one row in fixed order. A row that is not finite gives NaN, rank 0 and id -1."""
    r = tl.program_id(0).to(tl.int64)
    finite = tl.load(finite_ptr + r) > 0
    s = tl.arange(0, BS).to(tl.int64)
    mask = s < splits
    base = sums_ptr + s * 5 * count + r
    peak = tl.load(base, mask=mask, other=-INFINITY)
    total = tl.load(base + count, mask=mask, other=0.0)
    moment = tl.load(base + 2 * count, mask=mask, other=0.0)
    highest = tl.max(peak, 0)
    shift = tl.where(highest == -INFINITY, 0.0, highest)
    move = tl.where(peak == -INFINITY, 0.0, peak - shift)
    rescale = tl.where(peak == -INFINITY, 0.0, tl.exp(move))
    moment = tl.sum(rescale * (moment + move * total), 0)
    total = tl.sum(rescale * total, 0)
    if COMPARED:  # cross-entropy of the row under the distribution of its final row
        mass = tl.load(base + 3 * count, mask=mask, other=0.0)
        expected = tl.load(base + 4 * count, mask=mask, other=0.0)
        expected = tl.sum(expected + move * mass, 0) / tl.sum(mass, 0)
        tl.store(cross_ptr + r, tl.where(finite, tl.log(total) - expected, float("nan")))
    tl.store(logsumexp_ptr + r, tl.where(finite, highest + tl.log(total), float("nan")))
    entropy = tl.log(total) - moment / total
    entropy = tl.where(entropy < 0, 0.0, entropy)  # tl.maximum(entropy, 0) would hide NaN
    tl.store(entropy_ptr + r, tl.where(finite, entropy, float("nan")))

    for a in range(lookups):
        above = tl.sum(tl.load(above_ptr + (s * count + r) * lookups + a, mask=mask, other=0), 0)
        known = (tl.load(tokens_ptr + r * lookups + a) >= 0) & finite
        tl.store(rank_ptr + r * lookups + a, tl.where(known, above + 1, 0).to(tl.int64))

    if K > 0:
        c = tl.arange(0, BC).to(tl.int64)
        held = c < lists * K
        place = ((c // K) * count + r) * K + c % K
        values = tl.load(top_ptr + place, mask=held, other=-INFINITY)
        ids = tl.load(top_ids_ptr + place, mask=held, other=NO_ID)
        for k in range(K):
            best = tl.max(values, 0)
            winner = tl.min(tl.where(values == best, ids, NO_ID), 0)
            values = tl.where(ids == winner, -INFINITY, values)
            capped = tl.where(best == LOWEST, -INFINITY, best)
            if HAS_CAP:
                capped = softcapped(capped, cap)
            tl.store(out_ptr + r * K + k, tl.where(finite, capped, float("nan")))
            tl.store(out_ids_ptr + r * K + k, tl.where(finite, winner, -1).to(tl.int64))


@dataclass(frozen=True, eq=False)
class Prepared:
    """What ``prepare_kernel`` gives: rows as the pass takes them, and the results of their look-ups."""

    normed: Tensor  # [R, D], in the operands' dtype
    finite: Tensor  # [R] int8: 1 if the row is finite, else 0
    logits: Tensor  # [R, A] of the looked-up tokens
    thresholds: Tensor  # [R, A]


@dataclass(frozen=True, eq=False)
class Partials:
    """The state of each split of the vocabulary after the pass; ``merge`` combines them."""

    sums: Tensor  # [S, 5, R]: the five numbers per row of ``triton_fold.State``
    above: Tensor  # [S, R, A] int32
    top: Tensor  # [lists, R, K]: candidates for the K largest logits, in one list for each split, or from triton_top.py
    top_ids: Tensor  # [lists, R, K] int32
    maxima: Tensor  # [R, tiles]: the largest logit of each tile; [R, 0] if not needed

    @staticmethod
    def empty(splits: int, request: LensRequest, top_k: int, tiles: int = 0) -> Partials:
        rows, lookups = request.rows, request.lookups

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=request.hidden.device)

        return Partials(
            new(splits, 5, rows),
            new(splits, rows, lookups, dtype=torch.int32),
            new(splits, rows, top_k),
            new(splits, rows, top_k, dtype=torch.int32),
            new(rows, tiles),
        )


@dataclass(frozen=True, eq=False)
class FinalSoftmax:
    """Softmax of P final rows, for the rows that are compared with them (``triton_fold.Finals``)."""

    weights: Tensor  # [P, columns]
    peaks: Tensor  # [P, parts]
    masses: Tensor  # [P, parts]
    logsumexp: Tensor  # [P], filled after the pass
    entropy: Tensor  # [P], likewise

    @staticmethod
    def empty(finals: int, tiles: int, tile: int, parts: int, device: torch.device) -> FinalSoftmax:
        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        each = (finals, tiles * parts)
        return FinalSoftmax(new(finals, tiles * tile), new(*each), new(*each), new(finals), new(finals))

    @staticmethod
    def operands(kept: FinalSoftmax | None, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, peaks and masses for a kernel, or ``unused`` three times: Triton 3.6 keeps no None in a tuple."""
        return (unused, unused, unused) if kept is None else (kept.weights, kept.peaks, kept.masses)


def operand_dtype(hidden: Tensor, head: Unembedding) -> torch.dtype:
    """The dtype of the product's operands: the wider one of rows and weight."""
    return torch.promote_types(hidden.dtype, head.weight.dtype)


def needs_no_copy(request: LensRequest) -> bool:
    """Whether the pass takes the rows as they are: they need neither norm nor cast."""
    hidden, head = request.hidden, request.head
    plain = head.norm == "none" and head.gamma is None and head.beta is None
    return plain and hidden.dtype == operand_dtype(hidden, head) and hidden.is_contiguous()


def dense(request: LensRequest) -> LensRequest:
    """The request with dense rows, look-ups and head, as the kernels read them; dense tensors are not copied."""

    def dense_rows(matrix: Tensor) -> Tensor:
        return matrix if matrix.stride(1) == 1 else matrix.contiguous()

    head = request.head
    vectors = {name: getattr(head, name) for name in ("gamma", "beta", "bias")}
    vectors = {name: value for name, value in vectors.items() if value is not None and not value.is_contiguous()}
    if vectors or head.weight.stride(1) != 1:
        vectors = {name: value.contiguous() for name, value in vectors.items()}
        head = replace(head, weight=dense_rows(head.weight), **vectors)
    if head is request.head and request.hidden.stride(1) == 1 and request.lookup.is_contiguous():
        return request
    return replace(request, hidden=dense_rows(request.hidden), head=head, lookup=request.lookup.contiguous())


def prepare(request: LensRequest) -> Prepared:
    """Norms the rows of a ``dense`` request and looks up their tokens.

    Rows that need neither norm nor cast, such as rows from ``capture`` with a head, are not copied.
    """
    hidden, head, lookup = request.hidden, request.head, request.lookup
    rows, width = hidden.shape

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    as_they_are = needs_no_copy(request)
    prepared = Prepared(
        normed=hidden if as_they_are else new(rows, width, dtype=operand_dtype(hidden, head)),
        finite=new(rows, dtype=torch.int8),
        logits=new(*lookup.shape),
        thresholds=new(*lookup.shape),
    )
    if rows:
        block = next_power_of_2(width)
        prepare_kernel[(rows,)](
            hidden, hidden.stride(0), head.gamma, head.beta, float(head.eps),
            head.weight, head.weight.stride(0), head.bias, float(head.scale), float(head.softcap or 0.0),
            lookup, lookup.shape[1], prepared.normed, prepared.finite, prepared.logits, prepared.thresholds,
            width, head.vocab_size,
            NORM=NORMS[head.norm], GAMMA=head.gamma is not None, BETA=head.beta is not None,
            HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap is not None, STORE=not as_they_are, BD=block,
            num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return prepared


def merge(
    request: LensRequest, prepared: Prepared, partials: Partials, compared: bool = False
) -> tuple[dict[str, Any], Tensor]:
    """The fields of ``Readout`` except ``kl``, and the cross-entropy of rows that were compared with final ones [R]."""
    rows, lookup, top_k, device = request.rows, request.lookup, request.top_k, request.lookup.device
    splits, lists = len(partials.sums), len(partials.top)
    logsumexp, entropy, cross = torch.empty(3, rows, dtype=torch.float32, device=device).unbind(0)
    rank = torch.empty_like(lookup)
    top = torch.empty(rows, top_k, dtype=torch.float32, device=device)
    top_ids = torch.empty(rows, top_k, dtype=torch.int64, device=device)
    if rows:
        # rounded up, because Triton compiles the kernel anew for each size
        places = max(next_power_of_2(splits), 64)
        candidates = max(next_power_of_2(lists), 64) * next_power_of_2(top_k) if top_k else 1
        merge_kernel[(rows,)](
            partials.sums, partials.above, partials.top, partials.top_ids, lookup, prepared.finite,
            float(request.head.softcap or 0.0),
            splits, lists, rows, request.lookups, logsumexp, entropy, cross, rank, top, top_ids,
            HAS_CAP=request.head.softcap is not None, COMPARED=compared, K=top_k, BS=places, BC=candidates,
            num_warps=min(max(candidates // 256, 1), 8),
        )  # fmt: skip
    fields = {
        "logits": prepared.logits,
        "logsumexp": logsumexp,
        "rank": rank,
        "entropy": entropy,
        "top_ids": top_ids if top_k else None,
        "top_logits": top if top_k else None,
    }
    return fields, cross
