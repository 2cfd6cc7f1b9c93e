"""Attention over a packed tree equals that of every sequence alone, whatever the blocks, and visits none in vain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.packed import DEVICE, DTYPES, alone, chains, grown, numbers
from xprobe_kernels.attention import Blocks, Reach, serves, tree_attention

SMALL = (Blocks(16, 16, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 2))


OPTIONS = {
    "plain": {},
    "window": {"window": 7},
    "soft-cap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "everything": {"window": 40, "softcap": 3.0, "sinks": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("tokens", "heads", "shared", "width", "value_width"), [(97, 4, 2, 16, 16), (130, 3, 3, 24, 8)]
)
def test_every_token_attends_to_itself_and_what_it_continues(
    dtype, options, tokens, heads, shared, width, value_width
) -> None:
    for seed, blocks in enumerate(SMALL):
        tree = grown(tokens, seed)
        query = numbers(1, tokens, heads, width, dtype=dtype).transpose(0, 1)  # as models have it
        key, value = (
            numbers(2, shared, tokens, width, dtype=dtype),
            numbers(3, shared, tokens, value_width, dtype=dtype),
        )
        wanted_sinks = numbers(4, heads) if options.get("sinks") else None
        some = {"window": None, "softcap": None, **options, "sinks": wanted_sinks}
        reach = Reach.from_tree(tree.until, tree.positions, blocks, DEVICE)
        found = tree_attention(query, key, value, reach, scale=width**-0.5, **some)
        assert found.shape == (tokens, heads, value_width)
        assert found.dtype == dtype
        wanted = alone(tree, query, key, value, width**-0.5, **some)
        # weights are rounded to the operands' dtype, and so is the result: two roundings of numbers up to `size`
        size = float(value.abs().max())
        slack = 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert float((found.double().cpu() - wanted).abs().max()) < slack * size


def test_large_heads_and_the_blocks_that_are_chosen_for_them() -> None:
    for dtype, width in ((torch.float32, 128), (torch.float32, 192), (torch.float16, 256)):
        tokens, tree = 70, grown(70, 5)
        query, key, value = (numbers(s, 2, tokens, width, dtype=dtype) for s in range(3))
        reach = Reach.from_tree(tree.until, tree.positions, Blocks.choose(dtype.itemsize, width), DEVICE)
        found = tree_attention(query, key, value, reach, scale=width**-0.5)
        wanted = alone(tree, query, key, value, width**-0.5, None, None, None)
        assert float((found.double().cpu() - wanted).abs().max()) < (2e-5 if dtype == torch.float32 else 6e-3)


# the last ones end one token before, at and behind the end of a block of queries
TREES = [grown(tokens, seed) for seed, tokens in enumerate((1, 15, 16, 17, 200, 200))]
TREES += [chains(31, 33), chains(32, 32), chains(33, 31)]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{len(tree.until)} tokens, {tree.until[0]} first")
@pytest.mark.parametrize("blocks", SMALL)
def test_blocks_that_are_visited_are_exactly_those_with_something_to_see(tree, blocks) -> None:
    count = len(tree.until)
    reach = Reach.from_tree(tree.until, tree.positions, blocks, torch.device("cpu"))
    at = np.arange(count)
    sees = (at[None] <= at[:, None]) & (at[:, None] < tree.until[None])
    for token in range(count):
        assert np.flatnonzero(sees[token]).tolist() == tree.line(token)
    for number, (first, masked, last) in enumerate(reach.bounds.tolist()):
        mine = sees[number * blocks.queries : (number + 1) * blocks.queries]
        seen = {k for k in range(-(-count // blocks.keys)) if mine[:, k * blocks.keys : (k + 1) * blocks.keys].any()}
        visits = reach.visits[first:last].tolist()
        assert sorted(visits) == sorted(seen)
        for k in reach.visits[first:masked].tolist():  # nothing is left to be masked in these
            part = mine[:, k * blocks.keys : (k + 1) * blocks.keys]
            assert part.all()
            assert part.shape[1] == blocks.keys


def test_the_same_call_gives_the_same_bits_and_leaves_its_inputs_alone() -> None:
    tree = grown(100, 1)
    query, key, value = (numbers(s, 2, 100, 32) for s in range(3))
    before = [t.clone() for t in (query, key, value)]
    reach = Reach.from_tree(tree.until, tree.positions, SMALL[0], DEVICE)
    first, second = (tree_attention(query, key, value, reach, scale=0.2) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, (query, key, value), strict=True))


def test_scores_that_would_overflow_without_a_running_maximum() -> None:
    tree = grown(60, 2)
    query, key, value = (numbers(s, 2, 60, 16) for s in range(3))
    reach = Reach.from_tree(tree.until, tree.positions, SMALL[0], DEVICE)
    found = tree_attention(query * 300, key, value, reach, scale=1.0)
    wanted = alone(tree, query * 300, key, value, 1.0, None, None, None)
    assert float((found.double().cpu() - wanted).abs().max()) < 5e-3  # scores of 3000 have their own rounding


def test_what_cannot_be_served_is_refused_by_name() -> None:
    tree = grown(20, 0)
    query, key, value = (numbers(s, 4, 20, 16) for s in range(3))
    reach = Reach.from_tree(tree.until, tree.positions, SMALL[0], DEVICE)
    with pytest.raises(ValueError, match=r"do not fit: .*\[4, 20, 16\]"):
        tree_attention(query, key[:3], value[:3], reach, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        tree_attention(query, key[:, :19], value, reach, scale=1.0)
    with pytest.raises(ValueError, match="reach describes 20 tokens"):
        tree_attention(query[:, :9], key[:, :9], value[:, :9], reach, scale=1.0)
    with pytest.raises(ValueError, match="window must be at least 1"):
        tree_attention(query, key, value, reach, scale=1.0, window=0)
    with pytest.raises(ValueError, match=r"sinks must have shape \[4\]"):
        tree_attention(query, key, value, reach, scale=1.0, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="at most 256 wide"):
        tree_attention(*(numbers(s, 1, 20, 257) for s in range(3)), reach, scale=1.0)
    assert not serves(query.double(), key.double(), value.double())
    assert not serves(query.half(), key, value)
    for until in ([1, 1], [1, 3], [], [2, 2, 3, 3]):
        with pytest.raises(ValueError, match="until"):
            Reach.from_tree(np.array(until, dtype=int), np.zeros(len(until), dtype=int), SMALL[0], DEVICE)
