"""Attention of new tokens, one for each prompt of a packed tree, on the keys and values that the tree's pass left.

A new token attends to its prompt's tokens in the tree and to the tokens generated for this prompt. The keys of the tree
are read where they lie. Segments with many tokens below them are read in one product without a mask; the rest is read
in blocks of at most ``BLOCK`` tokens with one. The parts are merged exactly (``tree_attention``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from xprobe_kernels.transfer import upload

from xprobe.capture.tree import Tree
from xprobe.capture.tree_attention import NotShareable, Rule, fused

BLOCK = 1024  # tokens


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens ``start:stop`` of the tree, and the prompts that attend to some of them.

    ``members`` are prompts by index, and ``mask`` [members, stop - start] says which of the tokens each may reach; None
    if all of them reach all. ``positions`` [stop - start] are those of the tokens in their prompts.
    """

    start: int
    stop: int
    members: tuple[int, ...]
    mask: Tensor | None
    positions: Tensor


def parts_of(tree: Tree, block: int = BLOCK) -> list[Part]:
    """The tokens of a tree that its prompts (``tree.paths``) hold, in parts.

    Examples
    --------
    >>> from xprobe.capture.tree import make_tree
    >>> tree = make_tree([(5, 6, 7, 8), (5, 6, 7, 9)], node_cost=1)
    >>> [(part.start, part.stop, part.members, part.mask is None) for part in parts_of(tree, block=2)]
    [(0, 3, (0, 1), True), (3, 5, (0, 1), False)]
    """
    ranges: list[tuple[int, int, bool]] = []  # start, stop, whether it is one shared segment
    covered = 0
    for segment in tree.segments:
        if segment.start < covered:
            continue  # a part already holds it
        leaf = segment.end == segment.stop
        if not leaf and segment.end - segment.start > block:
            ranges.append((segment.start, segment.stop, True))
            covered = segment.stop
            continue
        covered = segment.end
        if ranges and not ranges[-1][2] and covered - ranges[-1][0] <= block:
            ranges[-1] = (ranges[-1][0], covered, False)
        else:
            ranges.append((segment.start, covered, False))
    return [part for start, stop, _ in ranges if (part := _part(tree, start, stop)) is not None]


def _part(tree: Tree, start: int, stop: int) -> Part | None:
    own = [[s for s in path if start <= s.start < stop] for path in tree.paths]
    members = tuple(i for i, segments in enumerate(own) if segments)
    if not members:
        return None
    mask = torch.zeros(len(members), stop - start, dtype=torch.bool)
    for row, i in enumerate(members):
        for segment in own[i]:
            mask[row, segment.start - start : segment.stop - start] = True
    return Part(start, stop, members, None if bool(mask.all()) else mask, torch.tensor(tree.positions[start:stop]))


@dataclass(frozen=True, eq=False)
class PlacedPart:
    """A part on a device, for some of the new tokens: ``rows`` [m] by index, ``mask`` [m, stop - start] or None."""

    part: Part
    rows: Tensor
    positions: Tensor
    mask: Tensor | None


def group_heads(query: Tensor, groups: int) -> Tensor:
    """Queries [1, H, n, d] as [n, G, H / G, d]: heads that share keys are queries of one product."""
    return query[0].transpose(0, 1).reshape(query.shape[2], groups, query.shape[1] // groups, -1)


def merge_parts(
    out: Tensor,
    norms: Tensor,
    grouped: Tensor,
    kept: tuple[Tensor, Tensor],
    parts: Sequence[PlacedPart],
    positions: Tensor,
    furthest: int,
    rule: Rule,
) -> None:
    """Adds the attention of new tokens on the parts of a tree, in place.

    Parameters
    ----------
    out, norms : Tensor [n, G, H / G, d], [n, G, H / G], fp32 or wider
        The attention of the n new tokens so far, and the logarithm of its denominator.
    grouped : Tensor [n, G, H / G, d]
        Their queries (``group_heads``).
    kept : keys and values [1, G, N, d] of the tree's tokens
    parts : sequence of PlacedPart
    positions : int64 Tensor [n]
        Of the new tokens.
    furthest : int
        The largest of them; on a GPU, asking for it would wait for the device.
    rule : Rule
    """
    keys, values = kept
    groups, repeat = grouped.shape[1:3]
    for placed in parts:
        rows, span = placed.rows, slice(placed.part.start, placed.part.stop)
        some = grouped[rows].permute(1, 2, 0, 3).flatten(1, 2)[None]  # [1, G, H / G * m, d]
        if placed.mask is None and rule.plain(furthest - int(placed.part.positions.min())):
            found, norm = fused(some, keys[:, :, span], values[:, :, span], rule.scale, causal=False)
        else:
            mask = None if placed.mask is None else placed.mask.repeat(repeat, 1)
            found, norm = rule.explicit(
                some, keys[:, :, span], values[:, :, span], positions[rows].repeat(repeat), placed.positions, mask
            )
        shape = (groups, repeat, len(rows))
        found = found[0].unflatten(1, shape[1:]).permute(2, 0, 1, 3).to(out.dtype)
        norm = norm[0].reshape(shape).permute(2, 0, 1).to(out.dtype)
        before = norms[rows]
        out[rows] = torch.lerp(found, out[rows], torch.sigmoid(before - norm)[..., None])
        norms[rows] = torch.logaddexp(before, norm)


class Decoding:
    """Attention of the next tokens of P prompts; a ``PackedAttention``.

    Parameters
    ----------
    tree : Tree
        Its paths are those of the prompts.
    kept : list of (keys, values)
        Of each attention layer in order, [1, G, N, d], as ``Layout.kept`` gets them in the pass over the tree.
    lengths : sequence of int
        Tokens of each prompt.
    most : int
        Most tokens that are generated for a prompt.

    Call ``start_step`` before each pass.
    """

    def __init__(
        self, tree: Tree, kept: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int], most: int, block: int = BLOCK
    ) -> None:
        self._kept, self._lengths, self._most = kept, torch.tensor(lengths), most
        self._parts = parts_of(tree, block)
        self._generated: list[tuple[Tensor, Tensor]] = []  # keys and values [P, G, most, d] of each layer
        self._live: list[int] = []
        self._step = self._layer = -1
        self._placed = cache(self._place)

    def start_step(self, live: Sequence[int], device: torch.device) -> Tensor:
        """Begins a pass over the next token of the prompts ``live``. Returns the tokens' positions [n] on ``device``.

        A prompt that was left out once has no further tokens.
        """
        self._step, self._layer = self._step + 1, -1
        if list(live) != self._live:
            self._live = list(live)
            self._placed = cache(self._place)
        return upload(self._lengths[self._live] + self._step, device)

    def _place(self, device: torch.device) -> tuple[Tensor, list[PlacedPart]]:
        """The live prompts on a device; of each part its live members, its positions and its mask."""
        row_of = {prompt: row for row, prompt in enumerate(self._live)}
        placed = []
        for part in self._parts:
            kept = [(k, row_of[prompt]) for k, prompt in enumerate(part.members) if prompt in row_of]
            if not kept:
                continue
            rows = upload(torch.tensor([row for _, row in kept]), device)
            mask = None if part.mask is None else upload(part.mask[[k for k, _ in kept]], device)
            placed.append(PlacedPart(part, rows, upload(part.positions, device), mask))
        return upload(torch.tensor(self._live), device), placed

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule, sinks: Tensor | None) -> Tensor:
        """Attention of the new tokens [1, H, n, d] -> [1, n, H, d]; see ``PackedAttention``."""
        self._layer += 1
        if self._layer >= len(self._kept) or query.shape[2] != len(self._live):
            raise NotShareable("another number of attention layers or tokens than in the pass before")
        device, heads, groups = query.device, query.shape[1], key.shape[1]
        wide = torch.promote_types(query.dtype, torch.float32)
        live, parts = self._placed(device)
        own_keys, own_values = self._own(key[0], value[0], live)
        grouped = group_heads(query, groups)
        seen = torch.arange(self._step + 1, device=device)
        now = seen[-1:].expand(heads // groups)
        out, norms = rule.explicit(grouped, own_keys, own_values, now, seen)  # [n, G, H / G, d], [n, G, H / G]
        out, norms = out.to(wide), norms.to(wide)
        positions = upload(self._lengths[self._live], device) + self._step
        keys, values = self._kept[self._layer]
        furthest = int(self._lengths[self._live].max()) + self._step
        merge_parts(out, norms, grouped, (keys, values), parts, positions, furthest, rule)
        if sinks is not None:
            out = out * torch.sigmoid(norms - sinks.to(wide).view(groups, -1))[..., None]
        return out.flatten(1, 2)[None].to(query.dtype)

    def _own(self, key: Tensor, value: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the new keys and values [G, n, d]; returns all that were generated for the live prompts."""
        if self._layer == len(self._generated):
            sizes = [(len(self._lengths), t.shape[0], self._most, t.shape[2]) for t in (key, value)]
            self._generated.append((key.new_zeros(sizes[0]), value.new_zeros(sizes[1])))
        kept = self._generated[self._layer]
        for store, new in zip(kept, (key, value), strict=True):
            store[live, :, self._step] = new.transpose(0, 1)
        everyone = len(self._live) == len(self._lengths)
        first, second = (store[:, :, : self._step + 1] for store in kept)
        return (first, second) if everyone else (first[live], second[live])
