"""How answers are generated and scored: what the manifest keeps of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from xprobe.arguments import check_least
from xprobe.errors import UsageError

# normaliser -> what it does; xprobe.scoring.normalisers defines each
NORMALISERS: dict[str, str] = {
    "xprobe": "Unicode punctuation, articles by language, words by a segmenter for Chinese and Thai",
    "mlqa": "the MLQA evaluation: its seven languages only",
    "squad": "the SQuAD v1.1 evaluation: English articles, no segmentation",
}

ANSWER_COLUMNS = (
    "setting", "language", "question_id", "paragraph", "context_language", "answer", "gold", "f1", "exact_match",
    "error_type", "answer_language", "normaliser", "tokens", "stopped", "log_probability", "gold_log_probability",
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
        if self.normaliser not in NORMALISERS:
            raise UsageError(f"unknown normaliser {self.normaliser!r}; known: {', '.join(NORMALISERS)}")
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not number or not 0 < self.threshold <= 1:
            raise UsageError(f"threshold must be a number above 0 and at most 1, got {self.threshold!r}")
