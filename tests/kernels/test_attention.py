"""Attention over a packed tree equals that of every sequence alone, whatever the blocks, and visits none in vain."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from xprobe_kernels.attention import Blocks, Reach, serves, tree_attention
from xprobe_kernels.readout import interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + ([] if interpreted() else [torch.bfloat16])
SMALL = (Blocks(16, 16, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 2))


@dataclass
class Packed:
    """A random tree: for every token the end of what continues it, its position, and the token before it."""

    until: np.ndarray
    positions: np.ndarray
    parents: list[int]

    def line(self, token: int) -> list[int]:
        """The token and all that it continues."""
        found = [token]
        while self.parents[found[-1]] >= 0:
            found.append(self.parents[found[-1]])
        return found[::-1]


def grown(tokens: int, seed: int) -> Packed:
    """Chains of random length, each continuing some token of the chain being written, depth first."""
    draw = random.Random(seed)
    parents: list[int] = []
    line: list[int] = []  # of the token written last
    while len(parents) < tokens:
        del line[draw.randrange(len(line) + 1) :]
        for _ in range(min(draw.choice([1, 3, 20, 60]), tokens - len(parents))):
            parents.append(line[-1] if line else -1)
            line.append(len(parents) - 1)
    until, positions = np.arange(1, tokens + 1), np.zeros(tokens, dtype=int)
    for token in reversed(range(tokens)):
        if parents[token] >= 0:
            until[parents[token]] = max(until[parents[token]], until[token])
    for token in range(tokens):
        positions[token] = positions[parents[token]] + 1 if parents[token] >= 0 else 0
    return Packed(until, positions, parents)


def alone(tree: Packed, query: Tensor, key: Tensor, value: Tensor, scale, window, softcap, sinks) -> Tensor:
    """Every token on its own line, in fp64."""
    query, key, value = (t.double().cpu() for t in (query, key, value))
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    rows = []
    for token in range(query.shape[1]):
        line = tree.line(token)[-(window or 10**9) :]
        scores = torch.einsum("hd,hjd->hj", query[:, token], key[:, line]) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().cpu()[:, None]], 1)
        rows.append(torch.einsum("hj,hje->he", scores.softmax(-1)[:, : len(line)], value[:, line]))
    return torch.stack(rows)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


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


def chains(*lengths: int) -> Packed:
    """Sequences with nothing in common, one behind another."""
    starts = np.cumsum([0, *lengths[:-1]])
    positions = np.concatenate([np.arange(length) for length in lengths])
    until = np.repeat(starts + lengths, lengths)
    return Packed(until, positions, [at - 1 if positions[at] else -1 for at in range(len(until))])


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
