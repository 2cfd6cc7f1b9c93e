"""Prompts with words of the context removed, and the log-probability of an answer after each.

A prompt with a removed span shares its beginning, up to the removal, with every other prompt on the same context. So
all removals of a wave of examples run together, on the packed tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from xprobe.capture.plan import Strategy, part_tokens, split
from xprobe.capture.requests import Each, Request
from xprobe.qa.prompts import Prompt
from xprobe.scoring.evidence import Search
from xprobe.scoring.words import Span

Tokens = tuple[int, ...]
Text = tuple[Tokens, Tokens]  # prompt, and the answer that follows it
FILLERS = (" _", "_", "…", "-")  # the first that is one token takes the place of removed tokens, if there is no mask
MOST_TARGET_TOKENS = 32  # of an answer; a longer one counts by its beginning


@dataclass(frozen=True)
class Removal:
    """How tokens are removed: nothing takes their place, or the token ``filler`` that of each."""

    filler: int | None = None

    def without(self, ids: Tokens, spans: Sequence[Span]) -> Tokens:
        """``ids`` without the tokens of ``spans``.

        Examples
        --------
        >>> Removal().without((5, 6, 7, 8), [(1, 3)]), Removal(filler=0).without((5, 6, 7, 8), [(1, 3)])
        ((5, 8), (5, 0, 0, 8))
        """
        for start, stop in sorted(spans, reverse=True):
            put = () if self.filler is None else (self.filler,) * (stop - start)
            ids = (*ids[:start], *put, *ids[stop:])
        return ids


def filler_token(tokenizer: Any) -> int:
    """The token that stands for removed ones: the mask token, or the first of ``FILLERS`` that is one token.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> filler_token(SimpleNamespace(mask_token_id=7))
    7
    """
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is not None:
        return int(mask)
    found = [tokenizer.encode(text, add_special_tokens=False) for text in FILLERS]
    return int(next((ids[0] for ids in found if len(ids) == 1), found[0][-1]))


@dataclass
class Case:
    """One search: a prompt, an answer, and whether the prompt holds the question.

    Examples
    --------
    >>> from xprobe.qa.records import Example
    >>> from xprobe.scoring.evidence import Words
    >>> example = Example("en-x", "en", "q1", "p1", "en", "Ada sold 40", "How many", "40", 9)
    >>> spans = {"context": (1, 4), "question": (4, 6), "answer_in_context": (3, 4)}
    >>> prompt = Prompt(example, (1, 11, 12, 13, 14, 15, 9, 13), 7, spans, ((0, 3), (3, 8), (8, 11)))
    >>> words = Words.find(example.context, "en", prompt.context_offsets)
    >>> case = Case(prompt, "gold", (13,), asked=False, search=Search(words, most=2))
    >>> case.text(None, Removal()), case.text((1, 3), Removal())
    (((1, 11, 12, 13, 9), (13,)), ((1, 11, 9), (13,)))
    """

    prompt: Prompt
    name: str  # of the answer: "own" or "gold"
    target: Tokens
    asked: bool
    search: Search
    log_probability: float = float("nan")  # with nothing removed
    _whole: Tokens = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ids = self.prompt.ids[: self.prompt.length]
        self._whole = ids if self.asked else Removal().without(ids, [self.prompt.spans["question"]])

    def text(self, span: Span | None, removal: Removal) -> Text:
        """The text without the words of ``span``."""
        if span is None:
            return self._whole, self.target
        start, stop = self.search.words.tokens_of(span)
        first = self.prompt.spans["context"][0]
        question = self.prompt.spans["question"]
        if not self.asked and question[0] < first:
            first -= question[1] - question[0]
        return removal.without(self._whole, [(first + start, first + stop)]), self.target


def run_searches(cases: Sequence[Case], removal: Removal, measure: Callable[[list[Text]], Sequence[float]]) -> None:
    """Runs the searches of all cases to their ends, step by step together. Texts that are equal are measured once.

    Parameters
    ----------
    cases : sequence of Case
        Cases with equal texts may share one ``Search``.
    removal : Removal
    measure : callable (texts) -> sequence of float
        The log-probability of each answer after its prompt.
    """
    known: dict[Text, float] = {}
    searches = {id(case.search): case for case in cases}
    while any((wanted := {key: case.search.wanted() for key, case in searches.items()}).values()):
        texts = {case.text(None, removal): None for case in cases}
        for key, spans in wanted.items():
            texts |= {searches[key].text(span, removal): None for span in spans}
        missing = [text for text in texts if text not in known]
        known |= dict(zip(missing, measure(missing), strict=True))
        for case in cases:
            case.log_probability = known[case.text(None, removal)]
        for key, spans in wanted.items():
            case = searches[key]
            if spans:
                case.search.take([case.log_probability - known[case.text(span, removal)] for span in spans])


def count_tokens(texts: Sequence[Text], batch_tokens: int, strategy: Strategy, max_shared_tokens: int | None) -> int:
    """Tokens that the forward passes over ``texts`` run."""
    requests = [Request((*prompt, *answer[:-1]), {"answer": Each((len(prompt) - 1,))}) for prompt, answer in texts]
    parts = split(requests, range(len(requests)), batch_tokens, strategy, max_shared_tokens)
    return sum(part_tokens(requests, part, strategy) for part in parts)
