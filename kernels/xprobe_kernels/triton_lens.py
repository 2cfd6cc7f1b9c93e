"""The fused lens: product, bias, scale, soft-cap, softmax sums, ranks and top-k in one pass over the vocabulary.

The grid is tiles of rows x splits of the vocabulary. A program processes its split tile by tile and carries the
state of its rows in registers (triton_fold.py). Logits are never written to memory. The splits are merged in fixed
order (triton_rows.py), without locks or atomics, so a repeated run gives the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xprobe_kernels.configs import PLAIN, Config, choose, choose_splits, limits_of
from xprobe_kernels.request import LensRequest
from xprobe_kernels.triton_fold import (
    INFINITY,
    Lookups,
    cap_kind,
    finals_of,
    fold,
    kl_kind,
    scaled,
    start,
    store,
)
from xprobe_kernels.triton_rows import FinalSoftmax, Partials, Prepared, needs_no_copy, operand_dtype
from xprobe_kernels.triton_support import cdiv, next_power_of_2


@triton.jit
def operands(
    normed,
    weight,
    weight_stride,
    rows,  # [BM] int64, inside R
    row_tile,
    tile,
    column,  # first column of the width
    vocabulary,
    width,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The next blocks [BM, BK] and [BN, BK] of the product."""
    if DESCRIPTORS:
        a = normed.load([row_tile * BM, column])
        b = weight.load([tile * BN, column])
    else:
        k = column + tl.arange(0, BK)
        tokens = tl.minimum(tile * BN + tl.arange(0, BN), vocabulary - 1).to(tl.int64)
        left = normed + rows[:, None] * width + k[None, :]
        right = weight + tokens[:, None] * weight_stride + k[None, :]
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            held = (k < width)[None, :]
            a, b = tl.load(left, mask=held, other=0.0), tl.load(right, mask=held, other=0.0)
    return a, b


@triton.jit
def halved(z):
    """The left and the right half of the columns of [BM, BN]."""
    return z.reshape(z.shape[0], 2, z.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def fold_tile(
    z,  # [BM, BN] product
    tile,
    rows,
    state,
    lookups,
    finals,
    bias_ptr,
    vocabulary,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CAP: tl.constexpr,
    LOOKUPS: tl.constexpr,
    K: tl.constexpr,
    KL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The state after a tile, and the largest logit of the tile [BM].

    With PARTS == 2 or 4 it reads halves or quarters of the columns one after the other, with fewer registers.
    """
    first = tile * BN
    pieces = (z,)
    if PARTS == 2:
        pieces = halved(z)
    if PARTS == 4:
        left, right = halved(z)
        pieces = halved(left) + halved(right)
    largest = tl.full([BM], -INFINITY, tl.float32)
    for i in tl.static_range(PARTS):
        part = scaled(pieces[i], first + tl.arange(0, BN // PARTS), bias_ptr, vocabulary, scale, HAS_BIAS, HAS_SCALE)
        state, top = fold(
            part, first, rows, state, lookups, finals, tile * PARTS + i, vocabulary, cap, CAP, LOOKUPS, K, KL
        )
        largest = tl.maximum(largest, top)
        first += BN // PARTS
    return state, largest


@triton.jit(do_not_specialize=["count", "splits", "group", "maxima"])
def lens_kernel(
    normed,  # [R, D], contiguous: a pointer, or a descriptor of [BM, BK] blocks
    weight,  # [V, D], rows weight_stride apart: a pointer, or a descriptor of [BN, BK] blocks
    weight_stride,
    bias_ptr,  # [V]
    tokens_ptr,
    thresholds_ptr,  # [R, A]
    sums_ptr,  # [S, 5, R]
    above_ptr,  # [S, R, A]
    top_ptr,
    top_ids_ptr,  # [S, R, K]
    maxima_ptr,  # [R, tiles]
    maxima,  # 1 if the largest logit of each tile is written, else 0; a number, so that both share compiled code
    weights_ptr,  # [P, columns]: see Finals
    peaks_ptr,
    masses_ptr,  # [P, parts]
    final_of_ptr,  # [R] int64: the final row of each row
    final_logsumexp_ptr,  # [P]
    count,  # R
    vocabulary,  # V
    width,  # D
    lookups,  # A
    splits,  # S
    group,  # row tiles that run together and share what they read of the weight
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CAP: tl.constexpr,
    LOOKUPS: tl.constexpr,
    K: tl.constexpr,  # how many of the largest logits the programs carry along
    PLACES: tl.constexpr,
    KL: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides D
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLAT: tl.constexpr,
):
    row_tiles = tl.cdiv(count, BM)
    tiles = tl.cdiv(vocabulary, BN)
    first_tile = tl.program_id(0) // (group * splits) * group
    inner = tl.program_id(0) % (group * splits)
    group_size = tl.minimum(row_tiles - first_tile, group)
    row_tile = first_tile + inner % group_size
    part = inner // group_size
    each = tl.cdiv(tiles, splits)
    first = part * each
    last = tl.minimum(first + each, tiles)

    offsets = row_tile * BM + tl.arange(0, BM)
    rows = tl.minimum(offsets, count - 1).to(tl.int64)
    lookups_of_rows = Lookups(tokens_ptr, thresholds_ptr, lookups)
    state = start(vocabulary, cap, BM, CAP, LOOKUPS, K, PLACES)
    finals_of_rows = finals_of(
        rows, offsets < count, weights_ptr, tiles * BN, peaks_ptr, masses_ptr, tiles * PARTS,
        final_of_ptr, final_logsumexp_ptr, KL,
    )  # fmt: skip
    kept = offsets < count
    maxima_of_rows = maxima_ptr + rows * tiles
    if FLAT:  # one loop over tiles and steps: loads of the next tile run while this one is folded
        steps = tl.cdiv(width, BK)
        z = tl.zeros([BM, BN], tl.float32)
        for i in range((last - first) * steps):
            tile = first + i // steps
            column = i % steps * BK
            a, b = operands(
                normed, weight, weight_stride, rows, row_tile, tile, column, vocabulary, width,
                EVEN, BM, BN, BK, DESCRIPTORS,
            )  # fmt: skip
            z = tl.dot(a, b.to(a.dtype).T, z, input_precision=PRECISION)
            if column + BK >= width:
                state, largest = fold_tile(
                    z, tile, rows, state, lookups_of_rows, finals_of_rows, bias_ptr, vocabulary, scale, cap,
                    HAS_BIAS, HAS_SCALE, CAP, LOOKUPS, K, KL, BM, BN, PARTS,
                )  # fmt: skip
                if maxima > 0:
                    tl.store(maxima_of_rows + tile, largest, mask=kept)
                z = tl.zeros([BM, BN], tl.float32)
    else:
        for tile in range(first, last):
            z = tl.zeros([BM, BN], tl.float32)
            for column in range(0, width, BK):
                a, b = operands(
                    normed, weight, weight_stride, rows, row_tile, tile, column, vocabulary, width,
                    EVEN, BM, BN, BK, DESCRIPTORS,
                )  # fmt: skip
                z = tl.dot(a, b.to(a.dtype).T, z, input_precision=PRECISION)
            state, largest = fold_tile(
                z, tile, rows, state, lookups_of_rows, finals_of_rows, bias_ptr, vocabulary, scale, cap,
                HAS_BIAS, HAS_SCALE, CAP, LOOKUPS, K, KL, BM, BN, PARTS,
            )  # fmt: skip
            if maxima > 0:
                tl.store(maxima_of_rows + tile, largest, mask=kept)
    store(
        state, offsets.to(tl.int64), count, part, lookups, sums_ptr, above_ptr, top_ptr, top_ids_ptr, LOOKUPS, K,
        PLACES,
    )  # fmt: skip


def configuration(request: LensRequest) -> Config:
    """The launch configuration for a ``dense`` request."""
    hidden, head, rows = request.hidden, request.head, request.rows
    dtype = operand_dtype(hidden, head)
    config = choose(device_limits(hidden.device)[0], dtype, rows)
    aligned = _describable(hidden) if needs_no_copy(request) else head.width * dtype.itemsize % 16 == 0
    if config.descriptors and not (aligned and _describable(head.weight) and head.weight.dtype == dtype):
        config = replace(PLAIN.for_rows(rows), carries_top=config.carries_top)
    return config.for_work(capped=head.softcap is not None, compared=request.final_rows is not None)


def launch(
    request: LensRequest, prepared: Prepared, config: Config, splits: int | None = None,
    kept: FinalSoftmax | None = None, final_of: Tensor | None = None,
) -> Partials:  # fmt: skip
    """Runs the pass over the prepared rows of a ``dense`` request.

    With ``kept`` but without ``final_of``, the rows are final rows, and the pass writes their weights to ``kept``.
    With both, each row is compared with row ``final_of`` [R] of ``kept``.
    """
    head, lookup, normed = request.head, request.lookup, prepared.normed
    weight, (rows, width) = head.weight, normed.shape
    architecture, processors = device_limits(normed.device)
    row_tiles, tiles = cdiv(rows, config.block_m), cdiv(head.vocab_size, config.block_n)
    slots = processors * config.resident
    if splits is None:
        row_bytes = config.block_m * width * normed.itemsize
        splits = choose_splits(row_tiles, tiles, slots, row_bytes, limits_of(architecture).level2)
    carried = request.top_k if config.carries_top else 0
    maxima = tiles if request.top_k and not carried else 0
    partials = Partials.empty(splits, request, carried, maxima)
    if not rows:
        return partials
    operands: tuple[Any, Any] = (normed, weight)
    described = config.descriptors and all(map(_describable, operands)) and normed.dtype == weight.dtype
    if described:
        operands = _descriptors(normed, weight, config)
    lens_kernel[(row_tiles * splits,)](
        *operands, weight.stride(0), head.bias, lookup, prepared.thresholds,
        partials.sums, partials.above, partials.top, partials.top_ids, partials.maxima, int(maxima > 0),
        *FinalSoftmax.operands(kept, partials.sums),
        final_of, None if final_of is None or kept is None else kept.logsumexp,
        rows, head.vocab_size, width, request.lookups, splits,
        max(1, min(slots // splits, row_tiles)), float(head.scale), float(head.softcap or 0.0),
        HAS_BIAS=head.bias is not None, HAS_SCALE=head.scale != 1.0, CAP=cap_kind(head.softcap),
        LOOKUPS=next_power_of_2(max(request.lookups, 1)), K=carried,
        PLACES=next_power_of_2(max(carried, 1)),
        KL=kl_kind(kept, final_of),
        PRECISION=request.precision if normed.dtype == torch.float32 else "ieee",
        EVEN=width % config.block_k == 0,
        BM=config.block_m, BN=config.block_n, BK=config.block_k, PARTS=config.parts,
        DESCRIPTORS=described, FLAT=config.flat,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return partials


@cache
def device_limits(device: torch.device) -> tuple[str, int]:
    """Architecture and number of multiprocessors. The interpreter reports 3, so that it splits vocabularies too."""
    if device.type != "cuda":
        return "interpreter", 3
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can describe the matrix: its rows must be aligned to 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0


def _descriptors(normed: Tensor, weight: Tensor, config: Config) -> tuple[Any, Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor(normed, list(normed.shape), list(normed.stride()), [config.block_m, config.block_k]),
        TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [config.block_n, config.block_k]),
    )
