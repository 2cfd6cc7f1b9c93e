"""KL(final layer || row) without a second set of logits.

With p the distribution of the final row and z the logits of another, KL = sum p log p - sum p z + logsumexp(z), and the
only sum over z is linear in the row: sum p z = scale * (h . (W^T p) + p . bias). So one pass over the few final rows
gives the expected unembedding W^T p, and every other row costs one dot product. A soft-cap breaks the linearity: there
the rows' logits are made once more, in a bounded workspace, tile by tile.

What the identity costs: an error that all logits of a row share (a large common bias, say) cancels in a direct sum, and
here it does not. It stays within the rounding of one logit of each of the two rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xprobe_kernels.precision import matmul_precision, product
from xprobe_kernels.transfer import upload
from xprobe_kernels.unembedding import Unembedding


def kl(
    normed: Tensor,  # [R, D] in the operands' dtype
    finite: Tensor,  # [R]
    head: Unembedding,
    logsumexp: Tensor,  # [R]
    final_rows: Tensor,  # [R], there or in main memory
    workspace_bytes: int,
    precision: str,
) -> Tensor:
    """KL(final || row) [R] in nats; NaN where one of the two rows is not finite."""
    finals, of = (upload(part, normed.device) for part in torch.unique(final_rows, return_inverse=True))
    lse = torch.where(finite, logsumexp, 0.0)
    with matmul_precision(precision):
        if head.softcap is None:
            gain, own = _expected_logits(normed, finals, of, head, lse, workspace_bytes)
        else:
            gain, own = _capped_logits(normed, finals, of, head, lse, workspace_bytes)
    divergence = ((own - lse[finals])[of] - (gain - lse)).float()
    known = finite & finite[finals][of]
    return torch.where(known, divergence.clamp(min=0), torch.full_like(divergence, float("nan")))


def _expected_logits(
    normed: Tensor, finals: Tensor, of: Tensor, head: Unembedding, lse: Tensor, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """sum_v p_final(v) z(v) of every row's logits [R] and of the final rows' own [P], by the expected unembedding."""
    rows = normed[finals]
    unembedding = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
    bias, mass = torch.zeros(2, len(finals), dtype=torch.float64, device=rows.device).unbind(0)
    lift = 1024.0 if rows.dtype == torch.float16 else 1.0  # fp16 knows no number below 6e-8, and most p are
    # fp32 sums run over this many tokens, and then on in fp64; 16-bit operands have no digits that this would save. A
    # CPU's library may add one token after the other: equal addends then all round one way, so its sums are shorter
    whole = 256 if rows.device.type == "cpu" else 1024
    step = whole if rows.dtype == torch.float32 else 16384
    step = max(1, min(step, workspace_bytes // (4 * (4 * max(len(finals), 1) + head.width))))
    for start in range(0, head.vocab_size, step):
        tokens = slice(start, start + step)
        weight = head.weight[tokens].to(rows.dtype)
        z = head.bias_and_scale(product(rows, weight), tokens)
        p = z.sub_(lse[finals, None]).exp_().mul_(lift).to(rows.dtype)
        unembedding += product(p, weight.T)
        wide = p.float()
        mass += wide.sum(-1, dtype=torch.float64)  # of the rounded p, which were summed
        if head.bias is not None:
            given = head.bias[tokens].float()
            bias += (wide * torch.where(torch.isfinite(given), given, 0.0)).sum(-1, dtype=torch.float64)
    unembedding /= mass[:, None]
    bias /= mass
    gain = torch.empty(len(normed), dtype=torch.float64, device=rows.device)
    block = max(1, workspace_bytes // (32 * head.width))
    for start in range(0, len(normed), block):
        part = slice(start, start + block)
        gain[part] = torch.linalg.vecdot(normed[part].double(), unembedding[of[part]]) + bias[of[part]]
    own = torch.linalg.vecdot(rows.double(), unembedding) + bias
    return gain * head.scale, own * head.scale


def _capped_logits(
    normed: Tensor, finals: Tensor, of: Tensor, head: Unembedding, lse: Tensor, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """The same sums with the soft-cap in z: all logits once more, a tile at a time."""
    gain = torch.zeros(len(normed), dtype=torch.float64, device=normed.device)
    own, mass = torch.zeros(2, len(finals), dtype=torch.float64, device=normed.device).unbind(0)
    step = max(1, min(8192, workspace_bytes // (12 * max(len(finals), 1)), workspace_bytes // (8 * head.width)))
    block = max(1, workspace_bytes // (16 * step))
    for start in range(0, head.vocab_size, step):
        tokens = slice(start, start + step)
        weight = head.weight[tokens].to(normed.dtype)
        z = head.cap(head.bias_and_scale(product(normed[finals], weight), tokens))
        p = (z - lse[finals, None]).exp_()
        own += torch.linalg.vecdot(p, z).double()
        mass += p.sum(-1, dtype=torch.float64)
        for begin in range(0, len(normed), block):
            part = slice(begin, begin + block)
            z = head.cap(head.bias_and_scale(product(normed[part], weight), tokens))
            gain[part] += torch.linalg.vecdot(p[of[part]], z).double()
    return gain / mass[of], own / mass
