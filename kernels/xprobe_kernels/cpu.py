"""The lens tile by tile over the vocabulary, in plain torch: bounded memory on any machine.

Each tile of logits is read while it is small and then forgotten. What is carried from tile to tile is a running
maximum and a few sums per row, in fp64 and relative to that maximum, so that neither the number of rows in the call
nor an offset common to all logits costs digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xprobe_kernels.reference import tie_threshold
from xprobe_kernels.unembedding import Unembedding

TILE = 2048  # vocabulary entries at a time
ROWS = 512  # rows at a time: a [512, 2048] fp32 tile stays near the caches


@dataclass
class _Tile:
    """What adding a tile gives back for the rows of a part."""

    shifted: Tensor  # z - m, [r, v]
    weights: Tensor  # e^(z - m), [r, v]
    rescale: Tensor  # what the sums so far were multiplied by, [r]
    move: Tensor  # old m - new m, [r]


class _Sums:
    """Streaming softmax statistics of R rows: maximum m, sum of e^(z-m), sum of e^(z-m) * (z-m), all fp64."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.peak = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self.exp = torch.zeros(rows, dtype=torch.float64, device=device)
        self.exp_z = torch.zeros_like(self.exp)

    def add(self, part: slice, z: Tensor) -> _Tile:
        """Adds a tile [r, v] to the rows of ``part``; changes ``z`` in place."""
        old = self.peak[part]
        new = torch.maximum(old, z.amax(-1).double())
        shift = torch.where(torch.isfinite(new), new, 0.0)  # a row of -inf so far: keep its sums at zero
        move = torch.where(torch.isfinite(old), old - shift, 0.0)
        rescale = torch.where(torch.isfinite(old), move.exp(), 0.0)
        shifted = z.sub_(shift.to(z.dtype)[:, None])
        weights = shifted.exp()
        self.exp_z[part] = rescale * (self.exp_z[part] + move * self.exp[part]) + _weighted_sum(weights, shifted)
        self.exp[part] = rescale * self.exp[part] + weights.sum(-1, dtype=torch.float64)
        self.peak[part] = new
        return _Tile(shifted, weights, rescale, move)

    def logsumexp(self) -> Tensor:
        return self.peak + self.exp.log()

    def entropy(self) -> Tensor:
        return self.exp.log() - self.exp_z / self.exp


class _Divergence:
    """KL(final || row) for R rows: carries sum over v of e^(z_final - m_final) * (z_row - m_row)."""

    def __init__(self, final_rows: Tensor) -> None:
        self.rows, self.of = torch.unique(final_rows, return_inverse=True)
        self.sums = _Sums(self.rows.numel(), final_rows.device)
        self.cross = torch.zeros(final_rows.shape[0], dtype=torch.float64, device=final_rows.device)

    def start_tile(self, projections: list[tuple[slice, Tensor]]) -> None:
        """Reads the final rows' tile, part by part, before any row is read against it."""
        self.before = self.sums.exp.clone()
        tiles = [self.sums.add(part, z) for part, z in projections]
        self.weights = torch.cat([tile.weights for tile in tiles])
        self.rescale = torch.cat([tile.rescale for tile in tiles])

    def add(self, part: slice, tile: _Tile) -> None:
        of = self.of[part]
        carried = self.cross[part] + tile.move * self.before[of]
        self.cross[part] = self.rescale[of] * carried + _weighted_sum(self.weights[of], tile.shifted)

    def result(self, sums: _Sums) -> Tensor:
        own = self.sums.exp_z / self.sums.exp - self.sums.exp.log()
        cross = self.cross / self.sums.exp[self.of] - sums.exp.log()
        return (own[self.of] - cross).clamp(min=0)


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
    sums = _Sums(rows, device)
    divergence = None if final_rows is None else _Divergence(final_rows)
    finals = 0 if divergence is None else divergence.rows.numel()
    step, tile = _partition(head.width, finals, top_k, dtype, workspace_bytes)
    parts, final_parts = _parts(rows, step), _parts(finals, step)

    finite = torch.cat([torch.isfinite(hidden[part]).all(-1) for part in parts]) if parts else lookup.new_ones(0).bool()
    looked_up, threshold = _look_up(hidden, finite, head, lookup, parts, dtype)
    above = torch.zeros_like(lookup)
    top_logits = torch.full((rows, top_k), -torch.inf, dtype=dtype, device=device)
    top_ids = torch.full((rows, top_k), -1, dtype=torch.int64, device=device)

    for start in range(0, head.vocab_size, tile):
        tokens = slice(start, min(start + tile, head.vocab_size))
        weight = head.weight[tokens].to(dtype)
        if divergence is not None and finals:
            picked = ((part, divergence.rows[part]) for part in final_parts)
            divergence.start_tile([
                (part, head.cap(head.bias_and_scale(_normed(hidden[at], finite[at], head, dtype) @ weight.T, tokens)))
                for part, at in picked
            ])  # fmt: skip
        for part in parts:
            z = head.bias_and_scale(_normed(hidden[part], finite[part], head, dtype) @ weight.T, tokens)
            above[part] += _count_above(z, lookup[part], threshold[part], start)
            if top_k:
                _merge_top(z, start, top_logits[part], top_ids[part], fresh=start == 0)
            added = sums.add(part, head.cap(z))
            if divergence is not None:
                divergence.add(part, added)

    known = (lookup >= 0) & finite[:, None]
    both = finite if final_rows is None else finite & finite[final_rows]
    return {
        "logits": _blank(looked_up, known),
        "logsumexp": _blank(sums.logsumexp().to(dtype), finite),
        "rank": torch.where(known, above + 1, 0),
        "entropy": _blank(sums.entropy().clamp(min=0).to(dtype), finite),
        "top_ids": torch.where(finite[:, None], top_ids, -1) if top_k else None,
        "top_logits": _blank(head.cap(top_logits), finite[:, None]) if top_k else None,
        "kl": None if divergence is None else _blank(divergence.result(sums).to(dtype), both),
    }


def _partition(width: int, finals: int, top_k: int, dtype: torch.dtype, workspace_bytes: int) -> tuple[int, int]:
    """Rows and vocabulary entries at a time, so that everything temporary fits the workspace."""
    size = dtype.itemsize
    share = workspace_bytes // 6
    tile = min(TILE, share // (size * width))  # the weights of a tile, converted
    if finals:
        tile = min(tile, share // (5 * size * finals))  # the final rows' logits and weights
    tile = max(tile, 1)
    cell = (4 + 2 * bool(finals)) * size + 40 * bool(top_k)  # bytes per logit: copies of it, sortable keys
    step = min(ROWS, share // (cell * tile), share // (5 * size * width))
    return max(step, 1), tile


def _parts(rows: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def _normed(hidden: Tensor, finite: Tensor, head: Unembedding, dtype: torch.dtype) -> Tensor:
    """Normed rows; rows that are not finite become zeros, so that nothing of them spreads."""
    return head.normalize(torch.where(finite[:, None], hidden, 0.0).to(dtype))


def _look_up(
    hidden: Tensor, finite: Tensor, head: Unembedding, lookup: Tensor, parts: list[slice], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Logits [R, A] of the looked-up tokens, and the value (before the soft-cap) that others must exceed."""
    logits = torch.empty(lookup.shape, dtype=dtype, device=hidden.device)
    threshold = torch.empty_like(logits)
    for part in parts:
        normed = _normed(hidden[part], finite[part], head, dtype)
        for a in range(lookup.shape[1]):
            tokens = lookup[part, a].clamp(min=0)
            weight = head.weight[tokens].to(dtype)
            logits[part, a] = head.bias_and_scale(torch.linalg.vecdot(normed, weight), tokens)
            threshold[part, a] = tie_threshold(normed, weight, logits[part, a], head.scale)
    return head.cap(logits), threshold


def _count_above(z: Tensor, lookup: Tensor, threshold: Tensor, start: int) -> Tensor:
    """How many tokens of the tile [r, v] exceed each threshold [r, A]; the looked-up token itself never counts."""
    above = torch.empty_like(lookup)
    for a in range(lookup.shape[1]):
        above[:, a] = torch.count_nonzero(z > threshold[:, a, None], -1)
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


def _merge_top(z: Tensor, start: int, logits: Tensor, ids: Tensor, *, fresh: bool) -> None:
    """Merges a tile [r, v] into the running top-k [r, k], in place: largest first, the lowest id first among equals."""
    k = logits.shape[1]
    if z.shape[1] > 4 * k and z.dtype == torch.float32:
        # one sortable integer per entry: order-preserving bits of the value above, inverted column below
        bits = z.view(torch.int32).long()
        ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))  # -0.0 becomes 0, as 0.0 is
        columns = torch.arange(z.shape[1] - 1, -1, -1, device=z.device)
        order = z.shape[1] - 1 - ((ordered << 32) + columns).topk(k, -1).values.bitwise_and(0xFFFFFFFF)
    else:
        order = z.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    values, found = z.gather(1, order), order + start
    if not fresh:  # the ids so far are lower: first, and a stable sort keeps them first
        values, found = torch.cat([logits, values], 1), torch.cat([ids, found], 1)
        best = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        values, found = values.gather(1, best), found.gather(1, best)
    logits[:, : values.shape[1]] = values
    ids[:, : values.shape[1]] = found


def _blank(values: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, values, torch.full_like(values, float("nan")))
