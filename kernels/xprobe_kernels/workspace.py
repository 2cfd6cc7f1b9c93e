"""The lens with the library's matrix product. It writes the logits of some rows to a bounded workspace and reads them
once.

This is the honest rival of the fused kernel: its product is the library's, but it writes and reads every logit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xprobe_kernels import divergence
from xprobe_kernels.precision import matmul_precision, product
from xprobe_kernels.request import LensRequest
from xprobe_kernels.triton_fold import NO_KL, Lookups, cap_kind, fold, scaled, start, store
from xprobe_kernels.triton_rows import Partials, dense, merge, prepare


@triton.jit
def row_kernel(
    products_ptr,  # [r, v] in the workspace, rows stride apart: a multiple of 16, for vectorized loads
    stride,
    bias_ptr,  # [V]
    tokens_ptr,
    thresholds_ptr,  # [R, A]
    sums_ptr,  # [S, 3, R]
    above_ptr,  # [S, R, A]
    top_ptr,
    top_ids_ptr,  # [S, R, K]
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
    BN: tl.constexpr,
):
    """Reads one row of products once, front to back."""
    row = tl.program_id(0).to(tl.int64)
    rows = (first_row + row + tl.arange(0, 1)).to(tl.int64)
    lookups_of_rows = Lookups(tokens_ptr, thresholds_ptr, lookups)
    state = start(vocabulary, cap, 1, CAP, LOOKUPS, K, PLACES)
    end = first_token + tokens
    for offset in range(0, tokens, BN):
        columns = first_token + offset + tl.arange(0, BN)
        inside = columns < end
        z = tl.load(products_ptr + row * stride + offset + tl.arange(0, BN), mask=inside, other=0.0)
        z = scaled(z[None, :], columns, bias_ptr, vocabulary, scale, HAS_BIAS, HAS_SCALE)
        state, _ = fold(z, columns, rows, state, lookups_of_rows, 0, 0, end, cap, CAP, LOOKUPS, K, NO_KL)
    store(state, rows, count, part, lookups, sums_ptr, above_ptr, top_ptr, top_ids_ptr, LOOKUPS, K, PLACES)


def readout(request: LensRequest) -> dict[str, Any]:
    """The fields of ``Readout``."""
    request = dense(request)
    prepared = prepare(request)
    head, rows, dtype = request.head, request.rows, prepared.normed.dtype
    converted = (
        4 * head.width if head.weight.dtype != dtype else 0
    )  # bytes per token to convert a weight of another dtype
    columns = max(1, min(head.vocab_size, request.workspace_bytes // (4 + converted)))
    padded = -(-columns // 16) * 16
    step = max(1, min(rows, (request.workspace_bytes - converted * columns) // (4 * padded)))
    parts = triton.cdiv(head.vocab_size, columns)
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
                    first_row, rows, first, end - first, head.vocab_size, part, request.lookups,
                    float(head.scale), float(head.softcap or 0.0),
                    HAS_BIAS=head.bias is not None, HAS_SCALE=head.scale != 1.0, CAP=cap_kind(head.softcap),
                    LOOKUPS=triton.next_power_of_2(max(request.lookups, 1)), K=request.top_k,
                    PLACES=triton.next_power_of_2(max(request.top_k, 1)),
                    BN=min(triton.next_power_of_2(end - first), 4096),
                    num_warps=8,
                )  # fmt: skip
    fields, _ = merge(request, prepared, partials)
    kl = None
    if request.final_rows is not None:
        kl = divergence.kl(request, prepared.normed, prepared.finite.bool(), fields["logsumexp"])
    return fields | {"kl": kl}
