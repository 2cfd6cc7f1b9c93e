"""Several runs on the same questions side by side: figures of each model, and how they relate over models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xprobe.arguments import check_instance
from xprobe.errors import UsageError
from xprobe.phases.across_models import METHODS, Drawn, correlation, mean_of, median_of
from xprobe.phases.alpha import drawn_alphas
from xprobe.phases.bootstrap import ClusterBootstrap, Estimate
from xprobe.phases.stability import in_phase_two, pairwise_agreement
from xprobe.results import SettingResult, Study, load_study

if TYPE_CHECKING:
    import pandas as pd

# figure -> what it says of a model; those of PERFORMANCE are correlated with all others
FIGURES: dict[str, str] = {
    "stability": "mean of S(l) over layers",
    "alpha": "phasing stability (Krippendorff's alpha of the onsets)",
    "relative_boundary": "median retrieval onset, as a share of the layers",
    "readiness": "mean readiness at the last layer",
    "mrd_gap": "major relevance depth of the answer less that of the question, in layers (`xprobe attribute`)",
    "f1": "mean F1 of the answers (`xprobe evaluate`)",
    "exact_match": "share of answers that match exactly",
    "oracle_f1": "mean F1 of the evidence of the own answers (`xprobe oracle`)",
}
PERFORMANCE = ("f1", "exact_match")
CORRELATIONS = ("setting", "performance", "figure", "method", "value", "lo", "hi", "models")  # columns
CAUSAL = "relative_causal_boundary"  # has an interval of its own, and takes no part in correlations


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs side by side; ``xprobe.compare`` makes it.

    Attributes
    ----------
    studies : dict of str to Study
        By the name that the tables use: that of the model, with the run folder where two are the same.
    table : DataFrame
        One row per setting and model: n, and every figure of ``FIGURES`` with _lo and _hi (95 %, over paragraphs).
    languages : DataFrame
        One row per setting, model and language: n, boundary, relative_boundary, phased_fraction, f1, exact_match.
    correlations : DataFrame
        One row per setting, figure of ``PERFORMANCE``, other figure and method: value, lo, hi (over models and
        paragraphs), models. NaN with fewer than three models.
    notes : tuple of str
        What differs between the runs and may matter.
    claims : DataFrame, optional
        Of a sweep (``xprobe.sweeps.claims.judge_claims``): one row per setting and statistic.
    pairs : tuple of (str, str)
        Of a sweep: a base model, and one that was post-trained from it.
    drawn : dict of str to dict
        Setting -> model -> figure of ``FIGURES`` -> its values under the draws of paragraphs. Runs of one model are
        there once.
    """

    studies: dict[str, Study]
    table: pd.DataFrame
    languages: pd.DataFrame
    correlations: pd.DataFrame
    notes: tuple[str, ...] = ()
    claims: pd.DataFrame | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    drawn: dict[str, dict[str, dict[str, Drawn]]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``xprobe compare --json`` prints them. None where a figure could not be computed."""
        names = ("table", "languages", "correlations", *(["claims"] if self.claims is not None else []))
        tables = {name: getattr(self, name) for name in names}
        return {
            "runs": {name: str(study.path) for name, study in self.studies.items()},
            **{name: [_plain(row) for row in frame.to_dict("records")] for name, frame in tables.items()},
            "notes": list(self.notes),
        }

    def to_html(self, path: str | Path) -> Path:
        """Writes a page of its own, as ``Study.to_html``.

        Raises
        ------
        UsageError
            The file cannot be written there.
        """
        page = import_module("xprobe.report.comparison")  # it reads comparisons, so they cannot import it
        return page.write_comparison(self, path)

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.studies)})"

    def _repr_html_(self) -> str:
        return import_module("xprobe.report.notebook").comparison_html(self)


def compare(runs: Sequence[str | Path | Study] | Mapping[str, str | Path | Study]) -> Comparison:
    """Puts finished runs on the same questions side by side.

    Parameters
    ----------
    runs : sequence of path or Study, or mapping
        At least two. The settings that all of them have are compared. A mapping gives each run the name that the tables
        use.

    Returns
    -------
    Comparison

    Raises
    ------
    UsageError
        Fewer than two runs, or runs that cannot be compared: other data, questions, languages or wording of the prompt,
        or no setting in common. The message names the difference.
    RunFolderError
        A run is not finished or was changed.

    Examples
    --------
    >>> import xprobe
    >>> comparison = xprobe.compare(["runs/base", "runs/instruct"])     # doctest: +SKIP
    >>> comparison.table[["model", "setting", "stability", "f1"]]       # doctest: +SKIP
    """
    import pandas as pd

    if isinstance(runs, str | Path | Study):
        raise UsageError("runs must be a list of at least two runs")
    given = list(runs.values()) if isinstance(runs, Mapping) else runs
    studies = [run if isinstance(run, Study) else load_study(run) for run in given]
    if len(studies) < 2:
        raise UsageError(f"a comparison needs at least two runs, got {len(studies)}")
    for study in studies:
        check_instance("runs", study, Study)
    names = list(runs) if isinstance(runs, Mapping) else _names(studies)
    named = dict(zip(names, studies, strict=True))
    settings = _check(named)
    first = studies[0].manifest.study
    rows: list[dict[str, Any]] = []
    languages: list[dict[str, Any]] = []
    correlations: list[dict[str, Any]] = []
    drawn: dict[str, dict[str, dict[str, Drawn]]] = {}
    for setting in settings:
        results = {name: study[setting] for name, study in named.items()}
        paragraphs = sorted({one for result in results.values() for one in result.examples["paragraph"]})
        bootstrap = ClusterBootstrap(np.array(paragraphs), first.bootstrap, first.seed)
        place = {paragraph: number for number, paragraph in enumerate(paragraphs)}
        for name, result in results.items():
            members = result.examples["paragraph"].map(place).to_numpy()
            rows.append(_row(setting, name, result, _estimates(result, members, bootstrap)))
        languages += [row for name, result in results.items() for row in _languages(setting, name, result)]
        models = dict.fromkeys(_same_models(named).values())  # each of them once
        drawn[setting] = {name: dict(_figures(results[name], place, bootstrap)) for name in models}
        correlations += _correlations(setting, drawn[setting], first.seed)
    return Comparison(
        named, pd.DataFrame(rows), pd.DataFrame(languages),
        pd.DataFrame(correlations, columns=list(CORRELATIONS)),
        tuple(_notes(named)), drawn=drawn,
    )  # fmt: skip


def _names(studies: Sequence[Study]) -> list[str]:
    """A short name for each run: that of its model, with its folder where several have the same."""
    names = [Path(study.manifest.model.name).name or study.manifest.model.name for study in studies]
    if len(set(names)) < len(names):
        names = [
            name if names.count(name) == 1 else f"{name} ({study.path.name})"
            for name, study in zip(names, studies, strict=True)
        ]
    if len(set(names)) < len(names):
        names = [f"{name} #{number}" for number, name in enumerate(names, 1)]
    return names


def _check(named: dict[str, Study]) -> list[str]:
    """The settings that all runs have. Refuses runs on other questions."""
    (name, first), *others = named.items()
    for other, study in others:
        if (reason := why_not_compared(study, first)) is not None:
            raise UsageError(
                f"{other} and {name} cannot be compared: {reason}. Run both models on the same questions, with the "
                "same languages and template"
            )
    settings = [setting for setting in first.settings if all(setting in study.settings for _, study in others)]
    if not settings:
        held = "; ".join(f"{name}: {', '.join(study.settings)}" for name, study in named.items())
        raise UsageError(f"these runs have no setting in common ({held})")
    return settings


_OF_DATA = ("the data", "the content of the data")  # the same records may come from elsewhere


def why_not_compared(one: Study, other: Study) -> str | None:
    """What keeps two runs from being compared, in words; None if they can be."""
    same_records, theirs = one.manifest.data.same_records(other.manifest.data), _questions(other)
    for what, value in _questions(one).items():
        if value != theirs[what] and not (same_records and what in _OF_DATA):
            return f"{what} differs ({_difference(value, theirs[what])})"
    return None


def _questions(study: Study) -> dict[str, Any]:
    """What must be the same in all runs."""
    manifest = study.manifest
    return {
        "the data": [manifest.data.name],
        "the set of languages": sorted({str(one) for one in study.examples["language"]}),
        "the selection of questions": dict(sorted(manifest.selection.items())),
        "the content of the data": manifest.data.files_sha256,
        "the wording of the prompt": manifest.template_sha256,
    }


def _difference(one: Any, other: Any) -> str:
    """Two values that differ, in words; of mappings only what differs, of checksums the beginning."""
    if isinstance(one, dict):
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        return "; ".join(f"{name}: {one.get(name)} and {other.get(name)}" for name in names)
    if isinstance(one, str):
        return f"checksums {one[:12]} and {other[:12]}"
    return f"{', '.join(one)} and {', '.join(other)}"


# later stage -> settings that its metrics depend on
_SETTINGS = {
    "answers": ("max_new_tokens", "normaliser", "threshold"),
    "oracle": ("removal", "spans", "without_question", "normaliser", "limit"),
    "relevance": ("rule", "attributed", "limit"),
    "patching": ("pairs", "cross", "controls", "limit"),
}


def _notes(named: dict[str, Study]) -> Iterator[str]:
    """What differs without being refused."""
    differing: dict[str, Callable[[Study], Any]] = {
        "lens": lambda study: study.lens,
        "chat template": lambda study: "used" if study.manifest.prompt["chat"] else "not used",
        "number of examples": lambda study: study.manifest.counts.examples,
    }
    for stage, names in _SETTINGS.items():
        differing |= {f"{name} of the stage {stage}": partial(_setting_of, stage, name) for name in names}
    for key, other in _same_models(named).items():
        if key != other:
            yield f"{key} and {other} are the same model: correlations count it once, as {other}"
    for what, of in differing.items():
        values = {key: of(study) for key, study in named.items()}
        if len({str(value) for value in values.values() if value is not None}) > 1:
            yield f"{what} differs: " + ", ".join(f"{key} {value}" for key, value in values.items())


def _same_models(named: dict[str, Study]) -> dict[str, str]:
    """For each run the first one of the same model."""
    first: dict[str, str] = {}
    return {name: first.setdefault(study.manifest.model.files_sha256, name) for name, study in named.items()}


def _setting_of(stage: str, name: str, study: Study) -> str | None:
    """A setting of a later stage; None if the run lacks the stage."""
    entry = study.manifest.stages.get(stage)
    return None if entry is None or name not in entry.results else str(entry.results[name])


def _figures(result: SettingResult, place: dict[str, int], bootstrap: ClusterBootstrap) -> Iterator[tuple[str, Drawn]]:
    """Every figure of a model that its stages give, under the draws. ``place`` numbers the paragraphs."""
    examples, setting, study = result.examples, result.setting, result.study

    def members(frame: pd.DataFrame) -> Any:
        return frame["paragraph"].map(place).to_numpy()

    own, onset = members(examples), examples["onset"].to_numpy(np.float64)
    agreement, first = _agreement(result)
    yield "stability", mean_of(agreement, own[first], bootstrap)
    yield "alpha", Drawn(*drawn_alphas(onset, examples["question_id"].to_numpy(), own, bootstrap)[:2])
    yield "relative_boundary", median_of(onset / study.manifest.model.n_blocks, own, bootstrap)
    yield "readiness", mean_of(examples["readiness_last"].to_numpy(np.float64), own, bootstrap)
    if "relevance" in study.manifest.stages:
        frame = study.relevance
        wide = frame[frame["setting"] == setting].pivot_table(
            index=["paragraph", "language", "question_id"], columns="group", values="mrd"
        )
        gap = (wide["answer"] - wide["question"]).dropna().reset_index(name="gap")
        if len(gap):
            yield "mrd_gap", mean_of(gap["gap"].to_numpy(np.float64), members(gap), bootstrap)
    if "answers" in study.manifest.stages:
        answers = study.answers
        answers = answers[answers["setting"] == setting]
        for name in PERFORMANCE:
            yield name, mean_of(answers[name].to_numpy(np.float64), members(answers), bootstrap)
    if "oracle" in study.manifest.stages:
        frame = study.oracle
        frame = frame[(frame["setting"] == setting) & (frame["target"] == "own") & frame["question"]]
        if len(frame):
            yield "oracle_f1", mean_of(frame["f1"].to_numpy(np.float64), members(frame), bootstrap)


def _agreement(result: SettingResult) -> tuple[Any, Any]:
    """A_g(l) of each question, mean over layers [G], and the index of one of its examples [G]."""
    onset, questions = (result.examples[column].to_numpy() for column in ("onset", "question_id"))
    phase = in_phase_two(onset, result.study.manifest.model.n_blocks + 1)
    agreement, first = pairwise_agreement(phase, questions)
    return agreement.mean(1), first


def _row(setting: str, name: str, result: SettingResult, estimates: dict[str, Any]) -> dict[str, Any]:
    layers = result.study.manifest.model.n_blocks
    row: dict[str, Any] = {"setting": setting, "model": name, "layers": layers, "n": result.summary["n"]}
    for figure in (*FIGURES, CAUSAL):
        if figure in estimates:
            for end, key in {"": "value", "_lo": "lo", "_hi": "hi"}.items():
                value = estimates[figure][key]
                row[figure + end] = np.nan if value is None else value
    return row


def _estimates(result: SettingResult, members: Any, bootstrap: ClusterBootstrap) -> dict[str, dict[str, float | None]]:
    """The figures with their intervals: those of the stages, and two more."""
    summary, layers = result.summary, result.study.manifest.model.n_blocks
    stages = {
        stage: entry.results["settings"][result.setting]
        for stage, entry in result.study.manifest.stages.items()
        if stage in ("answers", "oracle", "relevance", "patching") and result.setting in entry.results["settings"]
    }
    found = {figure: summary[figure] for figure in ("alpha", "relative_boundary")}
    agreement, first = _agreement(result)
    for figure, values, of in (
        ("stability", agreement, members[first]),
        ("readiness", result.examples["readiness_last"].to_numpy(np.float64), members),
    ):
        value, lo, hi, _ = bootstrap.mean(values[:, None], of)
        found[figure] = Estimate(float(value[0]), float(lo[0]), float(hi[0])).to_dict()
    if "answers" in stages:
        found |= {figure: stages["answers"][figure] for figure in PERFORMANCE}
    if "oracle" in stages:
        found["oracle_f1"] = stages["oracle"]["own"]["f1"]
    if "relevance" in stages:
        found["mrd_gap"] = stages["relevance"]["gap"]
    if "patching" in stages:
        boundary = stages["patching"]["same"]["answer_boundary"]
        found[CAUSAL] = {key: None if value is None else value / layers for key, value in boundary.items()}
    return found


def _languages(setting: str, name: str, result: SettingResult) -> Iterator[dict[str, Any]]:
    stages = result.study.manifest.stages
    scores = stages["answers"].results["settings"][setting]["languages"] if "answers" in stages else {}
    for language, own in result.summary["languages"].items():
        row: dict[str, Any] = {"setting": setting, "model": name, "language": language, "n": own["n"]}
        for figure in ("boundary", "relative_boundary", "phased_fraction"):
            row[figure] = own[figure]["value"]
        if language in scores:
            row |= {figure: scores[language][figure]["value"] for figure in PERFORMANCE}
        yield row


def _correlations(setting: str, found: dict[str, dict[str, Drawn]], seed: int) -> Iterator[dict[str, Any]]:
    """Each figure of performance with each other figure, over the models that have both."""
    for performance in PERFORMANCE:
        for figure in FIGURES:
            both = [one for one in found.values() if performance in one and figure in one]
            if figure in PERFORMANCE or not both:
                continue
            for method in METHODS:
                pairs = ([one[figure] for one in both], [one[performance] for one in both])
                yield {
                    "setting": setting, "performance": performance, "figure": figure, "method": method,
                    **vars(correlation(*pairs, method, seed)), "models": len(both),
                }  # fmt: skip


def _plain(row: dict[Any, Any]) -> dict[str, Any]:
    return {str(name): None if value != value else value for name, value in row.items()}
