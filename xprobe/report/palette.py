"""The colours of the page and of the figures for papers: a thing has one colour wherever it is drawn."""

from __future__ import annotations

# Okabe and Ito's colours: people who are colour-blind tell them apart. Lines and markers tell them apart in grey
BLACK, BLUE, GREEN, VERMILLION, ORANGE, PURPLE = "#000000", "#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7"
SKY, YELLOW, GREY, PALE = "#56B4E9", "#F0E442", "#777777", "#C4C4C4"

SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)  # things without a colour of their own, in order
MAP = "cividis"  # shares by language and layer

STABILITY, PHASE_TWO = BLUE, VERMILLION
SIGNALS = {"readiness": VERMILLION, "encoding": BLUE, "entropy": GREEN, "kl": GREEN}  # by the first word of a name
BOUNDARIES = {"onset": VERMILLION, "depth": BLUE, "held": BLACK, "used": GREEN}
PATCHES = {  # (pairs, kind)
    ("same", "answer"): BLACK,
    ("same", "question"): GREEN,
    ("cross", "answer"): SKY,
    ("cross", "question"): PURPLE,
    ("same", "same_question"): GREY,
    ("same", "random"): PALE,
}
TOKENS = {"question": BLUE, "answer": VERMILLION, "context": GREEN, "template": GREY, "given": PURPLE}
STATES = {"prompt_end": BLUE, "question_mean": ORANGE}
ERROR_TYPES = {
    "correct": BLUE, "content": SKY, "wrong language": ORANGE, "gibberish": VERMILLION, "refusal": PURPLE,
    "blank": YELLOW,
}  # fmt: skip


def signal_colour(name: str) -> str:
    """The colour of a signal.

    Examples
    --------
    >>> signal_colour("encoding_selectivity") == BLUE, signal_colour("rank") == VERMILLION
    (True, True)
    """
    return SIGNALS.get(name.split("_")[0], VERMILLION)
