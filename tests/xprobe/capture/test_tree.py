"""The packed tree holds every sequence, shares long beginnings, and pads little."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from support.prompts import family_of_prompts

from xprobe.capture.tree import common_length, make_tree, packed_lengths
from xprobe.capture.tree_attention import Layout

FED = [prompt.ids[:-1] for prompt in family_of_prompts(3, 6)]
CASES = {
    "one": [(5, 6, 7)],
    "twice the same": [(5, 6, 7), (5, 6, 7)],
    "nothing in common": [(1, 2), (3, 4), (5,)],
    "one begins another": [tuple(range(20)), tuple(range(10)), tuple(range(15))],
    "questions on contexts": FED,
}


@pytest.mark.parametrize("node_cost", [0, 4, 10**6])
@pytest.mark.parametrize("sequences", CASES.values(), ids=CASES)
def test_the_path_of_a_sequence_gives_its_tokens_and_positions(sequences, node_cost):
    tree = make_tree(sequences, node_cost)
    assert len(tree.ids) == len(tree.positions)
    for number, sequence in enumerate(sequences):
        indices = [tree.index(number, position) for position in range(len(sequence))]
        assert [tree.ids[index] for index in indices] == list(sequence)
        assert [tree.positions[index] for index in indices] == list(range(len(sequence)))
        start, stop = len(sequence) // 3, len(sequence)
        in_pieces = [index for piece in tree.pieces(number, start, stop) for index in range(*piece)]
        assert in_pieces == indices[start:stop]
        with pytest.raises(IndexError):
            tree.index(number, len(sequence))


@pytest.mark.parametrize("node_cost", [0, 4])
@pytest.mark.parametrize("sequences", CASES.values(), ids=CASES)
def test_segments_are_nested_and_a_segment_stands_before_the_segments_below_it(sequences, node_cost):
    tree = make_tree(sequences, node_cost)
    for number in range(len(sequences)):
        path = tree.paths[number]
        for above, below in itertools.pairwise(path):
            assert above.stop <= below.start
            assert below.end <= above.end
    under = {(s.start, s.end) for s in tree.segments}
    for one in under:
        for other in under:
            assert one[1] <= other[0] or other[1] <= one[0] or one[0] <= other[0] <= other[1] <= one[1] or other <= one


def test_every_shared_token_occurs_once_if_segments_cost_nothing():
    for sequences in CASES.values():
        assert len(make_tree(sequences, 0).ids) == sum(packed_lengths(sorted(sequences)))
        assert len(make_tree(sequences, 0).ids) == len({s[: i + 1] for s in sequences for i in range(len(s))})


def test_a_short_beginning_is_repeated_instead_of_shared():
    sequences = [(1, 2, 3, 4), (1, 2, 5, 6)]
    assert len(make_tree(sequences, node_cost=2).ids) == 8
    assert len(make_tree(sequences, node_cost=1).ids) == 6


def test_common_length_of_random_sequences():
    draw = random.Random(0)
    for _ in range(300):
        one, other = ([draw.randrange(2) for _ in range(draw.randrange(12))] for _ in range(2))
        wanted = next(
            (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
        assert common_length(one, other) == wanted


def test_batches_of_segments_hold_every_token_once_with_little_padding():
    tree = make_tree(FED)
    layout = Layout(tree, torch.device("cpu"))
    targets = torch.cat([batch.targets for batch in layout.batches])
    assert torch.equal(targets.sort().values, torch.arange(len(tree.ids)))
    assert sum(batch.indices.numel() for batch in layout.batches) <= 1.25 * len(tree.ids)


def test_padding_adds_tokens_at_the_end_and_leaves_paths_unchanged():
    tree = make_tree(FED)
    padded = tree.padded(64)
    assert len(padded.ids) % 64 == 0
    assert padded.ids[: len(tree.ids)] == tree.ids
    assert padded.paths == tree.paths
    assert padded.padded(64) is padded
