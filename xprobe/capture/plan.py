"""Which prompts run together: context groups (one shard each), and batches inside a group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xprobe.qa.prompts import Prompt


@dataclass(frozen=True)
class Group:
    """Prompts on one context in one setting: the unit that is computed, stored and resumed."""

    key: str
    prompts: tuple[Prompt, ...]


def group_prompts(prompts: Iterable[Prompt]) -> list[Group]:
    """Groups by setting, context language and paragraph, in order of first appearance."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.example.group, []).append(prompt)
    return [Group(key, tuple(members)) for key, members in groups.items()]


def batch_by_length(prompts: tuple[Prompt, ...], batch_tokens: int) -> list[list[int]]:
    """Indices of ``prompts`` in batches of similar length, each of at most ``batch_tokens`` tokens with padding.

    A prompt that is longer than ``batch_tokens`` on its own makes a batch of one.
    """
    batches: list[list[int]] = []
    for at in sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids), reverse=True):
        longest = len(prompts[batches[-1][0]].ids) if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(at)
        else:
            batches.append([at])
    return batches
