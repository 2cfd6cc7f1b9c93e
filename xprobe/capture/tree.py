"""Packs prompts with common beginnings into one sequence: every shared token once, no padding.

The prompts of a pass form a trie over token ids. The *segments* of the packed sequence are the edges of the trie, in
depth-first order. A token that several prompts share occurs once. A token may attend to its own segment up to itself,
and to the segments above it in the trie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

# A shared segment costs one more attention call per layer, so it must save more tokens than this
NODE_COST = 8


@dataclass(frozen=True)
class Segment:
    """Tokens ``start:stop`` of the packed sequence. The tokens below it in the trie follow, up to ``end``.

    ``depth`` is the position of its first token in the prompts.

    Examples
    --------
    >>> Segment(start=3, stop=7, end=12, depth=0).length
    4
    """

    start: int
    stop: int
    end: int
    depth: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Tree:
    """A packed sequence of N tokens.

    Attributes
    ----------
    ids, positions : tuple of int [N]
        Token ids, and the position of each token in its prompts.
    segments : tuple of Segment
        In packed order: a segment stands before the segments below it.
    paths : tuple of tuple of Segment
        For every sequence given to ``make_tree``, its segments from beginning to end.

    Examples
    --------
    >>> tree = make_tree([(5, 6, 7, 8), (5, 6, 7, 9)], node_cost=1)
    >>> tree.ids, tree.positions
    ((5, 6, 7, 8, 9), (0, 1, 2, 3, 3))
    >>> tree.index(1, 3), tree.pieces(1, 2, 4)
    (4, [(2, 3), (4, 5)])
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    segments: tuple[Segment, ...]
    paths: tuple[tuple[Segment, ...], ...]

    def padded(self, multiple: int) -> Tree:
        """The tree with unread tokens added at its end, so that N is a multiple of ``multiple``.

        Libraries compile and keep code for every N, so few different N save memory.
        """
        missing = -len(self.ids) % multiple
        if not missing:
            return self
        start, stop = len(self.ids), len(self.ids) + missing
        padding = Segment(start, stop, stop, 0)
        zeros = [0] * missing
        return Tree((*self.ids, *zeros), (*self.positions, *zeros), (*self.segments, padding), self.paths)

    def index(self, sequence: int, position: int) -> int:
        """Index in the packed sequence of the token at ``position`` of a sequence."""
        for segment in self.paths[sequence]:
            if position < segment.depth + segment.length:
                return segment.start + position - segment.depth
        raise IndexError(f"sequence {sequence} has no position {position}")

    def pieces(self, sequence: int, start: int, stop: int) -> list[tuple[int, int]]:
        """The ranges of the packed sequence that hold the positions ``start:stop`` of a sequence."""
        ranges = []
        for segment in self.paths[sequence]:
            first, last = max(start, segment.depth), min(stop, segment.depth + segment.length)
            if first < last:
                ranges.append((segment.start + first - segment.depth, segment.start + last - segment.depth))
        return ranges


def make_tree(sequences: Sequence[Sequence[int]], node_cost: int = NODE_COST) -> Tree:
    """Packs token sequences. A beginning is shared if that saves more than ``node_cost`` tokens.

    Examples
    --------
    >>> page = tuple(range(10, 30))
    >>> make_tree([(*page, 5), (*page, 6)]).ids[-3:]
    (29, 5, 6)
    """
    builder = _Builder(sequences, node_cost)
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    builder.add(order, 0, ())
    return builder.finished()


def packed_lengths(sequences: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens each of the *sorted* ``sequences`` adds to the trie of the sequences before it.

    Examples
    --------
    >>> packed_lengths([(5, 6, 7), (5, 6, 8), (9,)])
    [3, 1, 1]
    """
    lengths: list[int] = []
    for index, sequence in enumerate(sequences):
        lengths.append(len(sequence) - (common_length(sequences[index - 1], sequence) if index else 0))
    return lengths


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning.

    Examples
    --------
    >>> common_length((5, 6, 7), (5, 6, 8, 9))
    2
    """
    low, high = 0, min(len(one), len(other))
    while low < high:  # binary search: comparing slices is fast
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class _Builder:
    def __init__(self, sequences: Sequence[Sequence[int]], node_cost: int) -> None:
        self.sequences, self.node_cost = sequences, node_cost
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.paths: list[tuple[int, ...]] = [()] * len(sequences)  # indices of segments, whose ends are set later

    def add(self, members: list[int], depth: int, above: tuple[int, ...]) -> None:
        """Adds the tokens from ``depth`` on of ``members``: sorted sequences that agree before ``depth``."""
        sequences = self.sequences
        first, last = sequences[members[0]], sequences[members[-1]]
        common = common_length(first, last)
        ending = [i for i in members if len(sequences[i]) == common]
        continuing = members[len(ending) :]  # the sorted order puts a sequence before those that continue it
        branches = [list(branch) for _, branch in groupby(continuing, key=lambda i: sequences[i][common])]
        shares = (common - depth) * (len(branches) + bool(ending) - 1) > self.node_cost
        below = above
        if ending or shares:
            number = len(self.segments)
            here = (*above, number) if common > depth else above
            if common > depth:
                start = len(self.ids)
                self.ids += first[depth:common]
                self.positions += range(depth, common)
                self.segments.append(Segment(start, len(self.ids), len(self.ids), depth))
            for i in ending:
                self.paths[i] = here
            if shares:
                below, depth = here, common
        for branch in branches:
            self.add(branch, depth, below)
        if len(below) > len(above):
            own = self.segments[below[-1]]
            self.segments[below[-1]] = Segment(own.start, own.stop, len(self.ids), own.depth)

    def finished(self) -> Tree:
        paths = tuple(tuple(self.segments[number] for number in path) for path in self.paths)
        return Tree(tuple(self.ids), tuple(self.positions), tuple(self.segments), paths)
