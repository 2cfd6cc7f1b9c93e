"""How answers are generated and scored, and how the oracle looks for evidence: what the manifest keeps of both."""

from __future__ import annotations

from dataclasses import dataclass

from xprobe.arguments import check_least
from xprobe.errors import UsageError

# normaliser -> what it does; xprobe.scoring.normalisers defines each
NORMALISERS: dict[str, str] = {
    "xprobe": "Unicode punctuation, articles by language, words by a segmenter where there is no whitespace",
    "mlqa": "the MLQA evaluation: its seven languages only",
    "squad": "the SQuAD v1.1 evaluation: English articles, no segmentation",
}

ANSWER_COLUMNS = (
    "setting", "language", "question_id", "paragraph", "context_language", "answer", "gold", "f1", "exact_match",
    "error_type", "answer_language", "normaliser", "tokens", "stopped", "log_probability", "gold_log_probability",
)  # fmt: skip

# removal -> what it does to the tokens of a span
REMOVALS: dict[str, str] = {
    "delete": "the tokens are left out, and those after them move up",
    "replace": "a neutral token stands in the place of each, so the length stays",
}
TARGETS: dict[str, str] = {
    "own": "the model's own answer, whatever it is",
    "gold": "the gold answer",
}
ORACLE_COLUMNS = (
    "setting", "language", "question_id", "paragraph", "context_language", "target", "question", "evidence", "start",
    "stop", "words", "drop", "log_probability", "sentence", "sentence_drop", "sentence_hit", "sentence_chance", "f1",
    "exact_match", "chance_f1", "normaliser",
)  # fmt: skip


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated and scored.

    Parameters
    ----------
    max_new_tokens : int, optional
        Most tokens of an answer. By default as many as the longest gold answer in the language of the context has, but
        32 to 128.
    normaliser : str
        One of ``NORMALISERS``.
    threshold : float
        An answer with at least this F1 counts as correct.

    Raises
    ------
    UsageError
        A value is out of its range.

    Examples
    --------
    >>> AnswerSettings(normaliser="squad").threshold
    0.5
    >>> AnswerSettings(threshold=2)
    Traceback (most recent call last):
        ...
    xprobe.errors.UsageError: threshold must be a number above 0 and at most 1, got 2
    """

    max_new_tokens: int | None = None
    normaliser: str = "xprobe"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            check_least("max_new_tokens", self.max_new_tokens, 1)
        _check_normaliser(self.normaliser)
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not number or not 0 < self.threshold <= 1:
            raise UsageError(f"threshold must be a number above 0 and at most 1, got {self.threshold!r}")


@dataclass(frozen=True)
class OracleSettings:
    """How the oracle looks for the evidence of an answer.

    Parameters
    ----------
    removal : str
        One of ``REMOVALS``.
    spans : bool
        Whether to look for words inside the best sentence. Without it the evidence is a sentence, at under a tenth of
        the cost.
    without_question : bool
        Whether to search again without the question in the prompt, as a control.
    limit : int, optional
        Most questions, in the order in which ``limit`` of a study takes them; all by default.
    normaliser : str
        One of ``NORMALISERS``.

    Raises
    ------
    UsageError
        A value is out of its range.

    Examples
    --------
    >>> OracleSettings(removal="replace").spans
    True
    >>> OracleSettings(removal="mask")
    Traceback (most recent call last):
        ...
    xprobe.errors.UsageError: unknown removal 'mask'; known: delete, replace
    """

    removal: str = "delete"
    spans: bool = True
    without_question: bool = True
    limit: int | None = None
    normaliser: str = "xprobe"

    def __post_init__(self) -> None:
        if not isinstance(self.removal, str) or self.removal not in REMOVALS:
            raise UsageError(f"unknown removal {self.removal!r}; known: {', '.join(REMOVALS)}")
        for name in ("spans", "without_question"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.limit is not None:
            check_least("limit", self.limit, 1)
        _check_normaliser(self.normaliser)


def _check_normaliser(name: str) -> None:
    if not isinstance(name, str) or name not in NORMALISERS:
        raise UsageError(f"unknown normaliser {name!r}; known: {', '.join(NORMALISERS)}")
