"""Which prompts run together, as plain data: groups (stored), waves (computed together), parts (one forward pass each).

A *group* is what is stored and resumed: all prompts on one context in one setting. Small groups are computed together
in a *wave*; a wave that exceeds the token budget is split into *parts*, one forward pass each. How many tokens a pass
runs over depends on the way it is made:

``tree``    the prompts' trie, packed: every shared token once, no padding (``tree.py``, ``cascade.py``)
``prefix``  the common beginning once, its key/value cache shared by padded batches of the rest (``prefix.py``)
``plain``   padded batches of whole prompts
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from xprobe.capture.tree import NODE_COST, common_length, packed_lengths
from xprobe.qa.prompts import Prompt

Way = Literal["tree", "prefix", "plain"]
WAYS: dict[Way, str] = {
    "tree": "prompts packed as a tree: each shared token once, no padding",
    "prefix": "a cache for the common beginning of each group, padded batches for the rest",
    "plain": "padded batches of whole prompts",
}


@dataclass(frozen=True)
class Group:
    """Prompts on one context in one setting: the unit that is stored and resumed."""

    key: str
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Wave:
    """Groups that are computed together."""

    groups: tuple[Group, ...]

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(prompt for group in self.groups for prompt in group.prompts)


@dataclass(frozen=True)
class Plan:
    """What a run computes, in order."""

    way: Way
    batch_tokens: int
    waves: tuple[Wave, ...]
    alone_beyond: int | None = None

    @cached_property
    def tokens(self) -> int:
        """Tokens of all prompts and answers, as a forward pass of each example alone would run over."""
        return sum(fed_length(prompt) for wave in self.waves for prompt in wave.prompts)

    @cached_property
    def tokens_run(self) -> int:
        """Tokens that the forward passes run over, padding included."""
        return sum(part_tokens(wave.prompts, part, self.way) for wave in self.waves for part in self.parts(wave))

    def parts(self, wave: Wave) -> list[list[int]]:
        """The forward passes of a wave, each as indices of its prompts."""
        return split(wave.prompts, range(len(wave.prompts)), self.batch_tokens, self.way, self.alone_beyond)

    @property
    def saved(self) -> float:
        """Share of ``tokens`` that is not computed; negative if padding costs more than sharing saves."""
        return 1 - self.tokens_run / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``manifest.json``."""
        return {
            "way": self.way,
            "batch_tokens": self.batch_tokens,
            "waves": len(self.waves),
            "tokens": self.tokens,
            "tokens_run": self.tokens_run,
        }

    @property
    def largest_wave(self) -> tuple[int, int]:
        """(answer positions, examples) of the wave with most answer positions: what the row buffer must hold."""
        sizes = [(sum(len(p.targets) for p in wave.prompts), len(wave.prompts)) for wave in self.waves]
        return max(positions for positions, _ in sizes), max(examples for _, examples in sizes)


def group_prompts(prompts: Iterable[Prompt]) -> list[Group]:
    """Groups by setting, context language and paragraph, in order of first appearance."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.example.group, []).append(prompt)
    return [Group(key, tuple(members)) for key, members in groups.items()]


def make_plan(groups: Sequence[Group], batch_tokens: int, way: Way, alone_beyond: int | None = None) -> Plan:
    """Neighbouring groups go into one wave while they fit one forward pass of ``batch_tokens`` tokens together.

    Prompts of more than ``alone_beyond`` tokens get a pass of their own (``rotary_limit``).

    The plan depends on nothing but its arguments, so that a run that is resumed computes each wave as before.
    """
    waves: list[list[Group]] = []
    filled = 0
    for group in groups:
        own = part_tokens(group.prompts, range(len(group.prompts)), way)
        if waves and filled + own <= batch_tokens:
            waves[-1].append(group)
            filled += own
        else:
            waves.append([group])
            filled = own
    return Plan(way, batch_tokens, tuple(Wave(tuple(wave)) for wave in waves), alone_beyond)


def fed_length(prompt: Prompt) -> int:
    """Tokens of a prompt and its answer that the model is fed: nothing is read at the answer's last one."""
    return len(prompt.ids) - 1


def rotary_limit(config: Any) -> int | None:
    """Length beyond which a model turns *all* positions by other angles (LongRoPE, dynamic NTK); None if it never does.

    The longest prompt of a pass then decides for all: one beyond the limit must not share its pass.
    """
    text = config.get_text_config(decoder=True)
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]  # some have one per kind of layer
    usual = getattr(text, "original_max_position_embeddings", None) or getattr(text, "max_position_embeddings", None)
    limits = [
        kind.get("original_max_position_embeddings") or usual
        for kind in kinds
        if kind.get("rope_type") == "longrope" or "dynamic" in str(kind.get("rope_type"))
    ]
    return min((limit for limit in limits if limit), default=None)


def split(
    prompts: Sequence[Prompt], members: Iterable[int], budget: int, way: Way, alone_beyond: int | None = None
) -> list[list[int]]:
    """Indices ``members`` of ``prompts`` in parts of at most ``budget`` tokens each; a part of one may exceed it."""
    limit = float("inf") if alone_beyond is None else alone_beyond
    by_length = sorted(members, key=lambda i: fed_length(prompts[i]))
    together = [i for i in by_length if fed_length(prompts[i]) <= limit]
    # by rising length: a model that grows its angles with the longest prompt so far then grows them for each
    return [*_split(prompts, together, budget, way), *([i] for i in by_length[len(together) :])]


def _split(prompts: Sequence[Prompt], members: list[int], budget: int, way: Way) -> list[list[int]]:
    if way == "tree":
        order = sorted(members, key=lambda i: prompts[i].ids[:-1])
        return _split_sorted(prompts, order, budget)
    if way == "prefix":
        by_beginning: dict[str, list[int]] = {}
        for i in members:
            by_beginning.setdefault(prompts[i].example.group, []).append(i)
        return [part for some in by_beginning.values() for part in _split_padded(prompts, some, budget, way)]
    return _split_padded(prompts, members, budget, way)


def part_tokens(prompts: Sequence[Prompt], part: Iterable[int], way: Way) -> int:
    """Tokens that one forward pass over ``part`` of ``prompts`` runs over."""
    members = list(part)
    if way == "tree":
        return sum(packed_lengths(sorted(prompts[i].ids[:-1] for i in members)))
    shared = prefix_length([prompts[i] for i in members]) if way == "prefix" else 0
    return shared + len(members) * (max(fed_length(prompts[i]) for i in members) - shared)


def prefix_length(prompts: Sequence[Prompt]) -> int:
    """Length of the common beginning that a cache is worth making for, before any row that is captured; else 0."""
    first = prompts[0].ids
    common = min(common_length(first, prompt.ids) for prompt in prompts)
    common = min(common, *(min(p.spans["question"][0], p.answer_positions.start) for p in prompts))
    return common if common * (len(prompts) - 1) > NODE_COST else 0


def _split_sorted(prompts: Sequence[Prompt], order: list[int], budget: int) -> list[list[int]]:
    parts: list[list[int]] = []
    filled = 0
    added = packed_lengths([prompts[i].ids[:-1] for i in order])
    for i, more in zip(order, added, strict=True):
        if parts and filled + more <= budget:
            parts[-1].append(i)
            filled += more
        else:
            parts.append([i])
            filled = fed_length(prompts[i])
    return parts


def _split_padded(prompts: Sequence[Prompt], members: list[int], budget: int, way: Way) -> list[list[int]]:
    shared = prefix_length([prompts[i] for i in members]) if way == "prefix" and members else 0
    parts: list[list[int]] = []
    for i in sorted(members, key=lambda i: fed_length(prompts[i]), reverse=True):
        longest = fed_length(prompts[parts[-1][0]]) - shared if parts else 0
        if parts and shared + longest * (len(parts[-1]) + 1) <= budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts
