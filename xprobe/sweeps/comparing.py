"""The comparison of a sweep: what can be compared, what cannot and why, and the paper's claims."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xprobe.comparison import Comparison, compare, why_not_compared
from xprobe.errors import XprobeError
from xprobe.results import Study, load_study
from xprobe.runs.folder import RunFolder
from xprobe.sweeps.claims import judge_claims
from xprobe.sweeps.folder import SweepFolder
from xprobe.sweeps.forecasts import read_forecasts


@dataclass(frozen=True, eq=False)
class SweepComparison:
    """The models of a sweep side by side.

    Attributes
    ----------
    comparison : Comparison or None
        With ``claims``. None if fewer than two runs can be compared.
    left_out : dict of str to str
        Model -> why it is not in the comparison.
    """

    comparison: Comparison | None
    left_out: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``xprobe compare SWEEP --json`` prints them."""
        found = {} if self.comparison is None else self.comparison.to_dict()
        return {**found, "left_out": self.left_out}


def compare_sweep(sweep: SweepFolder | str | Path) -> SweepComparison:
    """Compares all runs of a sweep that are finished and on the same questions.

    A run whose later stage failed is compared by what it has. Where runs differ in their questions, those are compared
    that agree with most others.

    Parameters
    ----------
    sweep : SweepFolder or path

    Raises
    ------
    UsageError
        There is no sweep in the folder.

    Examples
    --------
    >>> import xprobe
    >>> found = xprobe.compare_sweep("sweeps/models")                           # doctest: +SKIP
    >>> found.comparison.claims[["claim", "value", "lo", "hi", "verdict"]]      # doctest: +SKIP
    """
    folder = sweep if isinstance(sweep, SweepFolder) else SweepFolder.open(sweep)
    studies: dict[str, Study] = {}
    left_out: dict[str, str] = {}
    for model in folder.plan.models:
        path = folder.run(model.name)
        try:
            if not path.is_dir() or not RunFolder(path).has_manifest():
                left_out[model.name] = "it has no run"
                continue
            studies[model.name] = load_study(path)
        except XprobeError as error:
            left_out[model.name] = str(error)
    if studies:
        first = max(studies, key=lambda name: sum(why_not_compared(one, studies[name]) is None
                                                  for one in studies.values()))  # fmt: skip
        for name in list(studies):
            if (reason := why_not_compared(studies[name], studies[first])) is not None:
                left_out[name] = f"not comparable with {first}: {reason}"
        studies = {name: study for name, study in studies.items() if name not in left_out}
    if len(studies) < 2:
        return SweepComparison(None, left_out)
    found = judge_claims(compare(studies), folder.plan, sizes(folder))
    notes = (*found.notes, *(f"{name} is left out: {why}" for name, why in left_out.items()))
    named = ((model.base, model.name) for model in folder.plan.models if model.base is not None)
    pairs = tuple(pair for pair in named if set(pair) <= studies.keys())
    return SweepComparison(replace(found, notes=notes, pairs=pairs), left_out)


def sizes(folder: SweepFolder) -> dict[str, float]:
    """Number of parameters of each model: as the plan says, otherwise as the forecast counted them."""
    forecasts = read_forecasts(folder.path)
    found: dict[str, float] = {}
    for model in folder.plan.models:
        if model.size is not None:
            found[model.name] = model.size
        elif model.name in forecasts:
            found[model.name] = float(forecasts[model.name].parameters)
    return found
