"""The k largest logits after a pass over many rows, from the largest logit of each tile.

The k largest logits of a row lie in the k tiles whose largest logits are largest: each of these tiles holds a logit
that is at least as large as any logit of another tile. Tiles with equal largest logits are
ordered by their position in the vocabulary, as tokens are. So the list is exact, ties included. The logits of these
tiles are computed again, each tile for all rows that need it together. That is k tiles for each row: about one per
cent of the work of the pass for k = 5.

Memory: R x tiles x 4 bytes for the largest logits, and R x k x k x 8 bytes for the candidates.
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


@triton.jit(do_not_specialize=["count"])
def select_kernel(
    maxima_ptr,  # [R, tiles]
    chosen_ptr,  # [J, R] int32
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


@triton.jit(do_not_specialize=["count"])
def tiles_kernel(
    normed_ptr,  # [R, D], contiguous
    weight_ptr,  # [V, D], rows weight_stride apart
    weight_stride,
    bias_ptr,  # [V]
    order_ptr,  # [J * R] int64: pairs of list and row, sorted by the tile that they need
    starts_ptr,  # [tiles + 1] int64: where each tile's pairs begin
    programs_ptr,  # [tiles] int64: how many programs the tiles up to and including this one take
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
    program = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, BT)
    programs = tl.load(programs_ptr + every, mask=every < tiles, other=9223372036854775807)
    tile = tl.sum((programs <= program).to(tl.int32), 0)
    if tile < tiles:
        before = tl.max(tl.where(programs <= program, programs, 0), 0)
        pair = tl.load(starts_ptr + tile) + (program - before) * BM + tl.arange(0, BM)
        held = pair < tl.load(starts_ptr + tile + 1)
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
    chosen = torch.empty(lists, rows, dtype=torch.int32, device=device)
    places = next_power_of_2(tiles)
    select_kernel[(rows,)](
        maxima, chosen, rows, tiles, J=lists, BT=places, num_warps=min(max(places // 256, 1), 8)
    )  # fmt: skip
    ordered, order = chosen.view(-1).sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(tiles + 1, dtype=torch.int32, device=device))
    block = min(config.block_m, MAX_BLOCK_ROWS)
    programs = ((starts.diff() + (block - 1)) // block).cumsum(0)
    top = torch.empty(lists, rows, top_k, dtype=torch.float32, device=device)
    top_ids = torch.empty(lists, rows, top_k, dtype=torch.int32, device=device)
    tiles_kernel[(cdiv(lists * rows, block) + tiles,)](
        normed, head.weight, head.weight.stride(0), head.bias, order, starts, programs, top, top_ids,
        rows, head.vocab_size, width, tiles, float(head.scale),
        HAS_BIAS=head.bias is not None, HAS_SCALE=head.scale != 1.0, K=top_k,
        PRECISION=request.precision if normed.dtype == torch.float32 else "ieee",
        EVEN=width % config.block_k == 0, BM=block, BN=config.block_n, BK=config.block_k, BT=places,
        num_warps=config.warps, num_stages=min(config.stages, 3),
    )  # fmt: skip
    return top, top_ids
