"""What a notebook shows of a study or a comparison: headline figures and tables that take nothing from elsewhere.

Colours come from the notebook (light or dark); bars and lines are half transparent. Texts are escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xprobe.report.content import about
from xprobe.report.page import template
from xprobe.report.parts import Card, Cell, Table, cell, interval_cell, missing, number
from xprobe.report.places import shown_name
from xprobe.report.reading import cards

if TYPE_CHECKING:
    from xprobe.comparison import Comparison
    from xprobe.results import SettingResult, Study


@dataclass(frozen=True)
class Part:
    """Headline figures and tables below a line of text."""

    title: str
    cards: Sequence[Card]
    tables: Sequence[Table]


def study_html(study: Study) -> str:
    """Headline figures and layers of every setting.

    Examples
    --------
    >>> study_html(study)                                         # doctest: +SKIP
    """
    parts = [_setting(result, f"Setting {name}") for name, result in study.items()]
    return render(shown_name(study.manifest.model.name), f"{about(study)} · {study.path}", parts)


def setting_html(result: SettingResult) -> str:
    """Headline figures and layers of one setting.

    Examples
    --------
    >>> setting_html(study["en-x"])                               # doctest: +SKIP
    """
    study = result.study
    return render(f"{shown_name(study.manifest.model.name)} · {result.setting}", about(study), [_setting(result, "")])


def comparison_html(comparison: Comparison) -> str:
    """The figures of each model, and the correlations, of every setting.

    Examples
    --------
    >>> comparison_html(xprobe.compare(runs))                     # doctest: +SKIP
    """
    from xprobe.report.comparison import claims_table, correlations_table, models_table, shown

    comparison = shown(comparison)
    parts = []
    for setting in dict.fromkeys(comparison.table["setting"]):
        tables = [models_table(comparison, setting), correlations_table(comparison, setting)]
        if comparison.claims is not None:
            tables.append(claims_table(comparison.claims, setting))
        parts.append(Part(f"Setting {setting}", (), [table for table in tables if table.rows]))
    title = f"{len(comparison.studies)} models side by side"
    return render(title, "", parts, comparison.notes)


def _setting(result: SettingResult, title: str) -> Part:
    return Part(title, cards(result.study, result), [_layers(result)])


def _layers(result: SettingResult) -> Table:
    frame = result.stability
    encoded = ["encoding", "encoding − control"] if "encoding" in frame else []
    heads = ["layer", "phase", "S(l)", "readiness", *encoded, "log p", "rank", "entropy"]
    rows = [list(_layer(row, bool(encoded))) for row in frame.reset_index().to_dict("records")]
    return Table("Layers", heads, rows, [True] * len(heads))


def _layer(row: dict[Any, Any], encoded: bool) -> Iterator[Cell]:
    stability = {key: row[f"stability{end}"] for key, end in {"value": "", "lo": "_lo", "hi": "_hi"}.items()}
    yield from (cell(row["layer"]), cell(row["phase"]))
    yield _with_bar(interval_cell(stability).text, row["stability"])
    yield _with_bar(number(row["readiness"]), row["readiness"])
    names = (*(("encoding", "encoding_selectivity") if encoded else ()), "log_probability")
    yield from (cell(row[name]) for name in names)
    yield Cell("–" if missing(row["rank"]) else f"{row['rank']:,.0f}")
    yield cell(row["entropy"])


def _with_bar(text: str, share: float) -> Cell:
    return Cell(text, share=None if missing(share) else min(max(share, 0.0), 1.0))


def render(title: str, text: str, parts: Sequence[Part], notes: Sequence[str] = ()) -> str:
    """A fragment of HTML: a heading, its text, and the parts below it. What is given is escaped.

    Examples
    --------
    >>> html = render("<model>", "", [Part("", (), [Table("Runs", ["run"], [[Cell("before")]])])])
    >>> "&lt;model&gt;" in html, html.count("<tr>")
    (True, 2)
    """
    return template("notebook.html.j2").render(title=title, about=text, parts=parts, notes=notes)
