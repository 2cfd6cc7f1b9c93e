"""How relevance is computed: what the manifest keeps of an attribution. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from xprobe.arguments import check_least
from xprobe.errors import UsageError

# rule -> what it does to the backward pass; xprobe.attribution.rules defines each
RULES: dict[str, str] = {
    "cp": "attention weights, norm denominators and gates are constants; conserves the relevance of logits",
    "gradient": "gradient times input, nothing is changed",
    "attnlrp": "AttnLRP: products share their relevance, the softmax keeps its gradient",
}
ATTRIBUTED: dict[str, str] = {
    "logit": "the sum of the logits of the answer's tokens",
    "log_probability": "the sum of their log-probabilities",
}
# group of tokens -> what it holds
GROUPS: dict[str, str] = {
    "question": "the question",
    "answer": "the gold answer, where it stands in the context",
    "context": "the rest of the context",
    "template": "the rest of the prompt",
    "given": "answer tokens that the model is given, before the one that is predicted",
}
RELEVANCE_COLUMNS = (
    "setting", "language", "question_id", "paragraph", "rule", "group", "tokens", "share", "mrd", "mrd_q1", "mrd_q2",
    "mrd_q3", "mrd_positive", "mrd_with_embeddings", "attributed", "y",
)  # fmt: skip
RELEVANCE_LAYER_COLUMNS = ("setting", "language", "layer", "group", "value", "lo", "hi", "n")


@dataclass(frozen=True)
class RelevanceSettings:
    """How relevance is computed.

    Parameters
    ----------
    rule : str
        One of ``RULES``.
    attributed : str
        One of ``ATTRIBUTED``.
    limit : int, optional
        Most questions, in the order in which ``limit`` of a study takes them; all by default.

    Raises
    ------
    UsageError
        A value is out of its range.

    Examples
    --------
    >>> RelevanceSettings().rule
    'cp'
    >>> RelevanceSettings(rule="lrp")
    Traceback (most recent call last):
        ...
    xprobe.errors.UsageError: unknown rule 'lrp'; known: cp, gradient, attnlrp
    """

    rule: str = "cp"
    attributed: str = "logit"
    limit: int | None = None

    def __post_init__(self) -> None:
        check_rule(self.rule)
        if not isinstance(self.attributed, str) or self.attributed not in ATTRIBUTED:
            raise UsageError(f"unknown quantity {self.attributed!r}; known: {', '.join(ATTRIBUTED)}")
        if self.limit is not None:
            check_least("limit", self.limit, 1)


def check_rule(rule: str) -> None:
    """Raises UsageError if the rule is none of ``RULES``."""
    if not isinstance(rule, str) or rule not in RULES:
        raise UsageError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
