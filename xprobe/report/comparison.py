"""The page of a comparison: several models side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.comparison import CAUSAL, FIGURES
from xprobe.report import charts
from xprobe.report.page import render, write_html
from xprobe.report.parts import (
    ALL,
    Cell,
    Figure,
    Group,
    Section,
    Table,
    figure,
    interval_cell,
    missing,
    records,
    short,
)
from xprobe.report.places import shown_name, shown_names, without_folders

if TYPE_CHECKING:
    import pandas as pd

    from xprobe.comparison import Comparison

NAMES = {
    "stability": "stability", "alpha": "alpha", "relative_boundary": "boundary / L", CAUSAL: "causal boundary / L",
    "readiness": "readiness", "mrd_gap": "MRD gap", "f1": "F1", "exact_match": "exact match", "oracle_f1": "oracle F1",
}  # fmt: skip
SCREEN = ("layers", "examples", "MRD gap", "exact match", "oracle F1")  # columns that a printed page leaves out


def comparison_page(comparison: Comparison) -> str:
    """The page as HTML."""
    comparison = shown(comparison)
    settings = list(dict.fromkeys(comparison.table["setting"]))
    parts = [_setting(comparison, setting) for setting in settings]
    notes = [Cell(note) for note in comparison.notes]
    runs = [[Cell(name, name), Cell(study.path.resolve().name)] for name, study in comparison.studies.items()]
    about = Group("run", "About these runs")
    about.sections.append(Section("run-facts", "Runs", "", (), [Table("Runs", ["model", "run folder"], runs)]))
    if notes:
        rows = [[note] for note in notes]
        about.sections.append(Section("run-warnings", "Warnings", "", (), [Table("Warnings", ["warning"], rows)]))
    first = next(iter(comparison.studies.values())).manifest
    data = shown_name(first.data.name)
    text = f"{data} · {first.counts.paragraphs} paragraphs · {first.counts.languages} languages"
    return render(f"{len(comparison.studies)} models side by side", text, [*parts, about], len(notes))


def write_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Writes ``comparison_page`` into a file; errors as ``xprobe.report.page.write_page``."""
    return write_html(comparison_page(comparison), path)


def shown(comparison: Comparison) -> Comparison:
    """The comparison with names of runs as others see them: without folders."""
    names = shown_names(comparison.studies)

    def renamed(text: str) -> str:
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(name, names[name]) if names[name] != name else text
        return without_folders(text)

    return replace(
        comparison,
        studies={names[name]: study for name, study in comparison.studies.items()},
        table=comparison.table.replace({"model": names}),
        languages=comparison.languages.replace({"model": names}),
        notes=tuple(map(renamed, comparison.notes)),
        pairs=tuple((names[base], names[tuned]) for base, tuned in comparison.pairs),
    )


def models_table(comparison: Comparison, setting: str) -> Table:
    """The figures of every model."""
    table = comparison.table[comparison.table["setting"] == setting]
    present = _present(table)
    rows = [
        [
            Cell(row["model"], row["model"]), Cell(str(row["layers"]), row["layers"]), Cell(str(row["n"]), row["n"]),
            *(interval_cell(_estimate(row, name)) for name in present),
        ]
        for row in table.to_dict("records")
    ]  # fmt: skip
    heads = ["model", "layers", "examples", *(NAMES[name] for name in present)]
    return Table("Models side by side", heads, rows, [False] + [True] * (len(heads) - 1), SCREEN)


def correlations_table(comparison: Comparison, setting: str) -> Table:
    """How the figures correlate with F1 and exact match over the models, where they can be computed."""
    own = comparison.correlations[comparison.correlations["setting"] == setting]
    rows = [
        [
            Cell(NAMES[row["performance"]], row["performance"]), Cell(NAMES[row["figure"]], row["figure"]),
            Cell(row["method"], row["method"]), interval_cell(_plain(row)), Cell(str(row["models"]), row["models"]),
        ]
        for row in own.to_dict("records") if not missing(row["value"])
    ]  # fmt: skip
    heads = ["performance", "metric", "method", "correlation", "models"]
    return Table("Correlations", heads, rows, [False, False, False, True, True])


def _present(table: pd.DataFrame) -> list[str]:
    """The figures that at least one model has."""
    return [name for name in NAMES if name in table and table[name].notna().any()]


def _setting(comparison: Comparison, setting: str) -> Group:
    group = Group(setting, f"Setting {setting}")
    table = comparison.table[comparison.table["setting"] == setting]
    present = _present(table)
    text = "; ".join(f"{NAMES[name]}: {FIGURES[name]}" for name in present if name in FIGURES) + "."
    group.sections.append(
        Section(
            f"{setting}-models", "Models", text.replace("`", ""), _curves(comparison, setting),
            [models_table(comparison, setting)],
        )
    )  # fmt: skip
    if "f1" in present:
        group.sections.append(_performance(comparison, setting, table))
    group.sections.append(_languages(comparison, setting))
    if comparison.pairs:
        group.sections.append(_pairs(comparison, setting))
    if comparison.claims is not None:
        group.sections.append(_claims(comparison.claims, setting))
    return group


def _estimate(row: Mapping[Any, Any], name: str) -> dict[str, float | None]:
    ends = {"value": "", "lo": "_lo", "hi": "_hi"}
    return {key: None if missing(value := row.get(name + end)) else value for key, end in ends.items()}


def _curves(comparison: Comparison, setting: str) -> list[Figure]:
    """Stability and readiness of every model over relative depth."""
    figures = []
    for signal, title in (("stability", "S(l)"), ("readiness", "Readiness")):
        rows: list[dict[str, Any]] = []
        for name, study in comparison.studies.items():
            frame = study[setting].signals.reset_index()
            frame = frame[(frame["signal"] == signal) & (frame["language"] == ALL)]
            frame = frame.assign(depth=frame["layer"] / study.manifest.model.n_blocks, series=name)
            rows += [row for row in records(frame, ("series", "depth", "value", "lo", "hi")) if "value" in row]
        series = list(comparison.studies)
        chart = charts.lines(rows, series, title if signal == "stability" else signal, domain=(0, 1), depth=True)
        caption = "Depth is the layer as a share of the model's layers. Bands: 95 % intervals over paragraphs."
        figures.append(
            figure(f"{setting}-{signal}", f"{title} by depth", caption, chart, rows, "series depth value lo hi")
        )
    return figures


def _performance(comparison: Comparison, setting: str, table: pd.DataFrame) -> Section:
    figures = []
    for name in ("stability", "alpha", "relative_boundary", "readiness"):
        points = [
            {"model": row["model"], name: short(row[name]), "f1": short(row["f1"])}
            for row in table.to_dict("records")
            if not missing(row.get(name)) and not missing(row.get("f1"))
        ]
        if points:
            chart = charts.scatter(points, name, NAMES[name], "f1", "F1", label="model")
            figures.append(
                figure(f"{setting}-f1-{name}", f"F1 and {NAMES[name]}", "One point for each model.", chart, points,
                       f"model {name} f1")
            )  # fmt: skip
    text = (
        "Correlations over models, with 95 % intervals over models and paragraphs. Fewer than six models are too few "
        "for an interval, fewer than three for a correlation."
    )
    correlations = correlations_table(comparison, setting)
    tables = [correlations] if correlations.rows else []
    return Section(f"{setting}-performance", "Performance", text, figures, tables)


def _plain(row: Mapping[Any, Any]) -> dict[str, float | None]:
    return {key: None if missing(row[key]) else row[key] for key in ("value", "lo", "hi")}


def _pairs(comparison: Comparison, setting: str) -> Section:
    """Curves of post-trained models less those of their base models, layer by layer."""
    figures = []
    names = [f"{tuned} − {base}" for base, tuned in comparison.pairs]
    titles = {"readiness": "readiness", "stability": "S(l)", "encoding_selectivity": "encoding (sel.)"}
    for signal, title in titles.items():
        rows: list[dict[str, Any]] = []
        for name, (base, tuned) in zip(names, comparison.pairs, strict=True):
            before, after = (comparison.studies[model][setting].signals["value"] for model in (base, tuned))
            if signal not in before.index or signal not in after.index:
                continue
            changes = after[signal][ALL] - before[signal][ALL]  # NaN where only one of them has the layer
            rows += [
                {"series": name, "depth": layer / (len(changes) - 1), "value": short(value)}
                for layer, value in changes.items()
                if len(before[signal][ALL]) == len(after[signal][ALL]) and not missing(value)
            ]
        if rows:
            chart = charts.lines(rows, names, f"change of {title}", depth=True)
            columns = "series depth value"
            figures.append(figure(f"{setting}-pairs-{signal}", f"Change of {title}", "", chart, rows, columns))
    text = "Each post-trained model less its base model, layer by layer; pairs with the same number of layers only."
    return Section(f"{setting}-pairs", "Base and post-trained models", text, figures)


def claims_table(claims: pd.DataFrame, setting: str) -> Table:
    """The claims of the paper, with statistic, interval and verdict."""
    rows = [
        [
            Cell(f"{row['claim']}. {row['text']}", row["claim"]), Cell(row["statistic"]), interval_cell(_plain(row)),
            Cell(str(row["models"]), row["models"]), Cell(f"{row['verdict']}: {row['reason']}"),
        ]
        for row in claims[claims["setting"] == setting].to_dict("records")
    ]  # fmt: skip
    heads = ["claim", "statistic", "value", "n", "verdict"]
    return Table("Claims", heads, rows, [False, False, True, True, False])


def _claims(claims: pd.DataFrame, setting: str) -> Section:
    text = (
        "What these models say about the claims of the paper on many models. A claim is supported or refuted only if "
        "the whole 95 % interval over models says so; n counts models, or pairs of models."
    )
    return Section(f"{setting}-claims", "Claims of the paper", text, (), [claims_table(claims, setting)])


def _languages(comparison: Comparison, setting: str) -> Section:
    frame = comparison.languages[comparison.languages["setting"] == setting]
    figures = []
    for name, title in (("relative_boundary", "boundary / L"), ("f1", "F1")):
        if name in frame and frame[name].notna().any():
            rows = [
                row for row in records(frame.rename(columns={name: "value"}), ("model", "language", "value", "n"))
                if "value" in row
            ]  # fmt: skip
            languages = list(dict.fromkeys(frame["language"]))
            chart = charts.cells(rows, languages, list(comparison.studies), title)
            figures.append(
                figure(f"{setting}-languages-{name}", f"{title[0].upper()}{title[1:]} by language", "", chart, rows,
                       "model language value n")
            )  # fmt: skip
    return Section(f"{setting}-languages", "Languages", "", figures)
