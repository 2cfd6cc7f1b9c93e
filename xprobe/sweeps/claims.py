"""The paper's claims about many models, as rows: the statistic that could refute each, and what it says here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isnan

import numpy as np
import pandas as pd

from xprobe.comparison import Comparison
from xprobe.phases.across_models import (
    FEWEST,
    FEWEST_OF_INTERVAL,
    Drawn,
    correlation,
    correlation_difference,
    mean_over_models,
)
from xprobe.phases.bootstrap import Estimate
from xprobe.results import SettingResult
from xprobe.sweeps.plan import SweepPlan

CLAIMS = {
    1: "stability correlates with performance",
    2: "encoding is there before post-training, retrieval changes with it",
    3: "the bottleneck is in the last layers of phase 2",
    4: "more pre-training alone does not help",
}
COLUMNS = ("setting", "claim", "text", "statistic", "value", "lo", "hi", "models", "verdict", "reason")
SAME = 0.05  # signals that differ by less count as the same
WEAK = 0.3  # a correlation below this is no help worth the name
METHOD = "spearman"

Figures = dict[str, dict[str, Drawn]]  # model -> figure -> values


@dataclass(frozen=True)
class Region:
    """Where the whole interval must lie. ``words`` completes "all of the interval is"."""

    words: str
    holds: Callable[[float, float], bool]


ABOVE = Region("above 0", lambda lo, hi: lo > 0)
NOT_ABOVE = Region("at or below 0", lambda lo, hi: hi <= 0)
ALIKE = Region(f"between -{SAME} and {SAME}", lambda lo, hi: lo >= -SAME and hi <= SAME)
APART = Region(f"below -{SAME} or above {SAME}", lambda lo, hi: lo > SAME or hi < -SAME)
NO_HELP = Region(f"below {WEAK}", lambda lo, hi: hi < WEAK)


@dataclass(frozen=True)
class Row:
    """One statistic of a claim.

    Attributes
    ----------
    claim : int
        Of ``CLAIMS``.
    statistic : str
        In words.
    estimate : Estimate
        With its 95 % interval.
    models : int
        How many it is of, or how many pairs.
    supported, refuted : Region
        ``refuted`` counts first.
    fewest : int
        Models that an interval needs.
    lacks : str
        What the runs, or the sweep's file, must have for this statistic.
    """

    claim: int
    statistic: str
    estimate: Estimate
    models: int
    supported: Region
    refuted: Region
    fewest: int
    lacks: str

    def verdict(self) -> tuple[str, str]:
        """``supported``, ``refuted``, ``undecided`` or ``not tested``; and why.

        Examples
        --------
        >>> def verdict(lo, hi, models):
        ...     return Row(1, "", Estimate(0.5, lo, hi), models, ABOVE, NOT_ABOVE, 6, "answers").verdict()
        >>> verdict(0.4, 1.0, 8)
        ('supported', 'all of the interval is above 0')
        >>> verdict(-0.6, 0.9, 8)
        ('undecided', 'n = 8 cannot tell: the interval reaches from -0.60 to 0.90')
        >>> verdict(float("nan"), float("nan"), 4)
        ('undecided', 'n = 4 is too small for an interval, which needs 6')
        >>> Row(1, "", Estimate(*[float("nan")] * 3), 0, ABOVE, NOT_ABOVE, 6, "answers").verdict()
        ('not tested', 'needs answers')
        """
        lo, hi = self.estimate.lo, self.estimate.hi
        if isnan(self.estimate.value):
            return "not tested", f"needs {self.lacks}"
        if self.models < self.fewest:
            return "undecided", f"n = {self.models} is too small for an interval, which needs {self.fewest}"
        if isnan(lo) or isnan(hi) or lo == hi == 0:
            return "undecided", f"the draws of {self.models} models do not differ, so they give no interval"
        for verdict, region in (("refuted", self.refuted), ("supported", self.supported)):
            if region.holds(lo, hi):
                return verdict, f"all of the interval is {region.words}"
        return "undecided", f"n = {self.models} cannot tell: the interval reaches from {lo:.2f} to {hi:.2f}"


def judge_claims(comparison: Comparison, plan: SweepPlan, sizes: Mapping[str, float]) -> Comparison:
    """The comparison with its ``claims``: what the models of a sweep say about the paper's claims.

    Parameters
    ----------
    comparison : Comparison
        Of runs by their names in the plan.
    plan : SweepPlan
        Roles and bases.
    sizes : mapping of str to float
        Model -> number of parameters.
    """
    rows = []
    for setting, drawn in comparison.drawn.items():
        figures = {}
        for name, own in drawn.items():
            every = {**own, **_more_figures(comparison.studies[name][setting], own)}
            figures[name] = {figure: one for figure, one in every.items() if not isnan(one.value)}
        seed = next(iter(comparison.studies.values())).manifest.study.seed
        for row in claim_rows(figures, plan, sizes, seed):
            estimate = row.estimate
            rows.append((setting, row.claim, CLAIMS[row.claim], row.statistic, estimate.value, estimate.lo, estimate.hi,
                         row.models, *row.verdict()))  # fmt: skip
    return replace(comparison, claims=pd.DataFrame(rows, columns=list(COLUMNS)))


def claim_rows(figures: Figures, plan: SweepPlan, sizes: Mapping[str, float], seed: int) -> Iterator[Row]:
    """The rows of all claims in one setting.

    ``figures`` holds those of ``xprobe.comparison.FIGURES`` and, of each model: ``encoding`` (above its control, mean
    over layers), ``late`` (readiness, last quarter of the layers), ``phase 2, early`` and ``phase 2, late`` (readiness
    in the halves of phase 2), and ``found`` (F1 of the evidence above chance, less that of the answers).
    """
    for figure in ("stability", "alpha"):
        x, y = _both(figures, figure, "f1")
        yield Row(
            1, f"Spearman's correlation of {figure} and F1", correlation(x, y, METHOD, seed), len(x),
            ABOVE, NOT_ABOVE, FEWEST_OF_INTERVAL, f"answers of at least {FEWEST} models that differ",
        )  # fmt: skip
    bases = {name: own for name, own in figures.items() if plan[name].role == "base"}
    encodings = [own["encoding"] for own in bases.values() if "encoding" in own]
    yield Row(
        2, "encoding of base models above its control, mean over layers", mean_over_models(encodings), len(encodings),
        ABOVE, NOT_ABOVE, 2, 'models with role = "base", and their hidden rows',
    )  # fmt: skip
    pairs = [(own, figures[base]) for name, own in figures.items() if (base := plan[name].base) in figures]
    for figure, words, supported, refuted in (
        ("encoding", "encoding above its control, mean over layers", ALIKE, APART),
        ("late", "readiness in the last quarter of the layers", APART, ALIKE),
    ):
        changes = [_less(own[figure], base[figure]) for own, base in pairs if figure in own and figure in base]
        yield Row(
            2, f"change by post-training: {words}", mean_over_models(changes), len(changes),
            supported, refuted, 2, "post-trained models with base = NAME, and the model of that name",
        )  # fmt: skip
    split = {name: own for name, own in figures.items() if {"phase 2, late", "phase 2, early", "f1"} <= own.keys()}
    late, early, f1 = ([own[name] for own in split.values()] for name in ("phase 2, late", "phase 2, early", "f1"))
    yield Row(
        3, "Pearson's correlation of F1 with readiness in the second half of phase 2, less that in its first half",
        correlation_difference(late, early, f1, "pearson", seed), len(split),
        ABOVE, NOT_ABOVE, FEWEST_OF_INTERVAL, f"answers of at least {FEWEST} models that differ, with phases",
    )  # fmt: skip
    found = [own["found"] for own in figures.values() if "found" in own]
    yield Row(
        3, "F1 of the evidence above chance, less F1 of the same answers (what was found, but not said)",
        mean_over_models(found), len(found), ABOVE, NOT_ABOVE, 2, 'the stages "answers" and "oracle"',
    )  # fmt: skip
    sized = {name: own for name, own in bases.items() if name in sizes and "f1" in own}
    x = [_constant(sizes[name], own["f1"]) for name, own in sized.items()]
    yield Row(
        4, "Spearman's correlation of size and F1, base models", correlation(x, [own["f1"] for own in sized.values()],
        METHOD, seed), len(sized), NO_HELP, ABOVE, FEWEST_OF_INTERVAL,
        f'{FEWEST} models with role = "base" whose F1 and sizes (by size, or by a forecast) differ',
    )  # fmt: skip


def _more_figures(result: SettingResult, own: Mapping[str, Drawn]) -> dict[str, Drawn]:
    """Further figures of a model, without draws of paragraphs: of its curves over layers, and of its evidence."""
    template = next(iter(own.values()))
    signals = result.signals["value"].xs("all", level="language")
    readiness = signals["readiness"].to_numpy(np.float64)  # [L + 1]
    last = len(readiness) - 1
    found = {"late": readiness[-max(1, last // 4) :].mean()}
    if "encoding_selectivity" in signals.index.get_level_values("signal"):
        found["encoding"] = signals["encoding_selectivity"].to_numpy(np.float64)[1:].mean()
    boundary = result.boundary["value"]
    if boundary is not None and last - int(boundary) >= 1:
        phase_two = readiness[int(boundary) :]
        half = len(phase_two) // 2
        found |= {"phase 2, early": phase_two[:half].mean(), "phase 2, late": phase_two[half:].mean()}
    if {"answers", "oracle"} <= result.study.manifest.stages.keys():
        found["found"] = _found(result)
    return {name: _constant(float(value), template) for name, value in found.items()}


def _found(result: SettingResult) -> float:
    """Mean over answers: F1 of the evidence, less that of a random span as long, less F1 of the answer."""
    keys = ["setting", "language", "question_id"]
    oracle, answers = result.study.oracle, result.study.answers
    own = oracle[(oracle["setting"] == result.setting) & (oracle["target"] == "own") & oracle["question"]]
    both = own.merge(answers[[*keys, "f1"]], on=keys, suffixes=("", "_answer"))
    return float((both["f1"] - both["chance_f1"] - both["f1_answer"]).mean())


def _both(figures: Figures, one: str, other: str) -> tuple[list[Drawn], list[Drawn]]:
    """Two figures of the models that have both."""
    models = [own for own in figures.values() if one in own and other in own]
    return [own[one] for own in models], [own[other] for own in models]


def _less(one: Drawn, other: Drawn) -> Drawn:
    return Drawn(one.value - other.value, one.drawn - other.drawn)


def _constant(value: float, like: Drawn) -> Drawn:
    return Drawn(value, np.full(len(like.drawn), value))
