"""The comparison of a sweep: what can be compared, what cannot and why, and the paper's claims."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from xprobe.comparison import Comparison, compare, why_not_compared
from xprobe.errors import XprobeError
from xprobe.results import Study, load_study
from xprobe.runs.folder import RunFolder
from xprobe.sweeps.claims import judge_claims
from xprobe.sweeps.folder import FORECASTS, SweepFolder


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


def compare_sweep(folder: SweepFolder) -> SweepComparison:
    """Compares all runs of a sweep that are finished and on the same questions.

    A run whose later stage failed is compared by what it has. Where runs differ in their questions, those are compared
    that agree with most others.
    """
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
    return SweepComparison(judge_claims(compare(studies), folder.plan, sizes(folder)), left_out)


def sizes(folder: SweepFolder) -> dict[str, float]:
    """Number of parameters of each model: as the plan says, otherwise as the forecast counted them."""
    try:
        forecasts = json.loads((folder.path / FORECASTS).read_bytes())
    except (OSError, ValueError):
        forecasts = {}
    found = {}
    for model in folder.plan.models:
        size = model.size or forecasts.get(model.name, {}).get("parameters")
        if size:
            found[model.name] = float(size)
    return found
