"""The lens of many rows by a Triton kernel, block by block, and KL(final layer || row).

Let p be the distribution of the final row and z the logits of another row: KL = sum p log p - sum p z + logsumexp(z).
The final rows are read first, and their pass keeps the softmax weights. The pass over the other rows multiplies each
logit by the weight of its token, relative to the running maximum (triton_fold.py). So KL needs no second product, and
an offset common to all logits does not reduce precision. The same code serves heads with a soft-cap. The weights take
4 bytes for each final row and token. If they exceed ``workspace_bytes``, final rows are processed in groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from xprobe_kernels.request import LensRequest
from xprobe_kernels.transfer import upload
from xprobe_kernels.triton_rows import FinalSoftmax

Fields = dict[str, Any]


class Pass(Protocol):
    """How a backend reads some rows in one pass over the vocabulary."""

    @property
    def tile(self) -> int:
        """Columns that the backend reads at a time."""

    @property
    def parts(self) -> int:
        """Number of parts into which a tile is divided."""

    def rows_per_block(self, request: LensRequest, rows: int) -> int:
        """How many of ``rows`` rows are read at a time."""

    def read(self, request: LensRequest, kept: FinalSoftmax | None, final_of: Tensor | None) -> tuple[Fields, Tensor]:
        """The fields of ``Readout`` without ``kl``, and the cross-entropy under the final rows [R] if compared.

        With ``kept`` but without ``final_of``, the rows are final rows, and the pass writes their weights to ``kept``.
        With both, each row is compared with row ``final_of`` [R] of ``kept``.
        """


class Group(NamedTuple):
    """Some final rows, and the rows that are compared with them. Rows are indices, in main memory."""

    finals: Tensor  # [P]
    own_final: Tensor  # [P] bool: whether the final row of this row is the row itself, so that its KL is 0
    others: Tensor  # [N]
    final_of: Tensor  # [N]: position of their final row in ``finals``


def groups(final_rows: Tensor, max_finals: int) -> list[Group]:
    """Splits rows into groups of at most ``max_finals`` final rows each. ``final_rows`` [R] is in main memory.

    A row that is its own final row is in ``finals`` only. Every other row is in ``others``.

    Examples
    --------
    >>> import torch
    >>> (group,) = groups(torch.tensor([2, 2, 2]), 8)
    >>> group.finals.tolist(), group.others.tolist(), group.final_of.tolist()
    ([2], [0, 1], [0, 0])
    """
    finals, final_of = torch.unique(final_rows, return_inverse=True)
    others = (final_rows != torch.arange(len(final_rows))).nonzero()[:, 0]
    own_final = final_rows[finals] == finals
    if len(finals) <= max_finals:
        return [Group(finals, own_final, others, final_of[others])]
    found = []
    for start in range(0, len(finals), max_finals):
        own = others[(final_of[others] >= start) & (final_of[others] < start + max_finals)]
        part = slice(start, start + max_finals)
        found.append(Group(finals[part], own_final[part], own, final_of[own] - start))
    return found


def readout(request: LensRequest, one_pass: Pass) -> Fields:
    """The fields of ``Readout`` of a ``dense`` request."""
    if request.final_rows is None:
        return _cat(_blocks(request, one_pass, range(request.rows))) | {"kl": None}
    tiles = -(-request.head.vocab_size // one_pass.tile)
    max_finals = max(1, min(request.workspace_bytes // 4, 2**31 - 1) // (tiles * one_pass.tile))
    parts, rows = [], []
    for group in groups(request.final_rows.cpu(), max_finals):
        kept = FinalSoftmax.empty(len(group.finals), tiles, one_pass.tile, one_pass.parts, request.hidden.device)
        fields, _ = one_pass.read(request.of_rows(_index(group.finals, request)), kept, None)
        kept.logsumexp.copy_(fields["logsumexp"])
        kept.entropy.copy_(fields["entropy"])
        fields["kl"] = torch.zeros_like(kept.entropy).where(kept.entropy.isfinite(), kept.entropy)
        parts += _blocks(request, one_pass, group.others, kept, upload(group.final_of, request.hidden.device))
        own_final = _index(group.own_final.nonzero()[:, 0], request)
        parts.append({name: None if value is None else value[own_final] for name, value in fields.items()})
        rows += [group.others, group.finals[group.own_final]]
    fields = _cat(parts)
    order = torch.cat(rows)
    if not torch.equal(order, torch.arange(len(order))):
        back = upload(order.argsort(), request.hidden.device)
        fields = {name: None if value is None else value[back] for name, value in fields.items()}
    return fields


def _blocks(
    request: LensRequest,
    one_pass: Pass,
    rows: range | Tensor,
    kept: FinalSoftmax | None = None,
    final_of: Tensor | None = None,
) -> list[Fields]:
    """The fields of ``Readout`` for these rows, block by block."""
    block = max(1, one_pass.rows_per_block(request, len(rows)))
    parts = []
    for start in range(0, max(len(rows), 1), block):
        part = slice(start, min(start + block, len(rows)))
        index = part if isinstance(rows, range) else _index(rows[part], request)
        own = None if final_of is None else final_of[part]
        fields, cross_entropy = one_pass.read(request.of_rows(index), kept, own)
        if kept is not None and own is not None:
            fields["kl"] = (cross_entropy - kept.entropy[own]).clamp(min=0)
        parts.append(fields)
    return parts


def _index(rows: Tensor, request: LensRequest) -> slice | Tensor:
    """Rows as a slice if they are consecutive, else as an index on the device. ``rows`` is in main memory."""
    if len(rows) and bool((rows.diff() == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return upload(rows, request.hidden.device)


def _cat(parts: list[Fields]) -> Fields:
    if len(parts) == 1:
        return parts[0]
    return {name: None if value is None else torch.cat([part[name] for part in parts])
            for name, value in parts[0].items()}  # fmt: skip
