"""Which questions are patched into which: pairs on one paragraph, and the controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from xprobe.capture.tree import common_length
from xprobe.phases.patch_settings import PatchSettings
from xprobe.qa.prompts import Prompt
from xprobe.runs.identity import checksum_of
from xprobe.stages.opening import ExampleKey, key_of


@dataclass(frozen=True)
class Pair:
    """Two questions on one paragraph whose answers differ in a token.

    Attributes
    ----------
    own, other : Prompt
        The prompt that is run, and the one whose states are put into it.
    pairs : str
        One of ``xprobe.phases.patch_settings.PAIRS``.
    controls : dict of str to Prompt or int
        By kind, the prompt whose state is taken instead; for "random" a seed.
    """

    own: Prompt
    other: Prompt
    pairs: str
    controls: dict[str, Prompt | int] = field(default_factory=dict)

    @property
    def given(self) -> tuple[int, ...]:
        """Tokens with which both answers begin. The prompts are run with them: the next token tells the two apart."""
        return self.own.targets[: common_length(self.own.targets, self.other.targets)]

    @property
    def answers(self) -> tuple[int, int]:
        """The first token that is another one in the other answer, and that token."""
        return self.own.targets[len(self.given)], self.other.targets[len(self.given)]

    @property
    def key(self) -> tuple[ExampleKey, ExampleKey]:
        """The names of both examples."""
        return key_of(self.own), key_of(self.other)


def choose_pairs(prompts: Sequence[Prompt], settings: PatchSettings, seed: int) -> list[Pair]:
    """Pairs of every paragraph and language, the same for the same prompts, settings and seed.

    On each paragraph the questions stand in a random order; each is paired with the next one whose answer differs in
    a token. Other languages take turns over the paragraphs.

    Examples
    --------
    >>> from xprobe.qa.records import Example
    >>> def prompt(language, question, token):
    ...     example = Example("en-x", language, question, "p1", "en", "Ada sold 40", question, "40", 9)
    ...     return Prompt(example, (1, 2, token), 2, {"question": (1, 2)})
    >>> prompts = [prompt(language, f"q{i}", i) for language in ("en", "de") for i in range(3)]
    >>> pairs = choose_pairs(prompts, PatchSettings(), seed=0)
    >>> [(pair.pairs, pair.own.example.language, pair.other.example.language) for pair in pairs].count(
    ...     ("same", "en", "en"))
    3
    >>> sum(pair.pairs == "cross" for pair in pairs)
    2
    """
    groups: dict[str, dict[str, dict[str, Prompt]]] = {}
    for prompt in prompts:
        languages = groups.setdefault(prompt.example.group, {})
        languages.setdefault(prompt.example.language, {})[prompt.example.question_id] = prompt
    every = list(groups.values())
    found: list[Pair] = []
    turns: Counter[str] = Counter()
    for languages in every:
        setting = next(iter(next(iter(languages.values())).values())).example.setting
        turn = turns[setting]
        turns[setting] += 1
        spoken = list(languages)
        order = _order([question for own in languages.values() for question in own], seed)
        for place, language in enumerate(spoken):
            own = [languages[language][question] for question in order if question in languages[language]]
            found += _in_one_language(own, settings, languages, every, turn, seed)
            taken: set[tuple[ExampleKey, ExampleKey]] = set()
            others = spoken[place + 1 :] + spoken[:place]
            cross = 0
            for step in range(len(others) * len(own)):
                if cross == settings.cross:
                    break
                one = own[(turn + step) % len(own)]
                theirs = languages[others[(turn + step + step // len(own)) % len(others)]]
                partner = _partner(one, [theirs[question] for question in order if question in theirs], order)
                if partner is not None and (key_of(one), key_of(partner)) not in taken:
                    found.append(Pair(one, partner, "cross"))
                    taken.add(found[-1].key)
                    cross += 1
    return found


def _order(questions: Sequence[str], seed: int) -> list[str]:
    """Different questions in a random order that depends on them and the seed alone."""
    names = list(dict.fromkeys(questions))
    generator = np.random.default_rng([seed, int(checksum_of({"questions": names})[:12], 16)])
    return [names[i] for i in generator.permutation(len(names))]


def _partner(prompt: Prompt, candidates: Sequence[Prompt], order: Sequence[str]) -> Prompt | None:
    """The next question after that of ``prompt`` whose answer differs in a token; None if there is none."""
    place = {question: i for i, question in enumerate(order)}
    start = place[prompt.example.question_id]
    turned = sorted(candidates, key=lambda one: (place[one.example.question_id] - start - 1) % len(order))
    different = (one for one in turned if one.example.question_id != prompt.example.question_id)
    return next((one for one in different if _differ(one.targets, prompt.targets)), None)


def _differ(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two answers differ in a token before one of them ends."""
    return common_length(one, other) < min(len(one), len(other))


def _in_one_language(
    own: Sequence[Prompt],
    settings: PatchSettings,
    languages: dict[str, dict[str, Prompt]],
    every: Sequence[dict[str, dict[str, Prompt]]],
    turn: int,
    seed: int,
) -> list[Pair]:
    """The pairs of one paragraph and language, the first ones with controls."""
    order = [prompt.example.question_id for prompt in own]
    found: list[Pair] = []
    for prompt in own:
        if settings.pairs is not None and len(found) == settings.pairs:
            break
        partner = _partner(prompt, own, order)
        if partner is not None:
            with_controls = len(found) < settings.controls
            controls = _controls(prompt, languages, every, turn, seed) if with_controls else {}
            found.append(Pair(prompt, partner, "same", controls))
    return found


def _controls(
    prompt: Prompt,
    languages: dict[str, dict[str, Prompt]],
    every: Sequence[dict[str, dict[str, Prompt]]],
    turn: int,
    seed: int,
) -> dict[str, Prompt | int]:
    """The controls of a pair, as far as the run has other languages and paragraphs."""
    example = prompt.example
    found: dict[str, Prompt | int] = {}
    spoken = [name for name, own in languages.items() if name != example.language and example.question_id in own]
    if spoken:
        found["same_question"] = languages[spoken[turn % len(spoken)]][example.question_id]
    here = next(i for i, one in enumerate(every) if one is languages)
    for step in range(1, len(every)):
        elsewhere = every[(here + step) % len(every)].get(example.language, {})
        kin = [
            one
            for one in elsewhere.values()
            if one.example.paragraph != example.paragraph and one.example.setting == example.setting
        ]
        if kin:
            found["other_paragraph"] = kin[0]
            break
    found["random"] = int(checksum_of({"seed": seed, "example": key_of(prompt)})[:8], 16)
    return found
