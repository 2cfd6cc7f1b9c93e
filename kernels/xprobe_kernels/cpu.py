"""The lens tile by tile over the vocabulary, in bounded memory on any machine.

A matrix product gives a tile of raw logits. One pass of compiled code then reads the tile (``_CompiledPass``: fp32 on a
CPU with a C compiler). Everywhere else a dozen passes of plain torch read it (``_EagerPass``). ``_EagerPass`` defines
what both compute.

A tile is small enough to stay in the cache while it is read, and the next tile overwrites it. From tile to tile each
row carries a running maximum and a few sums. They are fp64 and relative to that maximum. So an offset common to all
logits does not reduce precision, and the number of rows in the call does not change a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xprobe_kernels import compiled
from xprobe_kernels.precision import cpu_product
from xprobe_kernels.request import LensRequest
from xprobe_kernels.ties import tie_threshold
from xprobe_kernels.unembedding import Unembedding

TILE = 1024  # vocabulary entries at a time
ROWS = 512  # rows at a time: a [512, 1024] fp32 tile is 2 MiB, half the memory of [512, 2048] and no slower


@dataclass
class _Tile:
    """Result of ``_Sums.add`` for the rows of a part."""

    shifted: Tensor  # z - m, [r, v]
    weights: Tensor  # e^(z - m), [r, v]
    rescale: Tensor  # factor that the earlier sums were multiplied by, [r]
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
        shift = torch.where(torch.isfinite(new), new, 0.0)  # keeps the sums at zero while all logits of a row are -inf
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
    """KL(final || row) for R rows. Carries the sum over v of e^(z_final - m_final) * (z_row - m_row)."""

    def __init__(self, final_rows: Tensor, tile: int, dtype: torch.dtype) -> None:
        self.rows, self.final_of = torch.unique(final_rows, return_inverse=True)
        self.sums = _Sums(self.rows.numel(), final_rows.device)
        self.cross = torch.zeros(final_rows.shape[0], dtype=torch.float64, device=final_rows.device)
        self.rescale = torch.zeros_like(self.sums.exp)  # factor by which the current tile rescaled the sums
        self.space = torch.empty(self.rows.numel() * tile, dtype=dtype, device=final_rows.device)

    def start_tile(self, width: int) -> None:
        """Starts a tile. The final rows are read first, part by part; ``weights`` [f, v] then holds their e^(z - m)."""
        self.before = self.sums.exp.clone()
        self.weights = self.space[: self.rows.numel() * width].view(-1, width)

    def result(self, sums: _Sums) -> Tensor:
        own = self.sums.exp_z / self.sums.exp - self.sums.exp.log()
        cross = self.cross / self.sums.exp[self.final_of] - sums.exp.log()
        return (own[self.final_of] - cross).clamp(min=0)


@dataclass
class _Carried:
    """The state of R rows after some tiles. A pass over the next tile updates it."""

    head: Unembedding
    lookup: Tensor  # [R, A]
    threshold: Tensor  # [R, A], before the soft-cap
    above: Tensor  # [R, A]
    top_logits: Tensor  # [R, k], before the soft-cap
    top_ids: Tensor  # [R, k]
    sums: _Sums
    divergence: _Divergence | None


class _EagerPass(_Carried):
    """Reads tiles [r, v] of raw logits in plain torch and overwrites them."""

    def read_finals(self, part: slice, z: Tensor, tokens: slice) -> None:
        """Reads a part of the final rows and replaces their logits ``z`` by e^(z - m)."""
        assert self.divergence is not None
        tile = self.divergence.sums.add(part, self.head.cap(self.head.bias_and_scale(z, tokens)))
        self.divergence.rescale[part] = tile.rescale
        z.copy_(tile.weights)

    def read(self, part: slice, z: Tensor, tokens: slice) -> None:
        self.head.bias_and_scale(z, tokens)
        self.above[part] += _count_above(z, self.lookup[part], self.threshold[part], tokens.start)
        if self.top_ids.shape[1]:
            _merge_top(z, tokens.start, self.top_logits[part], self.top_ids[part])
        tile, divergence = self.sums.add(part, self.head.cap(z)), self.divergence
        if divergence is not None:
            final = divergence.final_of[part]
            carried = divergence.cross[part] + tile.move * divergence.before[final]
            divergence.cross[part] = divergence.rescale[final] * carried + _weighted_sum(
                divergence.weights[final], tile.shifted
            )


class _CompiledPass(_Carried):
    """Does the same as ``_EagerPass``, in one pass of compiled code over fp32 logits in CPU memory."""

    def read_finals(self, part: slice, z: Tensor, tokens: slice) -> None:
        assert self.divergence is not None
        self._run(part, z, tokens, self.divergence.sums, rescale=self.divergence.rescale[part])

    def read(self, part: slice, z: Tensor, tokens: slice) -> None:
        fields = {name: getattr(self, name)[part] for name in ("lookup", "threshold", "above", "top_logits", "top_ids")}
        divergence = self.divergence
        if divergence is not None:
            fields |= {
                "final_of": divergence.final_of[part],
                "final_weights": divergence.weights,
                "final_rescale": divergence.rescale,
            }
            fields |= {"final_before": divergence.before, "cross": divergence.cross[part]}
        k, lookups = self.top_ids.shape[1], self.lookup.shape[1]
        self._run(part, z, tokens, self.sums, start=tokens.start, lookups=lookups, top_k=k, **fields)

    def _run(self, part: slice, z: Tensor, tokens: slice, sums: _Sums, **fields: Tensor | float) -> None:
        head, row_pass = self.head, compiled.row_pass()
        assert row_pass is not None
        bias = None if head.bias is None else head.bias[tokens].to(z.dtype).contiguous()
        fields |= {"peak": sums.peak[part], "exp": sums.exp[part], "exp_z": sums.exp_z[part]}
        compiled.run(row_pass, z, bias=bias, scale=head.scale, softcap=head.softcap, **fields)


def readout(request: LensRequest, *, eager: bool = False) -> dict[str, Any]:
    """The fields of ``Readout``, computed in fp32 (fp64 for fp64 rows). ``eager``: without compiled code."""
    hidden, head, top_k, final_rows = request.hidden, request.head, request.top_k, request.final_rows
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows, device, lookup = request.rows, hidden.device, request.lookup.contiguous()
    finals = 0 if final_rows is None else int(torch.unique(final_rows).numel())
    step, tile = _partition(head.width, finals, top_k, dtype, request.workspace_bytes)
    parts, final_parts = _parts(rows, step), _parts(finals, step)
    in_bf16 = device.type == "cpu" and hidden.dtype == head.weight.dtype == torch.bfloat16 and matrix_units()
    keep = rows * head.width * dtype.itemsize <= request.workspace_bytes // 6
    normed = _Normed(hidden, head, dtype, parts, keep=keep, rounded=in_bf16)

    looked_up, threshold = _look_up(normed, head, lookup, parts, dtype)
    use_compiled = not eager and dtype == torch.float32 and device.type == "cpu" and compiled.row_pass() is not None
    carried = (_CompiledPass if use_compiled else _EagerPass)(
        head,
        lookup,
        threshold,
        above=torch.zeros_like(lookup),
        top_logits=torch.full((rows, top_k), -torch.inf, dtype=dtype, device=device),
        top_ids=torch.full((rows, top_k), -1, dtype=torch.int64, device=device),
        sums=_Sums(rows, device),
        divergence=None if final_rows is None else _Divergence(final_rows, min(tile, head.vocab_size), dtype),
    )
    sums, divergence = carried.sums, carried.divergence
    space = torch.empty(min(rows, step) * min(tile, head.vocab_size), dtype=dtype, device=device)

    with _products("bf16" if in_bf16 else "ieee"):
        for start in range(0, head.vocab_size, tile):
            tokens = slice(start, min(start + tile, head.vocab_size))
            weight, width = head.weight[tokens].to(dtype), tokens.stop - start
            if divergence is not None:
                divergence.start_tile(width)
                for part in final_parts:
                    z = divergence.weights[part]
                    carried.read_finals(part, z.copy_(cpu_product(normed[divergence.rows[part]], weight, z)), tokens)
            for part in parts:
                z = space[: (part.stop - part.start) * width].view(-1, width)
                carried.read(part, cpu_product(normed[part], weight, z), tokens)

    finite = normed.finite
    known = (lookup >= 0) & finite[:, None]
    pair_finite = finite if final_rows is None else finite & finite[final_rows]
    top_logits, top_ids = carried.top_logits, carried.top_ids
    return {
        "logits": _blank(looked_up, known),
        "logsumexp": _blank(sums.logsumexp().to(dtype), finite),
        "rank": torch.where(known, carried.above + 1, 0),
        "entropy": _blank(sums.entropy().clamp(min=0).to(dtype), finite),
        "top_ids": torch.where(finite[:, None], top_ids, -1) if top_k else None,
        "top_logits": _blank(head.cap(top_logits), finite[:, None]) if top_k else None,
        "kl": None if divergence is None else _blank(divergence.result(sums).to(dtype), pair_finite),
    }


def readout_eager(request: LensRequest) -> dict[str, Any]:
    """``readout`` without compiled code."""
    return readout(request, eager=True)


def matrix_units() -> bool:
    """Whether the processor has units that multiply bf16 matrices (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Sets the precision of fp32 products on the CPU, whatever ``torch.set_float32_matmul_precision`` was set to.

    "ieee" keeps the operands. "bf16" rounds them, sums in fp32 and uses the processor's matrix units; rounding does
    not change operands that are bf16 numbers. The setting belongs to the process: products of other threads use it
    too while this context is active. It is changed only if it differs, and put back.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if before == precision or (before == "none" and precision == "ieee"):
        yield
        return
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def _partition(width: int, finals: int, top_k: int, dtype: torch.dtype, workspace_bytes: int) -> tuple[int, int]:
    """How many rows and vocabulary entries to take at a time, so that all temporary memory fits in the workspace."""
    size = dtype.itemsize
    share = workspace_bytes // 6
    tile = min(TILE, share // (size * width))  # the weights of a tile, converted
    if finals:
        tile = min(tile, share // (5 * size * finals))  # the final rows' logits and weights
    tile = max(tile, 1)
    bytes_per_logit = (4 + 2 * bool(finals)) * size + 40 * bool(top_k)  # copies and sorting keys
    step = min(ROWS, share // (bytes_per_logit * tile), share // (5 * size * width))
    return max(step, 1), tile


def _parts(rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class _Normed:
    """Normed rows. With ``keep`` they are computed once, otherwise at each use.

    Rows that are not finite become zeros, so that they affect no other row. bf16 rows are normed and multiplied in
    fp32. With ``rounded`` they are rounded to bf16 after the norm, as models do, so that matrix units can multiply
    them.
    """

    def __init__(
        self, hidden: Tensor, head: Unembedding, dtype: torch.dtype, parts: list[slice], *, keep: bool, rounded: bool
    ) -> None:
        self.hidden, self.head, self.dtype, self.rounded = hidden, head, dtype, rounded
        self.finite = torch.empty(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        for part in parts:
            self.finite[part] = torch.isfinite(hidden[part]).all(-1)
        self.kept: Tensor | None = None
        if keep:
            kept = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
            for part in parts:
                kept[part] = self[part]
            self.kept = kept

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if self.kept is not None:
            return self.kept[rows]
        normed = self.head.normalize(torch.where(self.finite[rows][:, None], self.hidden[rows], 0.0).to(self.dtype))
        return normed.bfloat16().to(self.dtype) if self.rounded else normed


def _look_up(
    normed: _Normed, head: Unembedding, lookup: Tensor, parts: list[slice], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Logits [R, A] of the looked-up tokens, and the thresholds [R, A] that others must exceed before the soft-cap."""
    logits = torch.empty(lookup.shape, dtype=dtype, device=lookup.device)
    threshold = torch.empty_like(logits)
    for part in parts:
        rows = normed[part]
        for a in range(lookup.shape[1]):
            tokens = lookup[part, a].clamp(min=0)
            weight = head.weight[tokens].to(dtype)
            logits[part, a] = head.bias_and_scale(torch.linalg.vecdot(rows, weight), tokens)
            threshold[part, a] = tie_threshold(rows, weight, logits[part, a], head.scale)
    return head.cap(logits), threshold


def _count_above(z: Tensor, lookup: Tensor, threshold: Tensor, start: int) -> Tensor:
    """How many tokens of the tile [r, v] exceed each threshold [r, A]. The looked-up token itself never counts."""
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


def _merge_top(z: Tensor, start: int, logits: Tensor, ids: Tensor) -> None:
    """Merges a tile [r, v] into the running top-k [r, k] in place. Largest first; lowest id first among equals."""
    k = logits.shape[1]
    filled = min(start, k)
    if filled == k:  # after the first tiles only few rows have anything to merge
        better = (z.amax(-1) > logits[:, -1]).nonzero()[:, 0]
        if not better.numel():
            return
        z, chosen = z[better], better
    else:
        chosen = torch.arange(z.shape[0], device=z.device)
    values, order = _top(z, k)
    # earlier ids are lower: they come first here, and a stable sort keeps them first
    values = torch.cat([logits[chosen, :filled], values], 1)
    tokens = torch.cat([ids[chosen, :filled], order + start], 1)
    best = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    logits[chosen, : best.shape[1]] = values.gather(1, best)
    ids[chosen, : best.shape[1]] = tokens.gather(1, best)


def _top(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (all if there are fewer) and their columns. Among equals the lowest is first."""
    if z.shape[1] <= k:
        top = z.sort(dim=-1, descending=True, stable=True)
        return top.values, top.indices
    values, order = z.topk(k + 1, -1)
    tied = (values[:, 1:] == values[:, :-1]).any(-1).nonzero()[:, 0]  # topk returns equal values in any order
    values, order = values[:, :k], order[:, :k]
    if tied.numel():
        order[tied] = z[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
        values = z.gather(1, order)
    return values, order


def _blank(values: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, values, torch.full_like(values, float("nan")))
