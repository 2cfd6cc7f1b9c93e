"""Prompts of random tokens, alone or with common beginnings, for tests of capture and parity."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from support.families import random_ids
from xprobe.capture.requests import Request
from xprobe.lenses.reading import read_answers
from xprobe.models.parity import TeacherForced
from xprobe.qa.prompts import Prompt
from xprobe.qa.records import Example
from xprobe.stages.requests import study_request
from xprobe.stages.states import WaveReadout


def example(group: int = 0, number: int = 0) -> Example:
    return Example("en-x", "en", f"q{number}", f"p{group}", "en", "context", "question", "answer", 0)


def of_ids(ids: list[int], length: int, question: tuple[int, int], group: int = 0, number: int = 0) -> Prompt:
    return Prompt(example(group, number), tuple(ids), length, {"question": question})


def prompt(length: int, answer: int, seed: int) -> Prompt:
    """A prompt of its own, with its question at tokens 2 to 4."""
    return of_ids(random_ids(1, length + answer, seed)[0].tolist(), length, (2, 5))


def family_of_prompts(groups: int = 2, each: int = 4, seed: int = 0, vocab: int = 160) -> list[Prompt]:
    """Prompts as a study has them: one instruction, a context per group, then questions of different lengths.

    Some questions begin alike, one equals another, and one begins inside the context, so that its tokens are spread
    over shared and own parts. The longest has 52 tokens.
    """
    draw = random.Random(seed)

    def some(count: int) -> list[int]:
        return [draw.randrange(10, vocab) for _ in range(count)]

    instruction, prompts = some(9), []
    for group in range(groups):
        context = instruction + some(14 + group)
        alike = some(10)
        for number in range(each):
            question = (alike[: draw.randrange(10)] if number % 2 else []) + some(draw.randrange(1, 10))
            start = len(context) - (3 if number == 1 else 0)
            ids = context + question + some(2)
            answer = some(draw.randrange(1, 5))
            stop = len(context) + len(question)
            prompts.append(of_ids(ids + answer, len(ids), (start, stop), group, number))
        prompts.append(prompts[-1])
    return prompts


def different_prompts(groups: int = 2, each: int = 4) -> list[Prompt]:
    """``family_of_prompts`` without equal ones, with ids that tell them apart, and with the same two last tokens."""
    found = {(one.example.paragraph, one.example.question_id): one for one in family_of_prompts(groups, each)}
    return [
        replace(
            one,
            ids=(*one.ids[: one.length - 2], 7, 8, *one.targets),
            example=replace(one.example, question_id="-".join(key)),
        )
        for key, one in found.items()
    ]


def requests(prompts) -> list[Request]:
    """What the study asks of the engine for these prompts."""
    return [study_request(item) for item in prompts]


def forced(prompts) -> list[TeacherForced]:
    """The same prompts for the parity check."""
    return [TeacherForced(item.ids[:-1], item.targets) for item in prompts]


def chosen(engine, sample) -> str:
    """The strategy that an engine chooses after running ``sample``."""
    engine.choose_strategy(requests(sample))
    return engine.strategy


def readout(rows, prompts, head):
    """Lens values of captured rows."""
    return read_answers(rows["answer"], targets(prompts), head)


def targets(prompts) -> torch.Tensor:
    return torch.tensor([token for item in prompts for token in item.targets])


def by_group(prompts) -> dict[str, list[Prompt]]:
    """Prompts by the key of their group."""
    groups: dict[str, list[Prompt]] = {}
    for item in prompts:
        groups.setdefault(item.example.group, []).append(item)
    return groups


def pending(wave, rows, prompts, head, backend="auto") -> WaveReadout:
    """A wave on its way to main memory, as a run makes it."""
    return WaveReadout(rows, of_wave(wave, prompts), head, backend, True)


def of_wave(wave, prompts) -> list[Prompt]:
    """The prompts of a wave's requests."""
    groups = by_group(prompts)
    return [item for group in wave.groups for item in groups[group.key]]
