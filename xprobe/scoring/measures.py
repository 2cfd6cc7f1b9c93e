"""F1 and exact match of an answer, as SQuAD v1.1 defines them: the best over all gold answers.

Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (arXiv 1606.05250).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from xprobe.errors import UsageError
from xprobe.scoring.letters import base_language
from xprobe.scoring.normalisers import Normaliser


class Score(NamedTuple):
    """Score of one answer."""

    f1: float
    exact_match: bool


def score(answer: str, golds: Sequence[str], language: str, normaliser: Normaliser) -> Score:
    """F1 and exact match of an answer.

    Parameters
    ----------
    answer : str
    golds : sequence of str
        All gold answers, at least one. Each measure takes the gold answer that it is best with.
    language : str
        Of the gold answers: it decides on articles and words.
    normaliser : Normaliser

    Raises
    ------
    UsageError
        There is no gold answer, the normaliser is not defined for the language, or a package for it is missing.

    Examples
    --------
    >>> from xprobe.scoring.normalisers import get_normaliser
    >>> score("the Panthers' defense", ["Panthers"], "en", get_normaliser("squad"))
    Score(f1=0.6666666666666666, exact_match=False)
    """
    if isinstance(golds, str):
        raise UsageError(f"golds must be a list of gold answers, got the text {golds!r}")
    if not golds:
        raise UsageError("golds is empty: an answer is scored against at least one gold answer")
    normaliser.check_language(language)
    own = normaliser.words(answer, language)
    blank = "" if base_language(language) in normaliser.without_blanks else " "
    scores = [_score(own, normaliser.words(gold, language), blank) for gold in golds]
    return Score(max(one.f1 for one in scores), any(one.exact_match for one in scores))


def _score(own: list[str], gold: list[str], blank: str) -> Score:
    """Two answers without words have nothing in common: F1 is 0, but they are equal, as in the SQuAD script."""
    equal = blank.join(own) == blank.join(gold)
    common = sum((Counter(own) & Counter(gold)).values())
    if equal and own:
        return Score(1.0, True)
    if not common:
        return Score(0.0, equal)
    precision, recall = common / len(own), common / len(gold)
    return Score(2 * precision * recall / (precision + recall), equal)
