"""Tokens that continue a packed tree attend to the tokens before them in the tree and in their own tail."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support.packed import DEVICE, DTYPES, Packed, alone, grown, numbers
from torch import Tensor
from xprobe_kernels.attention import Blocks, continued_attention
from xprobe_kernels.continuation import Continuation

SMALL = (Blocks(16, 16, 4, 1), Blocks(16, 32, 4, 2))
OPTIONS = {
    "plain": {},
    "window": {"window": 7},
    "soft-cap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "everything": {"window": 40, "softcap": 3.0, "sinks": True},
}


def tails(tree: Packed, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Where random tails begin, and their lengths. Some continue the same token, one continues none."""
    draw = random.Random(seed)
    ends = [-1, *(draw.randrange(len(tree.until)) for _ in range(count))]
    return [*ends, ends[-1]], [draw.randrange(1, 9) for _ in range(count + 2)]


def whole(tree: Packed, ends: list[int], lengths: list[int]) -> Packed:
    """Tree and tails as one: ``alone`` only asks for the line of a token."""
    parents = list(tree.parents)
    for end, length in zip(ends, lengths, strict=True):
        for step in range(length):
            parents.append(len(parents) - 1 if step else end)
    return Packed(np.array([]), np.array([]), parents)


def expected(tree: Packed, query: Tensor, key: Tensor, value: Tensor, scale: float, **options) -> Tensor:
    return alone(tree, query, key, value, scale, *(options[name] for name in ("window", "softcap", "sinks")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("heads", "shared", "width", "value_width"), [(4, 2, 16, 16), (3, 3, 24, 8)])
def test_tails_attend_to_the_tree_and_to_themselves(dtype, options, heads, shared, width, value_width) -> None:
    for seed, blocks in enumerate(SMALL):
        tree = grown(97, seed)
        ends, lengths = tails(tree, 7, seed)
        count = sum(lengths)
        query = numbers(1, 97 + count, heads, width, dtype=dtype).transpose(0, 1)  # as models have it
        key = numbers(2, shared, 97 + count, width, dtype=dtype)
        value = numbers(3, shared, 97 + count, value_width, dtype=dtype)
        sinks = numbers(4, heads) if options.get("sinks") else None
        some = {"window": None, "softcap": None, **options, "sinks": sinks}
        wanted = expected(whole(tree, ends, lengths), query, key, value, width**-0.5, **some)[97:]
        size = float(value.abs().max())
        slack = (4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps) * size
        rows = [0, 3, count - 2]
        for queries in (range(count), rows):
            places = Continuation.from_tree(tree.until, tree.positions, ends, lengths, queries, blocks, DEVICE)
            found = continued_attention(
                query[:, 97:][:, list(queries)], (key[:, :97], value[:, :97]), (key[:, 97:], value[:, 97:]), places,
                scale=width**-0.5, **some,
            )  # fmt: skip
            assert found.shape == (len(queries), heads, value_width)
            assert found.dtype == dtype
            assert float((found.double().cpu() - wanted[list(queries)]).abs().max()) < slack


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_queries_move_on_through_their_tails(options) -> None:
    """As in generation: the keys of later tokens are there already, and must not be seen."""
    tree = grown(60, 3)
    ends, lengths = [4, 30, 30, 59], [5, 5, 5, 5]
    query, key, value = (numbers(s, 2, 80, 16) for s in (1, 2, 3))
    some = {"window": None, "softcap": None, **options, "sinks": numbers(4, 2) if options.get("sinks") else None}
    wanted = expected(whole(tree, ends, lengths), query, key, value, 0.3, **some)[60:]
    for tail_rows in ([0, 5, 10, 15], [5, 15]):
        places = Continuation.from_tree(tree.until, tree.positions, ends, lengths, tail_rows, SMALL[0], DEVICE)
        for step in range(5):
            rows = [row + step for row in tail_rows]
            found = continued_attention(
                query[:, 60:][:, rows], (key[:, :60], value[:, :60]), (key[:, 60:], value[:, 60:]), places, scale=0.3,
                **some,
            )  # fmt: skip
            assert float((found.double().cpu() - wanted[rows]).abs().max()) < 4e-6 * float(value.abs().max())
            if step < 4:
                places.advance()


@pytest.mark.parametrize("seed", range(6))
def test_blocks_with_something_to_see_are_visited_and_masked_where_they_must_be(seed) -> None:
    tree, blocks = grown(150, seed), SMALL[seed % 2]
    ends, lengths = tails(tree, 20, seed)
    ends = sorted(ends)
    lines = whole(tree, ends, lengths)
    queries = list(range(0, sum(lengths), 2))
    found = Continuation.from_tree(tree.until, tree.positions, ends, lengths, queries, blocks, torch.device("cpu"))
    sees = torch.zeros(len(queries), len(found.since), dtype=torch.bool)
    for row, token in enumerate(queries):
        sees[row, lines.line(150 + token)] = True
    place, since, until = found.places[:, None], found.since, found.until
    assert torch.equal((since <= place) & (place < until), sees)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for number, (first, masked, own, last) in enumerate(found.bounds.tolist()):
        mine = sees[number * blocks.queries : (number + 1) * blocks.queries]
        parts = ((mine[:, :150], first, own), (mine[:, 150:], own, last))
        for part, begin, end in parts:
            wanted = {k for k, some in enumerate(part.split(blocks.keys, 1)) if some.any()}
            visits = found.visits[begin:end].tolist()
            assert wanted <= set(visits)
            assert len(set(visits)) == len(visits)
        for k in found.visits[first:masked].tolist():
            assert mine[:, :150][:, k * blocks.keys : (k + 1) * blocks.keys].all()
            assert (k + 1) * blocks.keys <= 150
    assert starts[-1] == sum(lengths)


def test_what_does_not_fit_is_refused() -> None:
    tree = grown(20, 0)
    with pytest.raises(ValueError, match="ends must be from -1 to 19, got 3 to 20"):
        Continuation.from_tree(tree.until, tree.positions, [3, 20], [1, 1], [0], SMALL[0], DEVICE)
    places = Continuation.from_tree(tree.until, tree.positions, [3, 19], [1, 1], [0, 1], SMALL[0], DEVICE)
    kept, own = numbers(0, 2, 20, 16), numbers(1, 2, 2, 16)
    for query, options, message in (
        (numbers(2, 3, 2, 16), {}, "do not fit"),
        (numbers(2, 2, 1, 16), {}, "continuation describes 2 queries and 22 keys"),
        (own.double(), {}, "takes what tree_attention takes"),
        (own, {"window": 0}, "window must be at least 1"),
        (own, {"sinks": torch.zeros(3, device=DEVICE)}, r"sinks must have shape \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            continued_attention(query, (kept, kept), (own, own), places, scale=1.0, **options)
