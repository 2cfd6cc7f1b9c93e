"""KL(final layer || row) without a second set of logits.

Let p be the distribution of the final row and z the logits of another row. Then KL = sum p log p - sum p z +
logsumexp(z). The sum over z is linear in the row: sum p z = scale * (h . (W^T p) + p . bias). So one pass over the few
final rows gives the expected unembedding W^T p, and each other row costs one dot product. A soft-cap breaks the
linearity. The logits are then computed once more, tile by tile in a bounded workspace.

The identity has a cost. An error that all logits of a row share, for example from a large common bias, cancels in a
direct sum but not here. It stays within the rounding error of one logit in each of the two rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xprobe_kernels.precision import matmul_precision, product
from xprobe_kernels.request import LensRequest
from xprobe_kernels.transfer import upload


class Group(NamedTuple):
    """Some final rows, and the rows that are compared with them; rows by their index, in main memory."""

    finals: Tensor  # [P]
    alone: Tensor  # [P] bool: final rows that are compared with no other row
    others: Tensor  # [N]
    final_of: Tensor  # [N]: place of their final row in ``finals``


def groups(final_rows: Tensor, most: int) -> list[Group]:
    """Splits rows into groups of at most ``most`` final rows each. ``final_rows`` [R] is in main memory.

    Each row is in ``others``, or in ``finals`` and alone.

    Examples
    --------
    >>> import torch
    >>> (group,) = groups(torch.tensor([2, 2, 2]), 8)
    >>> group.finals.tolist(), group.others.tolist(), group.final_of.tolist()
    ([2], [0, 1], [0, 0])
    """
    finals, final_of = torch.unique(final_rows, return_inverse=True)
    others = (final_rows != torch.arange(len(final_rows))).nonzero()[:, 0]
    alone = final_rows[finals] == finals
    if len(finals) <= most:
        return [Group(finals, alone, others, final_of[others])]
    found = []
    for start in range(0, len(finals), most):
        own = others[(final_of[others] >= start) & (final_of[others] < start + most)]
        part = slice(start, start + most)
        found.append(Group(finals[part], alone[part], own, final_of[own] - start))
    return found


def kl(
    request: LensRequest,  # with final_rows [R], on the device or in main memory
    normed: Tensor,  # [R, D] in the operands' dtype
    finite: Tensor,  # [R] bool
    logsumexp: Tensor,  # [R]
) -> Tensor:
    """KL(final || row) [R] in nats; NaN where one of the two rows is not finite."""
    assert request.final_rows is not None
    # final_of [R]: for each row, which of the P distinct final rows belongs to it
    finals, final_of = (upload(part, normed.device) for part in torch.unique(request.final_rows, return_inverse=True))
    lse = torch.where(finite, logsumexp, 0.0)
    expected_logits = _expected_logits if request.head.softcap is None else _expected_logits_with_cap
    with matmul_precision(request.precision):
        expected, own = expected_logits(request, normed, finals, final_of, lse)
    divergence = ((own - lse[finals])[final_of] - (expected - lse)).float()
    known = finite & finite[finals][final_of]
    return torch.where(known, divergence.clamp(min=0), torch.full_like(divergence, float("nan")))


def _expected_logits(
    request: LensRequest, normed: Tensor, finals: Tensor, final_of: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """sum_v p_final(v) z(v) for each row [R] and for the final rows themselves [P], by the expected unembedding."""
    head, workspace_bytes = request.head, request.workspace_bytes
    rows = normed[finals]
    unembedding = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
    bias, mass = torch.zeros(2, len(finals), dtype=torch.float64, device=rows.device).unbind(0)
    lift = 1024.0 if rows.dtype == torch.float16 else 1.0  # most p are below 6e-8, the smallest number of fp16
    # An fp32 sum covers `step` tokens; these sums are added in fp64. 16-bit operands have no digits to lose here, so
    # their sums are longer. A CPU library may add token by token, and equal addends then all round in one direction:
    # its sums are the shortest.
    fp32_step = 256 if rows.device.type == "cpu" else 1024
    step = fp32_step if rows.dtype == torch.float32 else 16384
    step = max(1, min(step, workspace_bytes // (4 * (4 * max(len(finals), 1) + head.width))))
    step = step // 64 * 64 or step  # products of unaligned operands are slow on a GPU
    for start in range(0, head.vocab_size, step):
        tokens = slice(start, start + step)
        weight = head.weight[tokens].to(rows.dtype)
        z = head.bias_and_scale(product(rows, weight), tokens)
        p = z.sub_(lse[finals, None]).exp_().mul_(lift).to(rows.dtype)
        unembedding += product(p, weight.T)
        wide = p.float()
        mass += wide.sum(-1, dtype=torch.float64)  # the rounded p are summed, so they are what we divide by
        if head.bias is not None:
            given = head.bias[tokens].float()
            bias += (wide * torch.where(torch.isfinite(given), given, 0.0)).sum(-1, dtype=torch.float64)
    unembedding /= mass[:, None]
    bias /= mass
    expected = torch.empty(len(normed), dtype=torch.float64, device=rows.device)
    block = max(1, workspace_bytes // (32 * head.width))
    for start in range(0, len(normed), block):
        part = slice(start, start + block)
        final = final_of[part]
        expected[part] = torch.linalg.vecdot(normed[part].double(), unembedding[final]) + bias[final]
    own = torch.linalg.vecdot(rows.double(), unembedding) + bias
    return expected * head.scale, own * head.scale


def _expected_logits_with_cap(
    request: LensRequest, normed: Tensor, finals: Tensor, final_of: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The same sums with the soft-cap in z: all logits are computed once more, tile by tile."""
    head, workspace_bytes = request.head, request.workspace_bytes
    expected = torch.zeros(len(normed), dtype=torch.float64, device=normed.device)
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
            expected[part] += torch.linalg.vecdot(p[final_of[part]], z).double()
    return expected / mass[final_of], own / mass
