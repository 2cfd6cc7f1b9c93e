"""The lens with the library's matrix product. It writes the logits of some rows to a bounded workspace and reads them
once.

It is the fair baseline of the fused kernel: its product is the library's, but it writes and reads every logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xprobe_kernels import divergence
from xprobe_kernels.precision import matmul_precision, product
from xprobe_kernels.request import LensRequest
from xprobe_kernels.triton_fold import Lookups, cap_kind, finals_of, fold, kl_kind, scaled, start, store
from xprobe_kernels.triton_rows import FinalSoftmax, Partials, dense, merge, prepare
from xprobe_kernels.triton_support import cdiv, next_power_of_2


@triton.jit
def row_kernel(
    products_ptr,  # [r, v] in the workspace, rows stride apart: a multiple of 16, for vectorized loads
    stride,
    bias_ptr,  # [V]
    tokens_ptr,
    thresholds_ptr,  # [R, A]
    sums_ptr,  # [S, 5, R]
    above_ptr,  # [S, R, A]
    top_ptr,
    top_ids_ptr,  # [S, R, K]
    weights_ptr,  # [P, columns]: see Finals
    peaks_ptr,
    masses_ptr,  # [P, parts]
    final_of_ptr,  # [R] int64: the final row of each row
    final_logsumexp_ptr,  # [P]
    first_row,
    count,  # R
    first_token,
    tokens,  # v
    vocabulary,  # V
    part,
    lookups,  # A
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CAP: tl.constexpr,
    LOOKUPS: tl.constexpr,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    KL: tl.constexpr,
    BN: tl.constexpr,
):
    """Reads one row of products once, front to back."""
    row = tl.program_id(0).to(tl.int64)
    rows = (first_row + row + tl.arange(0, 1)).to(tl.int64)
    lookups_of_rows = Lookups(tokens_ptr, thresholds_ptr, lookups)
    state = start(vocabulary, cap, 1, CAP, LOOKUPS, K, PLACES)
    end = first_token + tokens
    tiles = tl.cdiv(vocabulary, BN)
    finals = finals_of(
        rows, rows < count, weights_ptr, tiles * BN, peaks_ptr, masses_ptr, tiles, final_of_ptr, final_logsumexp_ptr, KL
    )
    for offset in range(0, tokens, BN):
        columns = first_token + offset + tl.arange(0, BN)
        inside = columns < end
        z = tl.load(products_ptr + row * stride + offset + tl.arange(0, BN), mask=inside, other=0.0)
        z = scaled(z[None, :], columns, bias_ptr, vocabulary, scale, HAS_BIAS, HAS_SCALE)
        state, _ = fold(
            z,
            first_token + offset,
            rows,
            state,
            lookups_of_rows,
            finals,
            (first_token + offset) // BN,
            end,
            cap,
            CAP,
            LOOKUPS,
            K,
            KL,
        )
    store(state, rows, count, part, lookups, sums_ptr, above_ptr, top_ptr, top_ids_ptr, LOOKUPS, K, PLACES)


def readout(request: LensRequest) -> dict[str, Any]:
    """The fields of ``Readout``."""
    request = dense(request)
    return divergence.readout(request, WorkspacePass(min(next_power_of_2(request.head.vocab_size), 4096)))


@dataclass(frozen=True)
class WorkspacePass:
    """The library's product into the workspace, and a kernel that reads it row by row, ``tile`` columns at a time."""

    tile: int
    parts: int = 1

    def rows_per_block(self, request: LensRequest, rows: int) -> int:
        """All rows: the workspace limits their memory."""
        return rows

    def read(
        self, request: LensRequest, kept: FinalSoftmax | None, final_of: Tensor | None
    ) -> tuple[dict[str, Any], Tensor]:
        """Some rows, in pieces of the workspace's size."""
        prepared = prepare(request)
        head, rows, dtype = request.head, request.rows, prepared.normed.dtype
        converted = 4 * head.width if head.weight.dtype != dtype else 0  # bytes per token to convert the weight
        columns = max(1, min(head.vocab_size, request.workspace_bytes // (4 + converted)))
        columns = max(columns // self.tile, 1) * self.tile  # whole tiles, because ``kept`` is by tile
        padded = min(columns, -(-head.vocab_size // 16) * 16)
        step = max(1, min(rows, (request.workspace_bytes - converted * padded) // (4 * padded)))
        parts = cdiv(head.vocab_size, columns)
        partials = Partials.empty(parts, request, request.top_k)
        logits = torch.empty(step * padded, dtype=torch.float32, device=request.hidden.device)
        with matmul_precision(request.precision):
            for part in range(parts):
                first, end = part * columns, min((part + 1) * columns, head.vocab_size)
                weight = head.weight[first:end].to(dtype)
                for first_row in range(0, rows, step):
                    some = prepared.normed[first_row : first_row + step]
                    out = logits[: len(some) * padded].view(len(some), padded)[:, : end - first]
                    row_kernel[(len(some),)](
                        product(some, weight, out=out), padded, head.bias, request.lookup, prepared.thresholds,
                        partials.sums, partials.above, partials.top, partials.top_ids,
                        *FinalSoftmax.operands(kept, partials.sums),
                        final_of, None if final_of is None or kept is None else kept.logsumexp,
                        first_row, rows, first, end - first, head.vocab_size, part, request.lookups,
                        float(head.scale), float(head.softcap or 0.0),
                        HAS_BIAS=head.bias is not None, HAS_SCALE=head.scale != 1.0, CAP=cap_kind(head.softcap),
                        LOOKUPS=next_power_of_2(max(request.lookups, 1)), K=request.top_k,
                        PLACES=next_power_of_2(max(request.top_k, 1)), KL=kl_kind(kept, final_of),
                        BN=self.tile, num_warps=8,
                    )  # fmt: skip
        return merge(request, prepared, partials, compared=final_of is not None)
