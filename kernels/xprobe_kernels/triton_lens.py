"""The fused lens: product, bias, scale, soft-cap, softmax sums, ranks and top-k in one pass over the vocabulary.

Grid: tiles of rows x parts of the vocabulary. A program walks its part tile by tile and carries the state of its rows
in registers (triton_fold.py); logits are never written. Parts are merged in fixed order (triton_rows.py): the same
bits from run to run, without locks or atomics.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xprobe_kernels import divergence
from xprobe_kernels.configs import Config, choose, choose_splits, limits_of
from xprobe_kernels.triton_fold import fold, scaled, start, store
from xprobe_kernels.triton_rows import Partials, Prepared, dense, merge, prepare
from xprobe_kernels.unembedding import Unembedding


@triton.jit
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
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LOOKUPS: tl.constexpr,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides D
    GROUP: tl.constexpr,  # row tiles that run together and share what they read of the weight
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HALVES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    row_tiles = tl.cdiv(count, BM)
    tiles = tl.cdiv(vocabulary, BN)
    group = tl.program_id(0) // (GROUP * splits)
    inner = tl.program_id(0) % (GROUP * splits)
    group_size = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + inner % group_size
    part = inner // group_size
    each = tl.cdiv(tiles, splits)
    first = part * each
    last = tl.minimum(first + each, tiles)

    offsets = row_tile * BM + tl.arange(0, BM)
    rows = tl.minimum(offsets, count - 1).to(tl.int64)
    k = tl.arange(0, BK)
    peak, total, moment, above, top, top_ids = start(vocabulary, BM, LOOKUPS, K, PLACES)
    for tile in tl.range(first, last, flatten=FLATTEN, warp_specialize=SPECIALIZE):
        columns = tile * BN + tl.arange(0, BN)
        tokens = tl.minimum(columns, vocabulary - 1).to(tl.int64)
        z = tl.zeros([BM, BN], tl.float32)
        for at in range(0, width, BK):
            if DESCRIPTORS:
                a = normed.load([row_tile * BM, at])
                b = weight.load([tile * BN, at])
            elif EVEN:
                a = tl.load(normed + rows[:, None] * width + (at + k)[None, :])
                b = tl.load(weight + tokens[:, None] * weight_stride + (at + k)[None, :])
            else:
                held = at + k < width
                a = tl.load(normed + rows[:, None] * width + (at + k)[None, :], mask=held[None, :], other=0.0)
                b = tl.load(weight + tokens[:, None] * weight_stride + (at + k)[None, :], mask=held[None, :], other=0.0)
            z = tl.dot(a, b.to(a.dtype).T, z, input_precision=PRECISION)
        if HALVES == 2:
            left, right = z.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
            columns = tile * BN + tl.arange(0, BN // 2)
            left = scaled(left, columns, bias_ptr, vocabulary, scale, HAS_BIAS)
            peak, total, moment, above, top, top_ids = fold(
                left, columns, rows, peak, total, moment, above, top, top_ids,
                tokens_ptr, thresholds_ptr, lookups, vocabulary, cap, HAS_CAP, LOOKUPS, K,
            )  # fmt: skip
            columns += BN // 2
            z = right
        z = scaled(z, columns, bias_ptr, vocabulary, scale, HAS_BIAS)
        peak, total, moment, above, top, top_ids = fold(
            z, columns, rows, peak, total, moment, above, top, top_ids,
            tokens_ptr, thresholds_ptr, lookups, vocabulary, cap, HAS_CAP, LOOKUPS, K,
        )  # fmt: skip
    store(
        peak, total, moment, above, top, top_ids, offsets.to(tl.int64), count, part, lookups,
        sums_ptr, above_ptr, top_ptr, top_ids_ptr, LOOKUPS, K, PLACES,
    )  # fmt: skip


def readout(
    hidden: Tensor,
    head: Unembedding,
    lookup: Tensor,
    top_k: int,
    final_rows: Tensor | None,
    workspace_bytes: int,
    precision: str,
    config: Config | None = None,
    splits: int | None = None,
) -> dict[str, Any]:
    """The fields of ``Readout``; arguments as ``lens`` has checked them. ``config`` and ``splits``: for tuning."""
    head, lookup = dense(head), lookup.contiguous()
    prepared = prepare(hidden, head, lookup)
    partials = launch(prepared, head, lookup, top_k, precision, config, splits)
    fields = merge(partials, prepared, head, lookup)
    fields["kl"] = None
    if final_rows is not None:
        fields["kl"] = divergence.kl(
            prepared.normed, prepared.finite.bool(), head, fields["logsumexp"], final_rows, workspace_bytes, precision
        )
    return fields


def launch(
    prepared: Prepared,
    head: Unembedding,
    lookup: Tensor,
    top_k: int,
    precision: str = "ieee",
    config: Config | None = None,
    splits: int | None = None,
) -> Partials:
    """Runs the pass over prepared rows."""
    normed = prepared.normed
    rows, width = normed.shape
    weight = head.weight
    architecture, processors = device_limits(normed.device)
    config = config or choose(architecture, normed.dtype, rows)
    row_tiles, tiles = triton.cdiv(rows, config.block_m), triton.cdiv(head.vocab_size, config.block_n)
    slots = processors * config.resident
    if splits is None:
        row_bytes = config.block_m * width * normed.itemsize
        splits = choose_splits(row_tiles, tiles, slots, row_bytes, limits_of(architecture).level2)
    partials = Partials.empty(splits, rows, lookup.shape[1], top_k, normed.device)
    if not rows:
        return partials
    operands: tuple[Any, Any] = (normed, weight)
    described = config.descriptors and _describable(normed) and _describable(weight) and normed.dtype == weight.dtype
    if described:
        operands = _descriptors(normed, weight, config)
    lens_kernel[(row_tiles * splits,)](
        *operands, weight.stride(0), head.bias, lookup, prepared.thresholds,
        partials.sums, partials.above, partials.top, partials.top_ids,
        rows, head.vocab_size, width, lookup.shape[1], splits, float(head.scale), float(head.softcap or 0.0),
        HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap is not None,
        LOOKUPS=triton.next_power_of_2(max(lookup.shape[1], 1)), K=top_k, PLACES=triton.next_power_of_2(max(top_k, 1)),
        PRECISION=precision if normed.dtype == torch.float32 else "ieee",
        EVEN=width % config.block_k == 0, GROUP=max(1, min(slots // splits, row_tiles)),
        BM=config.block_m, BN=config.block_n, BK=config.block_k, HALVES=config.halves,
        DESCRIPTORS=described, FLATTEN=config.flatten, SPECIALIZE=config.specialize,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return partials


@cache
def device_limits(device: torch.device) -> tuple[str, int]:
    """Architecture and number of multiprocessors; the interpreter has a few, so that it splits vocabularies too."""
    if device.type != "cuda":
        return "interpreter", 3
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def _describable(matrix: Tensor) -> bool:
    """Tensor descriptors want 16-byte aligned rows."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0


def _descriptors(normed: Tensor, weight: Tensor, config: Config) -> tuple[Any, Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor(normed, list(normed.shape), list(normed.stride()), [config.block_m, config.block_k]),
        TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [config.block_n, config.block_k]),
    )
