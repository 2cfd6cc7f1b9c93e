"""A plan says which requests run together. It is plain data.

A *group* is the unit that is stored and resumed: requests with a common beginning. A *wave* is one or several groups
that are computed together. A wave that exceeds the token budget is split into *parts*; a part is one forward pass.
The strategy decides how many tokens a pass runs over:

``tree``    the requests' trie, packed: each shared token once, no padding (``tree.py``, ``tree_attention.py``)
``prefix``  the common beginning once; padded batches of the rest share its key/value cache (``prefix.py``)
``plain``   padded batches of whole requests
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from xprobe.capture.requests import Group, Request
from xprobe.capture.tree import NODE_COST, common_length, packed_lengths

Strategy = Literal["tree", "prefix", "plain"]
STRATEGIES: dict[Strategy, str] = {
    "tree": "prompts packed as a tree: each shared token once, no padding",
    "prefix": "a cache for the common beginning of each group, padded batches for the rest",
    "plain": "padded batches of whole prompts",
}


def candidates(kernel: bool) -> list[tuple[Strategy, bool]]:
    """Strategies to try, the fastest first, each with whether the attention kernel is used.

    Examples
    --------
    >>> candidates(kernel=False)
    [('tree', False), ('prefix', False)]
    """
    every: list[tuple[Strategy, bool]] = [("tree", True), ("tree", False), ("prefix", False)]
    return every if kernel else every[1:]


@dataclass(frozen=True)
class Wave:
    """Groups that are computed together."""

    groups: tuple[Group, ...]

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """The requests of all groups, group by group."""
        return tuple(request for group in self.groups for request in group.requests)


@dataclass(frozen=True)
class Plan:
    """The waves that a run computes, in order. ``make_plan`` makes it."""

    strategy: Strategy
    batch_tokens: int
    waves: tuple[Wave, ...]
    max_shared_tokens: int | None = None

    @cached_property
    def tokens(self) -> int:
        """Tokens of all requests together: the tokens to run if each request ran alone."""
        return sum(len(request.ids) for wave in self.waves for request in wave.requests)

    @cached_property
    def tokens_run(self) -> int:
        """Tokens that the forward passes run over, padding included."""
        return sum(part_tokens(wave.requests, part, self.strategy) for wave in self.waves for part in self.parts(wave))

    def parts(self, wave: Wave) -> list[list[int]]:
        """The forward passes of a wave, each as indices of its requests."""
        return split(wave.requests, range(len(wave.requests)), self.batch_tokens, self.strategy, self.max_shared_tokens)

    @property
    def saved(self) -> float:
        """Share of ``tokens`` that is not computed; negative if padding costs more than sharing saves."""
        return 1 - self.tokens_run / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``manifest.json``."""
        return {
            "strategy": self.strategy,
            "batch_tokens": self.batch_tokens,
            "waves": len(self.waves),
            "tokens": self.tokens,
            "tokens_run": self.tokens_run,
        }

    @property
    def most_rows(self) -> dict[str, int]:
        """For each name of a read, the most rows that a wave keeps. Row buffers need this size."""
        most: dict[str, int] = {}
        for wave in self.waves:
            for name, count in count_rows(wave.requests).items():
                most[name] = max(most.get(name, 0), count)
        return most


def count_rows(requests: Iterable[Request]) -> dict[str, int]:
    """Rows that ``requests`` keep at each layer, by the name of the read.

    Examples
    --------
    >>> from xprobe.capture.requests import Each, Mean
    >>> count_rows([Request((5, 6, 7), {"last": Each((1, 2)), "all": Mean(0, 3)})])
    {'last': 2, 'all': 1}
    """
    counts: dict[str, int] = {}
    for request in requests:
        for name, read in request.reads.items():
            counts[name] = counts.get(name, 0) + read.rows
    return counts


def make_plan(
    groups: Sequence[Group], batch_tokens: int, strategy: Strategy, max_shared_tokens: int | None = None
) -> Plan:
    """Puts neighbouring groups into one wave while they fit into one forward pass of ``batch_tokens`` tokens.

    Prompts of more than ``max_shared_tokens`` tokens get a pass of their own (``rotary_limit``). The plan depends on
    its arguments alone, so a resumed run computes each wave as before.

    Examples
    --------
    >>> from xprobe.capture.requests import Each, group_requests
    >>> page = tuple(range(10, 40))
    >>> groups = group_requests([Request((*page, token), {"last": Each((30,))}, "page 1") for token in (5, 6)])
    >>> plan = make_plan(groups, batch_tokens=100, strategy="tree")
    >>> plan.tokens, plan.tokens_run, len(plan.waves)
    (62, 32, 1)
    """
    waves: list[list[Group]] = []
    filled = 0
    for group in groups:
        own = part_tokens(group.requests, range(len(group.requests)), strategy)
        if waves and filled + own <= batch_tokens:
            waves[-1].append(group)
            filled += own
        else:
            waves.append([group])
            filled = own
    return Plan(strategy, batch_tokens, tuple(Wave(tuple(wave)) for wave in waves), max_shared_tokens)


def rotary_limit(config: Any) -> int | None:
    """Length of a prompt beyond which a model rotates *all* positions by other angles; None if it never does.

    Models with LongRoPE or dynamic NTK do so. The longest prompt of a pass decides for all prompts in it, so a prompt
    beyond the limit must not share its pass.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    >>> rotary_limit(LlamaConfig(max_position_embeddings=2048, rope_parameters=rope))
    2048
    >>> rotary_limit(LlamaConfig()) is None
    True
    """
    text = config.get_text_config(decoder=True)
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]  # some models: one per layer type
    default = getattr(text, "original_max_position_embeddings", None) or getattr(text, "max_position_embeddings", None)
    limits = [
        kind.get("original_max_position_embeddings") or default
        for kind in kinds
        if kind.get("rope_type") == "longrope" or "dynamic" in str(kind.get("rope_type"))
    ]
    return min((limit for limit in limits if limit), default=None)


def split(
    requests: Sequence[Request],
    members: Iterable[int],
    budget: int,
    strategy: Strategy,
    max_shared_tokens: int | None = None,
) -> list[list[int]]:
    """Splits the indices ``members`` of ``requests`` into parts of at most ``budget`` tokens.

    A part of one request may exceed the budget.
    """
    limit = float("inf") if max_shared_tokens is None else max_shared_tokens
    by_length = sorted(members, key=lambda i: len(requests[i].ids))
    together = [i for i in by_length if len(requests[i].ids) <= limit]
    # by rising length: a model that adapts its angles to the longest prompt so far then does so for each of them
    return [*_split(requests, together, budget, strategy), *([i] for i in by_length[len(together) :])]


def _split(requests: Sequence[Request], members: list[int], budget: int, strategy: Strategy) -> list[list[int]]:
    if strategy == "tree":
        order = sorted(members, key=lambda i: requests[i].ids)
        return _split_sorted(requests, order, budget)
    if strategy == "prefix":
        by_beginning: dict[str, list[int]] = {}
        for i in members:
            by_beginning.setdefault(requests[i].group, []).append(i)
        return [part for some in by_beginning.values() for part in _split_padded(requests, some, budget, strategy)]
    return _split_padded(requests, members, budget, strategy)


def part_tokens(requests: Sequence[Request], part: Iterable[int], strategy: Strategy) -> int:
    """Number of tokens in one forward pass over ``part`` of ``requests``."""
    members = list(part)
    if strategy == "tree":
        return sum(packed_lengths(sorted(requests[i].ids for i in members)))
    shared = prefix_length([requests[i] for i in members]) if strategy == "prefix" else 0
    return shared + len(members) * (max(len(requests[i].ids) for i in members) - shared)


def prefix_length(requests: Sequence[Request]) -> int:
    """Length of the common beginning before the first captured row; 0 if a cache of it does not pay."""
    first = requests[0].ids
    common = min(common_length(first, request.ids) for request in requests)
    common = min(common, *(request.first_read for request in requests))
    return common if common * (len(requests) - 1) > NODE_COST else 0


def _split_sorted(requests: Sequence[Request], order: list[int], budget: int) -> list[list[int]]:
    parts: list[list[int]] = []
    filled = 0
    added = packed_lengths([requests[i].ids for i in order])
    for i, new_tokens in zip(order, added, strict=True):
        if parts and filled + new_tokens <= budget:
            parts[-1].append(i)
            filled += new_tokens
        else:
            parts.append([i])
            filled = len(requests[i].ids)
    return parts


def _split_padded(requests: Sequence[Request], members: list[int], budget: int, strategy: Strategy) -> list[list[int]]:
    shared = prefix_length([requests[i] for i in members]) if strategy == "prefix" and members else 0
    parts: list[list[int]] = []
    for i in sorted(members, key=lambda i: len(requests[i].ids), reverse=True):
        longest = len(requests[parts[-1][0]].ids) - shared if parts else 0
        if parts and shared + longest * (len(parts[-1]) + 1) <= budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts
