"""The fused lens: product, bias, scale, soft-cap, softmax sums, ranks and top-k in one pass over the vocabulary.

The grid is tiles of rows x splits of the vocabulary. A program walks through its split tile by tile and carries the
state of its rows in registers (triton_fold.py). Logits are never written to memory. The splits are merged in fixed
order (triton_rows.py), without locks or atomics, so a repeated run gives the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xprobe_kernels.configs import PLAIN, Config, choose, choose_splits, limits_of
from xprobe_kernels.request import LensRequest
from xprobe_kernels.triton_fold import Lookups, fold, scaled, start, store
from xprobe_kernels.triton_rows import Partials, Prepared, dense, finish, prepare


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
def fold_tile(
    z,  # [BM, BN] product
    tile,
    rows,
    state,
    lookups,
    bias_ptr,
    vocabulary,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LOOKUPS: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Reads a tile. HALVES == 2: the left half of its columns, then the right one, with half of the registers."""
    columns = tile * BN + tl.arange(0, BN // HALVES)
    if HALVES == 2:
        z, right = z.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
    z = scaled(z, columns, bias_ptr, vocabulary, scale, HAS_BIAS)
    state = fold(z, columns, rows, state, lookups, vocabulary, cap, HAS_CAP, LOOKUPS, K)
    if HALVES == 2:
        columns += BN // 2
        z = scaled(right, columns, bias_ptr, vocabulary, scale, HAS_BIAS)
        state = fold(z, columns, rows, state, lookups, vocabulary, cap, HAS_CAP, LOOKUPS, K)
    return state


@triton.jit(do_not_specialize=["count", "splits", "group"])
def lens_kernel(
    normed,  # [R, D], contiguous: a pointer, or a descriptor of [BM, BK] blocks
    weight,  # [V, D], rows weight_stride apart: a pointer, or a descriptor of [BN, BK] blocks
    weight_stride,
    bias_ptr,  # [V]
    tokens_ptr,
    thresholds_ptr,  # [R, A]
    sums_ptr,  # [S, 3, R]
    above_ptr,  # [S, R, A]
    top_ptr,
    top_ids_ptr,  # [S, R, K]
    count,  # R
    vocabulary,  # V
    width,  # D
    lookups,  # A
    splits,  # S
    group,  # row tiles that run together and share what they read of the weight
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LOOKUPS: tl.constexpr,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides D
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HALVES: tl.constexpr,
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
    state = start(vocabulary, BM, LOOKUPS, K, PLACES)
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
                state = fold_tile(
                    z, tile, rows, state, lookups_of_rows, bias_ptr, vocabulary, scale, cap,
                    HAS_BIAS, HAS_CAP, LOOKUPS, K, BM, BN, HALVES,
                )  # fmt: skip
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
            state = fold_tile(
                z, tile, rows, state, lookups_of_rows, bias_ptr, vocabulary, scale, cap,
                HAS_BIAS, HAS_CAP, LOOKUPS, K, BM, BN, HALVES,
            )  # fmt: skip
    store(
        state, offsets.to(tl.int64), count, part, lookups, sums_ptr, above_ptr, top_ptr, top_ids_ptr, LOOKUPS, K,
        PLACES,
    )  # fmt: skip


def readout(request: LensRequest, config: Config | None = None, splits: int | None = None) -> dict[str, Any]:
    """The fields of ``Readout``. Tuning passes ``config`` and ``splits``; without them the launch is chosen."""
    request = dense(request)
    prepared = prepare(request)
    return finish(request, prepared, launch(request, prepared, config, splits))


def launch(
    request: LensRequest, prepared: Prepared, config: Config | None = None, splits: int | None = None
) -> Partials:
    """Runs the pass over the prepared rows of a ``dense`` request."""
    head, lookup, normed = request.head, request.lookup, prepared.normed
    weight, (rows, width) = head.weight, normed.shape
    architecture, processors = device_limits(normed.device)
    describable = _describable(normed) and _describable(weight) and normed.dtype == weight.dtype
    if config is None:
        config = choose(architecture, normed.dtype, rows)
        if config.descriptors and not describable:
            config = PLAIN.for_rows(rows)
    row_tiles, tiles = triton.cdiv(rows, config.block_m), triton.cdiv(head.vocab_size, config.block_n)
    slots = processors * config.resident
    if splits is None:
        row_bytes = config.block_m * width * normed.itemsize
        splits = choose_splits(row_tiles, tiles, slots, row_bytes, limits_of(architecture).level2)
    partials = Partials.empty(splits, request)
    if not rows:
        return partials
    operands: tuple[Any, Any] = (normed, weight)
    described = config.descriptors and describable
    if described:
        operands = _descriptors(normed, weight, config)
    lens_kernel[(row_tiles * splits,)](
        *operands, weight.stride(0), head.bias, lookup, prepared.thresholds,
        partials.sums, partials.above, partials.top, partials.top_ids,
        rows, head.vocab_size, width, request.lookups, splits,
        max(1, min(slots // splits, row_tiles)), float(head.scale), float(head.softcap or 0.0),
        HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap is not None,
        LOOKUPS=triton.next_power_of_2(max(request.lookups, 1)), K=request.top_k,
        PLACES=triton.next_power_of_2(max(request.top_k, 1)),
        PRECISION=request.precision if normed.dtype == torch.float32 else "ieee",
        EVEN=width % config.block_k == 0,
        BM=config.block_m, BN=config.block_n, BK=config.block_k, HALVES=config.halves,
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
