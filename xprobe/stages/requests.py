"""What the study reads of each prompt: the meaning of the names that its requests use."""

from __future__ import annotations

from collections.abc import Sequence

from xprobe.capture.requests import Each, Mean, Read, Request
from xprobe.models.parity import TeacherForced
from xprobe.qa.prompts import Prompt

ANSWER = "answer"  # rows where an answer token is predicted; the first one is the last prompt token
QUESTION = "question"  # mean over the question's own tokens


def study_request(prompt: Prompt) -> Request:
    """The request of one prompt. The last answer token is not run: nothing is read there."""
    reads: dict[str, Read] = {ANSWER: Each(tuple(prompt.answer_positions)), QUESTION: Mean(*prompt.spans["question"])}
    return Request(prompt.ids[:-1], reads, prompt.example.group)


def teacher_forced(prompts: Sequence[Prompt], count: int) -> list[TeacherForced]:
    """``count`` prompts for the parity check (all if fewer): half of them the shortest, half the longest."""
    chosen = sorted(prompts, key=lambda prompt: len(prompt.ids))
    if len(chosen) > count:
        chosen = [*chosen[: count // 2], *chosen[-(count - count // 2) :]]
    return [TeacherForced(prompt.ids[:-1], prompt.targets) for prompt in chosen]


def strategy_sample(requests: Sequence[Request]) -> list[Request]:
    """Three requests of the group with the longest one (shortest, middle, longest), and one of another group."""
    groups: dict[str, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.group, []).append(request)
    longest = max(groups.values(), key=lambda members: max(len(request.ids) for request in members))
    by_length = sorted(longest, key=lambda request: len(request.ids))
    chosen = {id(one): one for one in (by_length[0], by_length[len(by_length) // 2], by_length[-1])}
    others = [members[0] for members in groups.values() if members is not longest]
    return [*chosen.values(), *others[:1]]
