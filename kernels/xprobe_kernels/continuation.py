"""Tokens that continue the sequences of a packed tree: new tokens, or tokens whose states were replaced.

The tree's keys stay where its pass left them. Each continued sequence has a *tail*: a number of tokens of its own. All
tokens get a *place*: their rank depth first, if every tail stood behind the token that it continues. A token then
attends to a key exactly if ``since[key] <= place < until[key]``, with ``since`` the place of the key and ``until`` the
end of the places that continue it. So one launch computes the attention on the tree and on the tails, without a mask
and without copies of the tree's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xprobe_kernels.reach import Blocks
from xprobe_kernels.transfer import upload

FEW = 1024  # queries up to which a block holds the fewest that a product takes, so that more processors have work
FEWEST = 16


@dataclass(frozen=True, eq=False)
class Continuation:
    """Which tokens of a tree of N tokens, and of tails of M tokens, n of the tails' tokens attend to, on one device.

    Attributes
    ----------
    places, query_positions : Tensor [n], int32
        Of the tokens that attend. ``advance`` moves each of them on by one token of its tail.
    since, until, positions : Tensor [N + M], int32
        Of the keys: first those of the tree, then those of the tails.
    bounds : Tensor [Q, 4], int32
        For each block of queries, indices into ``visits``: its first entry, its first entry that needs a mask, its
        first entry of the tails, and its end.
    visits : Tensor, int32
        The blocks of keys that each block of queries visits, in the tree or in the tails.
    blocks : Blocks
        The tile sizes that ``bounds`` and ``visits`` refer to.

    Examples
    --------
    The sequences 5 6 7 and 5 6 8 share two tokens. Packed they are 5 6 7 8. Each is continued by two tokens:

    >>> import numpy as np, torch
    >>> from xprobe_kernels.continuation import Continuation
    >>> tree = np.array([4, 4, 3, 4]), np.array([0, 1, 2, 2])
    >>> found = Continuation.from_tree(*tree, [2, 3], [2, 2], [0, 2], Blocks(16, 16, 4, 1), torch.device("cpu"))
    >>> found.since.tolist(), found.until.tolist()  # places: 5 6 7 a a 8 b b
    ([0, 1, 2, 5, 3, 4, 6, 7], [8, 8, 5, 8, 5, 5, 8, 8])
    >>> found.places.tolist(), found.query_positions.tolist()
    ([3, 6], [3, 3])
    """

    places: Tensor
    query_positions: Tensor
    since: Tensor
    until: Tensor
    positions: Tensor
    bounds: Tensor
    visits: Tensor
    blocks: Blocks

    @classmethod
    def from_tree(
        cls,
        until: NDArray,
        positions: NDArray,
        ends: Sequence[int],
        lengths: Sequence[int],
        queries: Sequence[int],
        blocks: Blocks,
        device: torch.device,
    ) -> Continuation:
        """Builds it in main memory and uploads it. The host does not wait for the device.

        Parameters
        ----------
        until, positions : int array [N]
            Of the tree, as for ``Reach.from_tree``.
        ends : sequence of int [P]
            The token of the tree that each tail continues; -1 for a tail that continues none. Rising ends visit fewest
            blocks.
        lengths : sequence of int [P]
            Tokens of each tail. The keys of the tails stand one tail after the other: M in all.
        queries : sequence of int [n]
            The tokens that attend, as indices into the M tokens.
        blocks : Blocks
            ``Blocks.choose``; few queries get smaller blocks of them.
        device : torch.device

        Raises
        ------
        ValueError
            An end is no token of the tree.
        """
        until, positions = np.asarray(until, dtype=np.int64), np.asarray(positions, dtype=np.int64)
        last, counts, rows = (np.asarray(part, dtype=np.int64) for part in (ends, lengths, queries))
        if len(last) and (last.min() < -1 or last.max() >= len(until)):
            raise ValueError(f"ends must be from -1 to {len(until) - 1}, got {last.min()} to {last.max()}")
        if len(rows) <= FEW:
            blocks = replace(blocks, queries=FEWEST)
        order = np.argsort(last, kind="stable")
        before = np.concatenate([[0], counts[order].cumsum()])  # tokens of the tails that stand before, by rank
        ranks = np.empty_like(order)
        ranks[order] = np.arange(len(order))
        starts = last + 1 + before[ranks]  # place of each tail's first token
        tree = np.arange(len(until))
        tail_since = np.repeat(starts - np.concatenate([[0], counts.cumsum()[:-1]]), counts) + np.arange(counts.sum())
        tail_until = np.repeat(starts + counts, counts)
        first = np.where(last < 0, 0, positions[last] + 1)
        since = np.concatenate([tree + before[np.searchsorted(last[order], tree)], tail_since])
        ended = np.concatenate([until + before[np.searchsorted(last[order], until)], tail_until])
        every = np.concatenate([positions, tail_since + np.repeat(first - starts, counts)])
        split = len(until)
        bounds, visits = _visits(since, ended, split, tail_since[rows], tail_until[rows], blocks)
        parts = (tail_since[rows], every[split:][rows], since, ended, every, bounds.ravel(), visits)
        # one upload; each part starts at a multiple of 16 bytes, because Triton compiles anew for another alignment
        offsets = np.cumsum([0, *(-(-len(part) // 4) * 4 for part in parts)])
        together = np.zeros(offsets[-1], dtype=np.int32)
        for start, part in zip(offsets, parts, strict=False):
            together[start : start + len(part)] = part
        uploaded = upload(torch.from_numpy(together), device)
        places, own, since_, until_, all_, bounds_, visits_ = (
            uploaded[start : start + len(part)] for start, part in zip(offsets, parts, strict=False)
        )
        return cls(places, own, since_, until_, all_, bounds_.view(-1, 4), visits_, blocks)

    def advance(self) -> None:
        """Moves every query on to the next token of its tail, in place. It must not be the last one."""
        self.places.add_(1)
        self.query_positions.add_(1)


def _visits(
    since: NDArray, until: NDArray, kept: int, places: NDArray, ends: NDArray, blocks: Blocks
) -> tuple[NDArray, NDArray]:
    """``bounds`` and ``visits`` for queries at ``places``, or later in their tails, which end at ``ends``."""
    starts = np.arange(0, len(places), blocks.queries)
    lowest = np.minimum.reduceat(places, starts)[:, None]
    highest = np.maximum.reduceat(ends, starts)[:, None] - 1
    rows: list[NDArray] = []
    counts: list[NDArray] = []
    for own, part in ((False, slice(0, kept)), (True, slice(kept, None))):
        if not len(since[part]):
            counts += [np.zeros(len(starts), dtype=np.int64)] * (1 if own else 2)
            rows.append(np.zeros((len(starts), 0), dtype=np.int64))
            continue
        at = np.arange(0, len(since[part]), blocks.keys)
        nearest, last = (reduce.reduceat(since[part], at) for reduce in (np.minimum, np.maximum))
        shortest, longest = (reduce.reduceat(until[part], at) for reduce in (np.minimum, np.maximum))
        seen = (nearest <= highest) & (longest > lowest)
        full = np.minimum(at + blocks.keys, len(since[part])) - at == blocks.keys
        whole = seen & (last <= lowest) & (shortest > highest) & full & (not own)
        rows.append(np.where(whole, 0, np.where(seen, 1, 2)))
        counts += [seen.sum(1)] if own else [whole.sum(1), seen.sum(1)]
    orders = [np.argsort(kinds, axis=1, kind="stable") for kinds in rows]
    order = np.concatenate(orders, 1)
    kept_entries = np.concatenate([np.sort(kinds, axis=1) < 2 for kinds in rows], 1)
    whole_count, seen_count, own_count = counts
    last_entry = (seen_count + own_count).cumsum()
    first_entry = last_entry - seen_count - own_count
    bounds = np.stack([first_entry, first_entry + whole_count, first_entry + seen_count, last_entry], 1)
    return bounds, order[kept_entries]
