"""The two small kernels around the lens: rows before the pass (norm, look-ups), and the merge of its splits after it.

One program per row. Both are bounded by memory and take about one per cent of the time of the pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xprobe_kernels import divergence
from xprobe_kernels.reference import TIE_ROUNDINGS
from xprobe_kernels.triton_fold import INFINITY, LOWEST, NO_ID, softcapped
from xprobe_kernels.unembedding import Unembedding

NORMS = {"none": 0, "rms": 1, "layer": 2}
EPS = tl.constexpr(torch.finfo(torch.float32).eps)
TIES = tl.constexpr(TIE_ROUNDINGS * torch.finfo(torch.float32).eps)
# NaN is written out below: before a launch Triton compares the globals that a kernel uses with what they were


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
    STORE: tl.constexpr,  # False: the rows are as the pass takes them already
    BD: tl.constexpr,
):
    """Normed rows in the operands' dtype; the looked-up tokens' logits, and what others must exceed to rank above."""
    at = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < width
    row = tl.load(hidden_ptr + at * hidden_stride + d, mask=inside, other=0.0).to(tl.float32)
    broken = tl.max(((row != row) | (tl.abs(row) == INFINITY)).to(tl.int32), 0)
    row = normed_row(row, inside, gamma_ptr, beta_ptr, eps, width, NORM, GAMMA, BETA)
    row = row.to(normed_ptr.dtype.element_ty).to(tl.float32)
    # what overflows in the operands' dtype is no row either
    broken = tl.maximum(broken, tl.max(((row != row) | (tl.abs(row) == INFINITY)).to(tl.int32), 0))
    row = tl.where(broken > 0, 0.0, row)  # nothing of a broken row spreads
    if STORE:
        tl.store(normed_ptr + at * width + d, row.to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(finite_ptr + at, (1 - broken).to(tl.int8))

    size = tl.sqrt(tl.sum(row * row, 0))
    for a in range(lookups):
        token = tl.load(tokens_ptr + at * lookups + a)
        known = (token >= 0) & (broken == 0)
        token = tl.minimum(tl.maximum(token, 0), vocabulary - 1)
        weight = tl.load(weight_ptr + token * weight_stride + d, mask=inside, other=0.0).to(tl.float32)
        z = tl.sum(row * weight, 0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + token).to(tl.float32)
        z = z * scale
        slack = TIES * tl.abs(scale) * size * tl.sqrt(tl.sum(weight * weight, 0)) + 2 * EPS * tl.abs(z)
        tl.store(thresholds_ptr + at * lookups + a, tl.where(tl.abs(z) == INFINITY, z, z + slack))
        if HAS_CAP:
            z = softcapped(z, cap)
        tl.store(logits_ptr + at * lookups + a, tl.where(known, z, float("nan")))


@triton.jit(do_not_specialize=["splits", "count"])
def merge_kernel(
    sums_ptr,  # [S, 3, R]
    above_ptr,  # [S, R, A] int32
    top_ptr,
    top_ids_ptr,  # [S, R, K]
    tokens_ptr,  # [R, A]
    finite_ptr,  # [R]
    cap,
    splits,  # S
    count,  # R
    lookups,  # A
    logsumexp_ptr,
    entropy_ptr,  # [R]
    rank_ptr,  # [R, A] int64
    out_ptr,
    out_ids_ptr,  # [R, K]
    HAS_CAP: tl.constexpr,
    K: tl.constexpr,
    BS: tl.constexpr,  # power of 2 that is at least S
    BC: tl.constexpr,  # power of 2 that is at least S * K
):
    """Merges the splits of one row in fixed order; a row that is not finite reads NaN, rank 0 and id -1."""
    at = tl.program_id(0).to(tl.int64)
    finite = tl.load(finite_ptr + at) > 0
    s = tl.arange(0, BS).to(tl.int64)
    mask = s < splits
    base = sums_ptr + s * 3 * count + at
    peak = tl.load(base, mask=mask, other=-INFINITY)
    total = tl.load(base + count, mask=mask, other=0.0)
    moment = tl.load(base + 2 * count, mask=mask, other=0.0)
    highest = tl.max(peak, 0)
    shift = tl.where(highest == -INFINITY, 0.0, highest)
    move = tl.where(peak == -INFINITY, 0.0, peak - shift)
    rescale = tl.where(peak == -INFINITY, 0.0, tl.exp(move))
    moment = tl.sum(rescale * (moment + move * total), 0)
    total = tl.sum(rescale * total, 0)
    tl.store(logsumexp_ptr + at, tl.where(finite, highest + tl.log(total), float("nan")))
    entropy = tl.log(total) - moment / total
    entropy = tl.where(entropy < 0, 0.0, entropy)  # a maximum with 0 would hide NaN
    tl.store(entropy_ptr + at, tl.where(finite, entropy, float("nan")))

    for a in range(lookups):
        above = tl.sum(tl.load(above_ptr + (s * count + at) * lookups + a, mask=mask, other=0), 0)
        known = (tl.load(tokens_ptr + at * lookups + a) >= 0) & finite
        tl.store(rank_ptr + at * lookups + a, tl.where(known, above + 1, 0).to(tl.int64))

    if K > 0:
        c = tl.arange(0, BC).to(tl.int64)
        held = c < splits * K
        place = ((c // K) * count + at) * K + c % K
        values = tl.load(top_ptr + place, mask=held, other=-INFINITY)
        ids = tl.load(top_ids_ptr + place, mask=held, other=NO_ID)
        for k in range(K):
            best = tl.max(values, 0)
            found = tl.min(tl.where(values == best, ids, NO_ID), 0)
            values = tl.where(ids == found, -INFINITY, values)
            shown = tl.where(best == LOWEST, -INFINITY, best)
            if HAS_CAP:
                shown = softcapped(shown, cap)
            tl.store(out_ptr + at * K + k, tl.where(finite, shown, float("nan")))
            tl.store(out_ids_ptr + at * K + k, tl.where(finite, found, -1).to(tl.int64))


@dataclass(frozen=True, eq=False)
class Prepared:
    """Rows as the pass takes them."""

    normed: Tensor  # [R, D], operands' dtype
    finite: Tensor  # [R] bool
    logits: Tensor  # [R, A] of the looked-up tokens
    thresholds: Tensor  # [R, A]


@dataclass(frozen=True, eq=False)
class Partials:
    """What each split of the vocabulary found, for the merge."""

    sums: Tensor  # [S, 3, R]: maximum, sum, moment
    above: Tensor  # [S, R, A] int32
    top: Tensor  # [S, R, K]
    top_ids: Tensor  # [S, R, K] int32

    @staticmethod
    def empty(splits: int, rows: int, lookups: int, top_k: int, device: torch.device) -> Partials:
        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return Partials(
            new(splits, 3, rows),
            new(splits, rows, lookups, dtype=torch.int32),
            new(splits, rows, top_k),
            new(splits, rows, top_k, dtype=torch.int32),
        )


def operand_dtype(hidden: Tensor, head: Unembedding) -> torch.dtype:
    """The dtype of the product's operands: that of rows and weight if they agree, the wider one if not."""
    return torch.promote_types(hidden.dtype, head.weight.dtype)


def dense(head: Unembedding) -> Unembedding:
    """The head with its numbers side by side as the kernels read them; copies what is not so already."""
    parts = {name: getattr(head, name) for name in ("gamma", "beta", "bias")}
    parts = {name: value.contiguous() for name, value in parts.items() if value is not None}
    weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
    return replace(head, weight=weight, **parts)


def prepare(hidden: Tensor, head: Unembedding, lookup: Tensor) -> Prepared:
    """``head`` and ``lookup`` as ``dense`` and ``contiguous`` left them. Rows that need no norm and no cast (those that
    ``capture`` has normed) are taken as they are, without a copy."""
    rows, width = hidden.shape
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    dtype = operand_dtype(hidden, head)
    plain = head.norm == "none" and head.gamma is None and head.beta is None
    as_they_are = plain and hidden.dtype == dtype and hidden.is_contiguous()
    prepared = Prepared(
        normed=hidden if as_they_are else new(rows, width, dtype=dtype),
        finite=new(rows, dtype=torch.int8),
        logits=new(*lookup.shape),
        thresholds=new(*lookup.shape),
    )
    if rows:
        block = triton.next_power_of_2(width)
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


def merge(partials: Partials, prepared: Prepared, head: Unembedding, lookup: Tensor) -> dict[str, Any]:
    """The fields of ``Readout``, ``kl`` excepted."""
    splits, _, rows = partials.sums.shape
    top_k = partials.top.shape[2]
    device = lookup.device
    logsumexp, entropy = torch.empty(2, rows, dtype=torch.float32, device=device).unbind(0)
    rank = torch.empty_like(lookup)
    top = torch.empty(rows, top_k, dtype=torch.float32, device=device)
    top_ids = torch.empty(rows, top_k, dtype=torch.int64, device=device)
    if rows:
        # few sizes, whatever the numbers of splits: each is compiled anew
        places = max(triton.next_power_of_2(splits), 64)
        candidates = places * triton.next_power_of_2(top_k) if top_k else 1
        merge_kernel[(rows,)](
            partials.sums, partials.above, partials.top, partials.top_ids, lookup, prepared.finite,
            float(head.softcap or 0.0),
            splits, rows, lookup.shape[1], logsumexp, entropy, rank, top, top_ids,
            HAS_CAP=head.softcap is not None, K=top_k, BS=places, BC=candidates,
            num_warps=min(max(candidates // 256, 1), 8),
        )  # fmt: skip
    return {
        "logits": prepared.logits,
        "logsumexp": logsumexp,
        "rank": rank,
        "entropy": entropy,
        "top_ids": top_ids if top_k else None,
        "top_logits": top if top_k else None,
    }


def finish(
    partials: Partials,
    prepared: Prepared,
    head: Unembedding,
    lookup: Tensor,
    final_rows: Tensor | None,
    workspace_bytes: int,
    precision: str,
) -> dict[str, Any]:
    """All fields of ``Readout`` from what the pass found."""
    fields = merge(partials, prepared, head, lookup)
    kl = None
    if final_rows is not None:
        finite = prepared.finite.bool()
        kl = divergence.kl(prepared.normed, finite, head, fields["logsumexp"], final_rows, workspace_bytes, precision)
    return fields | {"kl": kl}
