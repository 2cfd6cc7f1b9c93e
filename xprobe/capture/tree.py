"""Prompts with common beginnings as one packed sequence: every shared token once, nothing padded.

The prompts of a pass form a trie over token ids. Its edges, laid one behind another in depth-first order, are the
*segments* of one packed sequence: a token stands there once, however many prompts go through it. What a token may
attend to follows from the trie: its own segment up to itself, and the segments above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

# A segment that several others continue costs one more attention call per layer; it must save at least so many tokens
NODE_COST = 8


@dataclass(frozen=True)
class Segment:
    """Tokens ``start:stop`` of the packed sequence; those of everything below it follow, up to ``end``.

    ``depth`` is the position of its first token in the prompts that go through it.
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
        Token ids, and the position of each in its prompts.
    segments : tuple of Segment
        In packed order: each before those that continue it.
    paths : tuple of tuple of Segment
        For every sequence given to ``grow``, the segments that spell it.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    segments: tuple[Segment, ...]
    paths: tuple[tuple[Segment, ...], ...]

    def filled(self, multiple: int) -> Tree:
        """The same with tokens that nobody reads at its end, so that N is a multiple: libraries make code for every N
        that they meet, and keep it."""
        missing = -len(self.ids) % multiple
        if not missing:
            return self
        start, stop = len(self.ids), len(self.ids) + missing
        filling = Segment(start, stop, stop, 0)
        nothing = [0] * missing
        return Tree((*self.ids, *nothing), (*self.positions, *nothing), (*self.segments, filling), self.paths)

    def place(self, sequence: int, position: int) -> int:
        """Where a token of a sequence stands in the packed sequence."""
        for segment in self.paths[sequence]:
            if position < segment.depth + segment.length:
                return segment.start + position - segment.depth
        raise IndexError(f"sequence {sequence} has no position {position}")

    def pieces(self, sequence: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Packed ranges that positions ``start:stop`` of a sequence are spread over."""
        found = []
        for segment in self.paths[sequence]:
            first, last = max(start, segment.depth), min(stop, segment.depth + segment.length)
            if first < last:
                found.append((segment.start + first - segment.depth, segment.start + last - segment.depth))
        return found


def grow(sequences: Sequence[Sequence[int]], node_cost: int = NODE_COST) -> Tree:
    """The packed trie of token sequences; a beginning is shared where that saves more than ``node_cost`` tokens."""
    builder = _Builder(sequences, node_cost)
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    builder.grow(order, 0, ())
    return builder.finished()


def packed_lengths(sequences: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens each of the *sorted* ``sequences`` adds to a trie of those before it."""
    lengths: list[int] = []
    for at, sequence in enumerate(sequences):
        lengths.append(len(sequence) - (common_length(sequences[at - 1], sequence) if at else 0))
    return lengths


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # by halving: slices compare at the speed of C
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
        self.paths: list[tuple[int, ...]] = [()] * len(sequences)  # indices of segments: their ends come later

    def grow(self, members: list[int], depth: int, above: tuple[int, ...]) -> None:
        """Lays out ``members``, sorted sequences that agree up to ``depth``, from there on."""
        sequences = self.sequences
        first, last = sequences[members[0]], sequences[members[-1]]
        common = common_length(first, last)
        ending = [i for i in members if len(sequences[i]) == common]
        going_on = members[len(ending) :]  # the sorted order puts a sequence before those that continue it
        branches = [list(branch) for _, branch in groupby(going_on, key=lambda i: sequences[i][common])]
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
            self.grow(branch, depth, below)
        if len(below) > len(above):
            own = self.segments[below[-1]]
            self.segments[below[-1]] = Segment(own.start, own.stop, len(self.ids), own.depth)

    def finished(self) -> Tree:
        paths = tuple(tuple(self.segments[number] for number in path) for path in self.paths)
        return Tree(tuple(self.ids), tuple(self.positions), tuple(self.segments), paths)
