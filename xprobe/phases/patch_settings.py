"""How states are patched between questions: what the manifest keeps of the stage "patching". Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from xprobe.arguments import check_least

# kind -> what is put in the place of what
PATCHES: dict[str, str] = {
    "answer": "the state at the last prompt token, by that of another question on the paragraph",
    "question": "the states of the question's tokens, by those of the other question",
}
CONTROLS: dict[str, str] = {
    "same_question": "the state at the last prompt token, by that of the same question in another language",
    "other_paragraph": "the state at the last prompt token, by that of a question on another paragraph",
    "random": "the state at the last prompt token, by a random one with the same norm",
}
# pairs -> which two questions
PAIRS: dict[str, str] = {
    "same": "both questions in one language",
    "cross": "the other question is in another language",
}
# measure -> what it says of a patch, 0 (as without it) to 1 (as if the other question had been asked)
MEASURES: dict[str, str] = {
    "effect": "how far log p(other answer) - log p(own answer) moves: T for 'answer', Q for 'question'",
    "gain": "how far log p(other answer) rises",
    "loss": "how far log p(own answer) falls",
}
PATCHING_COLUMNS = (
    "setting", "paragraph", "pairs", "kind", "language", "question_id", "other_language", "other_question_id",
    "source_language", "source_question_id", "given", "layer", "own", "other", "own_before", "other_before",
    "own_outright", "other_outright",
)  # fmt: skip
PATCHING_LAYER_COLUMNS = (
    "setting", "pairs", "language", "other_language", "kind", "measure", "layer", "value", "lo", "hi", "n",
)  # fmt: skip


@dataclass(frozen=True)
class PatchSettings:
    """Which questions are patched.

    Parameters
    ----------
    pairs : int, optional
        Most pairs of questions in one language, for each paragraph and language; by default each question once.
    cross : int
        Pairs with a question in another language, for each paragraph and language. 0: none.
    controls : int
        For so many pairs in one language, on each paragraph and language, the controls are computed. 0: none.
    limit : int, optional
        Most questions, in the order in which ``limit`` of a study takes them; all by default.

    Raises
    ------
    UsageError
        A value is out of its range.

    Examples
    --------
    >>> PatchSettings().cross
    1
    >>> PatchSettings(pairs=0)
    Traceback (most recent call last):
        ...
    xprobe.errors.UsageError: pairs must be a whole number of at least 1, got 0
    """

    pairs: int | None = None
    cross: int = 1
    controls: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.pairs is not None:
            check_least("pairs", self.pairs, 1)
        check_least("cross", self.cross, 0)
        check_least("controls", self.controls, 0)
        if self.limit is not None:
            check_least("limit", self.limit, 2)
