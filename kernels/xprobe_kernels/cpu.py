"""The lens tile by tile over the vocabulary, in plain torch: bounded memory on any machine.

Each tile of logits is read while it is small and then forgotten. What is carried from tile to tile is one running
maximum and a few sums per row (in fp64), so the result does not depend on the number of rows in the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xprobe_kernels.unembedding import Unembedding

TILE = 2048  # vocabulary entries at a time
ROWS = 512  # rows at a time: a [512, 2048] fp32 tile stays near the caches
TIE_SLACK = 4.0  # a dot product of fp32 operands is off by less than this many eps * |h| * |w|


class _Sums:
    """Streaming softmax statistics of R rows: maximum m, sum of e^(z-m), sum of e^(z-m) * z, all fp64."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.peak = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self.exp = torch.zeros(rows, dtype=torch.float64, device=device)
        self.exp_z = torch.zeros_like(self.exp)

    def add(self, part: slice, z: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a tile [r, v] for rows ``part``; returns e^(z - m) and the factor that old sums were scaled by."""
        old = self.peak[part]
        new = torch.maximum(old, z.amax(-1).double())
        shift = torch.where(torch.isfinite(new), new, 0.0)  # a row of -inf so far: keep its sums at zero
        weights = (z - shift.to(z.dtype)[:, None]).exp_()
        rescale = torch.where(torch.isfinite(old), (old - shift).exp(), 0.0)
        self.peak[part] = new
        self.exp[part] = self.exp[part] * rescale + weights.sum(-1, dtype=torch.float64)
        self.exp_z[part] = self.exp_z[part] * rescale + _weighted_sum(weights, z)
        return weights, rescale

    def logsumexp(self) -> Tensor:
        return self.peak + self.exp.log()

    def mean(self) -> Tensor:
        """Expected logit under the row's own distribution."""
        return self.exp_z / self.exp


def readout(
    hidden: Tensor,
    head: Unembedding,
    lookup: Tensor,
    top_k: int,
    final_rows: Tensor | None,
    workspace_bytes: int,
) -> dict[str, Any]:
    """The fields of ``Readout``; arguments as ``lens`` has checked them. Arithmetic in fp32, in fp64 for fp64 rows."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows, device = hidden.shape[0], hidden.device
    finite = torch.isfinite(hidden).all(-1)
    normed = head.normalize(torch.where(finite[:, None], hidden, 0.0).to(dtype))
    parts, tile = _partition(rows, dtype, workspace_bytes)

    looked_up, threshold = _look_up(normed, head, lookup, parts)
    above = torch.zeros_like(lookup)
    sums = _Sums(rows, device)
    best: tuple[Tensor, Tensor] | None = None
    finals, final_of = (None, None) if final_rows is None else torch.unique(final_rows, return_inverse=True)
    final_sums = None if finals is None else _Sums(finals.numel(), device)
    final_mean = torch.zeros(rows, dtype=torch.float64, device=device)  # sum over v of e^(z_final - m) * z_row

    for start in range(0, head.vocab_size, tile):
        tokens = slice(start, min(start + tile, head.vocab_size))
        weight = head.weight[tokens].to(dtype)
        tops = []
        final_weights = final_rescale = None
        if finals is not None and final_sums is not None:
            z = head.finish(normed[finals] @ weight.T, tokens)
            final_weights, final_rescale = final_sums.add(slice(None), z)
        for part in parts:
            z = head.finish(normed[part] @ weight.T, tokens)
            sums.add(part, z)
            above[part] += _count_above(z, lookup[part], threshold[part], start)
            if top_k:
                tops.append(_top(z, start, top_k))
            if final_weights is not None and final_rescale is not None and final_of is not None:
                of = final_of[part]
                final_mean[part] = final_mean[part] * final_rescale[of] + _weighted_sum(final_weights[of], z)
        if top_k:
            found = torch.cat([values for values, _ in tops]), torch.cat([ids for _, ids in tops])
            best = found if best is None else _merge_tops(best, found, top_k)

    logsumexp = sums.logsumexp()
    kl = None
    if final_sums is not None and final_of is not None and final_rows is not None:
        negative_entropy = (final_sums.mean() - final_sums.logsumexp())[final_of]
        cross = final_mean / final_sums.exp[final_of] - logsumexp
        kl = _blank((negative_entropy - cross).clamp(min=0).to(dtype), finite & finite[final_rows])
    known = (lookup >= 0) & finite[:, None]
    return {
        "logits": _blank(looked_up, known),
        "logsumexp": _blank(logsumexp.to(dtype), finite),
        "rank": torch.where(known, above + 1, 0),
        "entropy": _blank((logsumexp - sums.mean()).clamp(min=0).to(dtype), finite),
        "top_ids": None if best is None else torch.where(finite[:, None], best[1], -1),
        "top_logits": None if best is None else _blank(best[0], finite[:, None]),
        "kl": kl,
    }


def _partition(rows: int, dtype: torch.dtype, workspace_bytes: int) -> tuple[list[slice], int]:
    """Row chunks and a vocabulary tile such that about six [chunk, tile] temporaries fit the workspace."""
    room = workspace_bytes // (6 * dtype.itemsize)
    tile = min(TILE, room)
    step = max(1, min(ROWS, room // tile))
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)], tile


def _look_up(normed: Tensor, head: Unembedding, lookup: Tensor, parts: list[slice]) -> tuple[Tensor, Tensor]:
    """Logits [R, A] of the looked-up tokens, and the value that another token's logit must exceed to rank above."""
    looked_up = torch.empty(lookup.shape, dtype=normed.dtype, device=normed.device)
    slack = torch.empty_like(looked_up)
    rounding = TIE_SLACK * torch.finfo(normed.dtype).eps * abs(head.scale)
    for part in parts:
        size = normed[part].norm(dim=-1)
        for a in range(lookup.shape[1]):
            tokens = lookup[part, a].clamp(min=0)
            weight = head.weight[tokens].to(normed.dtype)
            looked_up[part, a] = head.finish(torch.linalg.vecdot(normed[part], weight)[None], tokens)[0]
            slack[part, a] = rounding * size * weight.norm(dim=-1)
    return looked_up, looked_up + slack


def _count_above(z: Tensor, lookup: Tensor, threshold: Tensor, start: int) -> Tensor:
    """How many tokens of the tile [r, v] exceed each threshold [r, A]; the looked-up token itself never counts."""
    counts = [torch.count_nonzero(z > threshold[:, a, None], -1) for a in range(lookup.shape[1])]
    above = torch.stack(counts, 1) if counts else torch.zeros_like(lookup)
    inside = (lookup >= start) & (lookup < start + z.shape[1])
    itself = z.gather(1, torch.where(inside, lookup - start, 0)) > threshold
    return above - (itself & inside).long()


def _weighted_sum(weights: Tensor, z: Tensor) -> Tensor:
    """Sum of weights * z along the vocabulary in fp64; 0 * -inf counts as 0."""
    total = torch.linalg.vecdot(weights, z)
    broken = torch.isnan(total)
    if bool(broken.any()):
        masked = torch.where(weights[broken] > 0, z[broken], 0.0)
        total[broken] = torch.linalg.vecdot(weights[broken], masked)
    return total.double()


def _top(z: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of a tile [r, v] with their token ids, largest first, the lowest id first among equals."""
    if z.shape[1] > 4 * k and z.dtype == torch.float32:
        # one sortable integer per entry: order-preserving bits of the value above, inverted column below
        bits = (z + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0
        ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
        columns = torch.arange(z.shape[1] - 1, -1, -1, device=z.device)
        order = z.shape[1] - 1 - ((ordered << 32) + columns).topk(k, -1).values.bitwise_and(0xFFFFFFFF)
    else:
        order = z.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return z.gather(1, order), order + start


def _merge_tops(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    values, ids = torch.cat([old[0], new[0]], 1), torch.cat([old[1], new[1]], 1)
    order = values.sort(dim=-1, descending=True, stable=True).indices[
        :, :k
    ]  # old ids are lower: stable keeps them first
    return values.gather(1, order), ids.gather(1, order)


def _blank(values: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, values, torch.full_like(values, float("nan")))
