"""The packed tree spells every sequence, shares what is worth it, and attends as each sequence alone would."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from support.prompts import family_of_prompts

from xprobe.capture.tree import common_length, grow, packed_lengths
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
def test_every_sequence_is_spelled_by_its_path(sequences, node_cost):
    tree = grow(sequences, node_cost)
    assert len(tree.ids) == len(tree.positions)
    for number, sequence in enumerate(sequences):
        places = [tree.place(number, at) for at in range(len(sequence))]
        assert [tree.ids[place] for place in places] == list(sequence)
        assert [tree.positions[place] for place in places] == list(range(len(sequence)))
        start, stop = len(sequence) // 3, len(sequence)
        spread = [at for piece in tree.pieces(number, start, stop) for at in range(*piece)]
        assert spread == places[start:stop]
        with pytest.raises(IndexError):
            tree.place(number, len(sequence))


@pytest.mark.parametrize("node_cost", [0, 4])
@pytest.mark.parametrize("sequences", CASES.values(), ids=CASES)
def test_a_segment_stands_before_those_that_continue_it_and_reaches_no_others(sequences, node_cost):
    tree = grow(sequences, node_cost)
    for number in range(len(sequences)):
        path = tree.paths[number]
        for above, below in itertools.pairwise(path):
            assert above.stop <= below.start
            assert below.end <= above.end
    under = {(s.start, s.end) for s in tree.segments}
    for one in under:
        for other in under:
            assert one[1] <= other[0] or other[1] <= one[0] or one[0] <= other[0] <= other[1] <= one[1] or other <= one


def test_with_no_price_on_segments_every_token_stands_once():
    for sequences in CASES.values():
        assert len(grow(sequences, 0).ids) == sum(packed_lengths(sorted(sequences)))
        assert len(grow(sequences, 0).ids) == len({s[: i + 1] for s in sequences for i in range(len(s))})


def test_a_beginning_too_short_to_pay_is_repeated():
    sequences = [(1, 2, 3, 4), (1, 2, 5, 6)]
    assert len(grow(sequences, node_cost=2).ids) == 8
    assert len(grow(sequences, node_cost=1).ids) == 6


def test_common_length_of_random_sequences():
    draw = random.Random(0)
    for _ in range(300):
        one, other = ([draw.randrange(2) for _ in range(draw.randrange(12))] for _ in range(2))
        wanted = next(
            (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
        assert common_length(one, other) == wanted


def test_batches_of_segments_hold_every_token_once_and_little_padding():
    tree = grow(FED)
    layout = Layout(tree, torch.device("cpu"))
    targets = torch.cat([batch.targets for batch in layout.batches])
    assert torch.equal(targets.sort().values, torch.arange(len(tree.ids)))
    assert sum(batch.places.numel() for batch in layout.batches) <= 1.25 * len(tree.ids)


def test_filling_adds_tokens_at_the_end_that_no_path_goes_through():
    tree = grow(FED)
    filled = tree.filled(64)
    assert len(filled.ids) % 64 == 0
    assert filled.ids[: len(tree.ids)] == tree.ids
    assert filled.paths == tree.paths
    assert filled.filled(64) is filled
