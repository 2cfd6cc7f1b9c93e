"""The k largest logits after a pass over many rows, from the largest logit of each tile.

The k largest logits of a row lie in the k tiles whose largest logits are largest: each of these tiles holds a logit
that is at least as large as any logit of another tile. Tiles with equal largest logits are
ordered by their position in the vocabulary, as tokens are. So the list is exact, ties included. The logits of these
tiles are computed again, each tile for all rows that need it together. That is k tiles for each row: about one per
cent of the work of the pass for k = 5, if there are so many rows that each tile serves some dozens of them.

Rows are sorted by tile in two launches: ``select_kernel`` counts the pairs of a row and a list that need each tile,
``order_kernel`` puts them in place. Integer counters are raised by several programs at once, so the order of the pairs
of one tile differs from run to run. The logits of a row do not depend on it, nor do the results.

Memory: R x tiles x 4 bytes for the largest logits, R x k x k x 8 bytes for the candidates, R x k x 16 for the order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xprobe_kernels.configs import MAX_BLOCK_ROWS, Config
from xprobe_kernels.request import LensRequest
from xprobe_kernels.triton_fold import INFINITY, LOWEST, NO_ID, scaled
from xprobe_kernels.triton_rows import Prepared
from xprobe_kernels.triton_support import cdiv, next_power_of_2

PAIRS = 32  # pairs that a program of order_kernel puts in place


@triton.jit(do_not_specialize=["count"])
def select_kernel(
    maxima_ptr,  # [R, tiles]
    chosen_ptr,  # [J, R] int32
    slots_ptr,  # [J, R] int32: how many pairs had been counted for that tile before this one
    sizes_ptr,  # [tiles] int32, zero at the start: pairs of each tile
    count,  # R
    tiles,
    J: tl.constexpr,
    BT: tl.constexpr,  # power of 2 that is at least the number of tiles
):
    """Writes the J tiles of one row with the largest maxima. Among equals the first tile comes first."""
    r = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BT)
    free = tile < tiles
    largest = tl.maximum(tl.load(maxima_ptr + r * tiles + tile, mask=free, other=LOWEST), LOWEST)
    for j in range(J):
        best = tl.max(tl.where(free, largest, -INFINITY), 0)
        winner = tl.min(tl.where(free & (largest == best), tile, tiles - 1), 0)
        free = free & (tile != winner)
        tl.store(chosen_ptr + j * count + r, winner)
        tl.store(slots_ptr + j * count + r, tl.atomic_add(sizes_ptr + winner, 1))


@triton.jit(do_not_specialize=["pairs"])
def order_kernel(
    chosen_ptr,
    slots_ptr,  # [J * R] int32
    sizes_ptr,  # [tiles] int32
    order_ptr,  # [J * R] int64: pairs of list and row, sorted by the tile that they need
    starts_ptr,  # [tiles] int32: where the pairs of each tile begin
    programs_ptr,  # [tiles] int32: how many programs the tiles up to and including this one take
    pairs,  # J * R
    tiles,
    BM: tl.constexpr,  # pairs of a program of tiles_kernel
    BP: tl.constexpr,  # pairs of this program
    BT: tl.constexpr,
):
    """Sorts the pairs by tile."""
    tile = tl.arange(0, BT)
    sizes = tl.load(sizes_ptr + tile, mask=tile < tiles, other=0)
    starts = tl.cumsum(sizes, 0) - sizes
    if tl.program_id(0) == 0:
        tl.store(starts_ptr + tile, starts, mask=tile < tiles)
        tl.store(programs_ptr + tile, tl.cumsum((sizes + (BM - 1)) // BM, 0), mask=tile < tiles)
    for p in range(BP):
        pair = tl.program_id(0) * BP + p
        if pair < pairs:
            start = tl.sum(tl.where(tile == tl.load(chosen_ptr + pair), starts, 0), 0)
            tl.store(order_ptr + start + tl.load(slots_ptr + pair), pair.to(tl.int64))


@triton.jit(do_not_specialize=["count"])
def tiles_kernel(
    normed_ptr,  # [R, D], contiguous
    weight_ptr,  # [V, D], rows weight_stride apart
    weight_stride,
    bias_ptr,  # [V]
    order_ptr,  # [J * R] int64: pairs of list and row, sorted by the tile that they need
    sizes_ptr,
    starts_ptr,  # [tiles] int32: how many pairs each tile has, and where they begin
    programs_ptr,  # [tiles] int32: how many programs the tiles up to and including this one take
    top_ptr,
    top_ids_ptr,  # [J, R, K]
    count,  # R
    vocabulary,  # V
    width,  # D
    tiles,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides D
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,  # power of 2 that is at least the number of tiles
):
    """Computes one tile of the vocabulary for some rows that need it, and writes the K largest logits of each."""
    program = tl.program_id(0)
    every = tl.arange(0, BT)
    programs = tl.load(programs_ptr + every, mask=every < tiles, other=NO_ID)
    tile = tl.sum((programs <= program).to(tl.int32), 0)
    if tile < tiles:
        before = tl.max(tl.where(programs <= program, programs, 0), 0)
        start = tl.load(starts_ptr + tile)
        pair = start + (program - before) * BM + tl.arange(0, BM)
        held = pair < start + tl.load(sizes_ptr + tile)
        pair = tl.load(order_ptr + pair, mask=held, other=0)
        rows = pair % count
        columns = tile * BN + tl.arange(0, BN)
        tokens = tl.minimum(columns, vocabulary - 1).to(tl.int64)
        z = tl.zeros([BM, BN], tl.float32)
        for column in range(0, width, BK):
            k = column + tl.arange(0, BK)
            left = normed_ptr + rows[:, None] * width + k[None, :]
            right = weight_ptr + tokens[:, None] * weight_stride + k[None, :]
            if EVEN:
                a, b = tl.load(left), tl.load(right)
            else:
                inside = (k < width)[None, :]
                a, b = tl.load(left, mask=inside, other=0.0), tl.load(right, mask=inside, other=0.0)
            z = tl.dot(a, b.to(a.dtype).T, z, input_precision=PRECISION)
        z = scaled(z, columns, bias_ptr, vocabulary, scale, HAS_BIAS, HAS_SCALE)
        z = tl.where((columns < vocabulary)[None, :], tl.maximum(z, LOWEST), -INFINITY)
        for k in range(K):
            best = tl.max(z, 1)
            winner = tl.min(tl.where(z == best[:, None], columns[None, :], NO_ID), 1)
            z = tl.where(columns[None, :] == winner[:, None], -INFINITY, z)
            tl.store(top_ptr + pair * K + k, best, mask=held)
            tl.store(top_ids_ptr + pair * K + k, winner, mask=held)


def largest(request: LensRequest, prepared: Prepared, maxima: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """The K largest logits of each of the J = min(K, tiles) tiles that can hold them, and their tokens [J, R, K].

    The host does not wait for the GPU. ``maxima`` [R, tiles] has the largest logit of each tile of ``config``.
    """
    head, normed, top_k = request.head, prepared.normed, request.top_k
    (rows, tiles), width, device = maxima.shape, normed.shape[1], maxima.device
    lists = min(top_k, tiles)
    pairs, places, block = lists * rows, next_power_of_2(tiles), min(config.block_m, MAX_BLOCK_ROWS)
    sizes = torch.zeros(tiles, dtype=torch.int32, device=device)
    chosen, slots = torch.empty(2, lists, rows, dtype=torch.int32, device=device)
    starts, programs = torch.empty(2, tiles, dtype=torch.int32, device=device)
    order = torch.empty(pairs, dtype=torch.int64, device=device)
    warps = min(max(places // 256, 1), 8)
    select_kernel[(rows,)](maxima, chosen, slots, sizes, rows, tiles, J=lists, BT=places, num_warps=warps)
    order_kernel[(cdiv(pairs, PAIRS),)](
        chosen, slots, sizes, order, starts, programs, pairs, tiles, BM=block, BP=PAIRS, BT=places, num_warps=warps
    )  # fmt: skip
    top = torch.empty(lists, rows, top_k, dtype=torch.float32, device=device)
    top_ids = torch.empty(lists, rows, top_k, dtype=torch.int32, device=device)
    tiles_kernel[(cdiv(pairs, block) + tiles,)](
        normed, head.weight, head.weight.stride(0), head.bias, order, sizes, starts, programs, top, top_ids,
        rows, head.vocab_size, width, tiles, float(head.scale),
        HAS_BIAS=head.bias is not None, HAS_SCALE=head.scale != 1.0, K=top_k,
        PRECISION=request.precision if normed.dtype == torch.float32 else "ieee",
        EVEN=width % config.block_k == 0, BM=block, BN=config.block_n, BK=config.block_k, BT=places,
        num_warps=config.warps, num_stages=min(config.stages, 3),
    )  # fmt: skip
    return top, top_ids
