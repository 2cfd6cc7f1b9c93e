"""The searches for the evidence of a run's answers, in waves, and their lines in ``oracle.jsonl``, one per example.

A line holds the context, the gold answers and the places of everything found, so that evidence is scored without the
model and the data. Steps of searches that have not ended are lines, too: a search that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from xprobe.models import loading
from xprobe.qa.prompts import Prompt
from xprobe.runs.identity import checksum_of
from xprobe.runs.lines import KeptLines
from xprobe.scoring.evidence import DEFINITION, Search, Words
from xprobe.scoring.settings import AnswerSettings, OracleSettings
from xprobe.scoring.words import Span, word_spans
from xprobe.stages.generation import answers_key, kept_answers
from xprobe.stages.opening import ExampleKey, key_of, key_of_line
from xprobe.stages.removal import MOST_TARGET_TOKENS, Case, Removal, Text, Tokens, filler_token
from xprobe.stages.run import Run

LINES = "oracle.jsonl"
ANSWERS = "answers"  # the stage that generates
MOST_SPAN = 8  # words of the evidence
WAVE = 16  # a wave of examples runs about so many times the tokens of one pass; then it is written
Line = dict[str, Any]


def answer_settings(run: Run, settings: OracleSettings) -> AnswerSettings:
    """Those of the run's answers; the defaults if it has none."""
    entry = run.manifest.stages.get(ANSWERS)
    if entry is None:
        return AnswerSettings(normaliser=settings.normaliser)
    return AnswerSettings(**{name: entry.results[name] for name in ("max_new_tokens", "normaliser", "threshold")})


def generated_answers(run: Run) -> dict[ExampleKey, Line]:
    """Every generated answer of the run, with its context and gold answers, in the order of the run."""
    kept = kept_answers(run, answer_settings(run, OracleSettings())).read()
    shared = ("setting", "paragraph", "context_language", "context")
    return {
        (line["setting"], answer["language"], answer["question_id"]): {
            **{name: line[name] for name in shared}, **answer
        }
        for line in (kept[group] for group in run.manifest.groups if group in kept)
        for answer in line["answers"]
    }  # fmt: skip


@dataclass
class _Guess(Search):
    """A search that takes the words of the gold answer for the evidence."""

    gold: Span = (0, 0)

    def take(self, drops: Sequence[float]) -> None:
        overlaps = [min(stop, self.gold[1]) - max(start, self.gold[0]) for start, stop in self.wanted()]
        super().take([float(max(0, overlap)) for overlap in overlaps])


class Searches:
    """The searches of a run, in waves: examples on one context, then on one question, lie together.

    The waves depend on the wanted examples alone, so a resumed run computes each as before.

    Parameters
    ----------
    prompts : sequence of Prompt
    generated : dict of ExampleKey to Line
        Every answer of the run (``generated_answers``).
    wanted : sequence of ExampleKey
        The answers to search the evidence of.
    settings : OracleSettings
    budget : int
        Most tokens in one pass.

    Attributes
    ----------
    wanted : dict of ExampleKey to Line
    waves : list of list of Prompt
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        generated: dict[ExampleKey, Line],
        wanted: Sequence[ExampleKey],
        settings: OracleSettings,
        budget: int,
    ) -> None:
        self.wanted = {key: generated[key] for key in wanted}
        self.waves: list[list[Prompt]] = []
        self._settings = settings
        self._longest = _longest_answers(generated.values())
        filled = 0
        for prompt in _together(prompt for prompt in prompts if key_of(prompt) in self.wanted):
            size = self._rough_tokens(prompt)
            if not self.waves or filled + size > WAVE * budget:
                self.waves.append([])
                filled = 0
            filled += size
            self.waves[-1].append(prompt)

    def cases(self, wave: Sequence[Prompt], *, guess: bool = False) -> dict[ExampleKey, list[Case]]:
        """The searches of a wave: own and gold answer, with and without the question. Equal texts share a search.

        ``guess``: the searches take the words of the gold answer for the evidence, whatever they are given.
        """
        searches: dict[Text, Search] = {}
        found: dict[ExampleKey, list[Case]] = {}
        for prompt in wave:
            example, settings = prompt.example, self._settings
            words = _words(prompt)
            gold = words.overlapping((example.answer_start, example.answer_start + len(example.answer)))
            most = self._longest[example.context_language]
            found[key_of(prompt)] = own = []
            for asked in (True, False) if settings.without_question else (True,):
                for name, ids in self._targets(prompt).items():
                    new = (
                        _Guess(words, most, settings.spans, gold=gold) if guess else Search(words, most, settings.spans)
                    )
                    case = Case(prompt, name, ids, asked, new)
                    case.search = searches.setdefault(case.text(None, Removal()), new)
                    own.append(case)
        return found

    def _targets(self, prompt: Prompt) -> dict[str, Tokens]:
        """The answers whose evidence can be searched. An answer without tokens hangs on nothing."""
        targets: dict[str, Tokens] = {"own": tuple(self.wanted[key_of(prompt)]["ids"]), "gold": prompt.targets}
        return {name: ids[:MOST_TARGET_TOKENS] for name, ids in targets.items() if ids and _words(prompt).sentences}

    def _rough_tokens(self, prompt: Prompt) -> int:
        """Tokens that the searches of an example run, roughly."""
        words, most = _words(prompt), self._longest[prompt.example.context_language]
        removals = len(words.sentences) + len(words.tokens) // max(1, len(words.sentences)) + most * (most + 1) // 2
        after = prompt.length - prompt.spans["context"][1]
        return (
            removals
            * (1 + self._settings.without_question)
            * sum(after + len(ids) for ids in self._targets(prompt).values())
        )


def _together(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Prompts on one context, then on one question, beside each other; otherwise in their order."""
    chosen = list(prompts)
    contexts: dict[str, int] = {}
    questions: dict[str, int] = {}
    for prompt in chosen:
        contexts.setdefault(prompt.example.context, len(contexts))
        questions.setdefault(prompt.example.question_id, len(questions))
    return sorted(chosen, key=lambda one: (contexts[one.example.context], questions[one.example.question_id]))


def _words(prompt: Prompt) -> Words:
    return _find_words(prompt.example.context, prompt.example.context_language, prompt.context_offsets)


@lru_cache(maxsize=16)
def _find_words(context: str, language: str, offsets: tuple[Span, ...]) -> Words:
    return Words.find(context, language, offsets)


def _longest_answers(lines: Iterable[Line]) -> dict[str, int]:
    """Words of the longest gold answer in each language, at most ``MOST_SPAN``."""
    longest: dict[str, int] = {}
    for line in lines:
        language = line["context_language"]
        count = max(len(word_spans(gold, language)) for gold in line["gold"])
        longest[language] = min(MOST_SPAN, max(longest.get(language, 1), count))
    return longest


def removal_for(settings: OracleSettings, tokenizer: Any) -> Removal:
    """What takes the place of removed tokens."""
    return Removal(filler_token(tokenizer) if settings.removal == "replace" else None)


def batch_tokens(run: Run) -> int:
    """Most tokens in one pass, on the device of this execution."""
    return run.execution.tokens_on(loading.pick_device(run.execution.device))


# -- the lines of oracle.jsonl ---------------------------------------------------------------------------------------


def oracle_key(run: Run, settings: OracleSettings) -> str:
    """Checksum of everything that the evidence of an example depends on."""
    parts = {"answers": answers_key(run, answer_settings(run, settings)), "definition": DEFINITION}
    names = ("removal", "spans", "without_question")
    return checksum_of(parts | {name: getattr(settings, name) for name in names})


def kept_evidence(run: Run, settings: OracleSettings) -> KeptLines:
    """The lines of these settings in ``oracle.jsonl``, by example; and steps of searches, which have no name."""
    return KeptLines(run.folder.path / LINES, oracle_key(run, settings), key_of_line)


def evidence_line(generated: Line, prompt: Prompt, cases: Sequence[Case]) -> Line:
    """The line of one example: what was found, as places in the context, and what scoring needs."""
    names = ("setting", "language", "question_id", "paragraph", "context_language", "context", "gold", "answer")
    words = _words(prompt)
    return {
        **{name: generated[name] for name in names},
        "answer_start": prompt.example.answer_start,
        "words": words.characters,
        "sentences": [words.characters_of(span) for span in words.sentences],
        "searches": [_found(case) for case in cases],
    }


def _found(case: Case) -> Line:
    search, place = case.search, case.search.words.characters_of
    drops = [[*place(span), round(drop, 5)] for step in search.steps for span, drop in step.items()]
    return {
        "target": case.name,
        "question": case.asked,
        "log_probability": case.log_probability,
        "sentence": place(search.sentence.span),
        "sentence_drop": search.sentence.drop,
        "evidence": place(search.evidence.span),
        "words": search.evidence.span[1] - search.evidence.span[0],
        "drop": search.evidence.drop,
        **({"drops": drops} if case.asked else {}),
    }
