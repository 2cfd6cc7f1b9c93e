"""The parts that the page of a run is made of: tables, figures, sections, and numbers as they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xprobe.report.charts import Spec

if TYPE_CHECKING:
    import pandas as pd

    from xprobe.results import SettingResult, Study

Value = Mapping[str, float | None]  # {value, lo, hi}
ALL = "all"
DIGITS = 5


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it shows, by what it is sorted, and the length of its bar (0 to 1), if it has one."""

    text: str
    sort: float | str | None = None
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """A table that can be sorted. ``numbers`` says which columns hold numbers, ``screen`` names those that a printed
    page leaves out."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: Sequence[bool] = ()
    screen: Sequence[str] = ()

    def classes(self, column: int) -> str:
        """CSS classes of the cells of a column."""
        number = "number" if self.numbers and self.numbers[column] else ""
        return f"{number} {'screen' if self.heads[column] in self.screen else ''}".strip()


@dataclass(frozen=True)
class Figure:
    """A chart, what it shows in words, and its numbers."""

    name: str
    title: str
    caption: str
    chart: Spec
    table: Table | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Card:
    """A headline figure."""

    title: str
    value: str
    detail: str = ""


@dataclass
class Group:
    """The sections of one setting, or those of the run."""

    name: str
    title: str
    cards: list[Card] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def number(value: float | None, digits: int = 3) -> str:
    """A number as the page shows it; a dash where there is none.

    Examples
    --------
    >>> number(0.12345), number(24.0), number(None), number(float("nan"))
    ('0.123', '24', '–', '–')
    """
    return "–" if missing(value) else f"{value:.{digits}g}"


def interval(found: Value | None) -> str:
    """A value with its interval, which no line break divides.

    Examples
    --------
    >>> interval({"value": 24.0, "lo": 23.0, "hi": 27.63}), interval({"value": 1.0, "lo": None, "hi": None})
    ('24 [23,\\xa027.6]', '1')
    """
    if found is None or missing(found["value"]):
        return "–"
    ends = [found.get("lo"), found.get("hi")]
    lo, hi = map(number, ends)
    return number(found["value"]) + ("" if any(map(missing, ends)) else f" [{lo},\u00a0{hi}]")


def counted(number: int, thing: str) -> str:
    """A number of things.

    Examples
    --------
    >>> counted(1, "language"), counted(3, "language")
    ('1 language', '3 languages')
    """
    return f"{number} {thing}" + ("" if number == 1 else "s")


def missing(value: float | None) -> bool:
    return value is None or value != value


def short(value: float) -> float:
    """A number with as many digits as a chart can show.

    Examples
    --------
    >>> short(0.123456789)
    0.12346
    """
    return float(f"{float(value):.{DIGITS}g}")


def cell(value: float | None, digits: int = 3) -> Cell:
    return Cell(number(value, digits), None if missing(value) else value)


def interval_cell(found: Value | None) -> Cell:
    return Cell(interval(found), None if found is None or missing(found["value"]) else found["value"])


def records(frame: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows as plain values; numbers shortened, without the names whose value is missing."""
    found = []
    for row in frame[list(names)].itertuples(index=False):
        plain: dict[str, Any] = {}
        for name, value in zip(names, row, strict=True):
            if isinstance(value, str):
                plain[name] = value
            elif not missing(value):
                plain[name] = short(value)
        found.append(plain)
    return found


def data_table(title: str, rows: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> Table:
    cells = [
        [Cell(one, one) if isinstance(one := row.get(head), str) else cell(one, DIGITS) for head in heads]
        for row in rows
    ]
    numbers = [not any(isinstance(row.get(head), str) for row in rows) for head in heads]
    return Table(title, heads, cells, numbers)


def figure(name: str, title: str, caption: str, chart: Spec, rows: Sequence[Mapping[str, Any]], heads: str) -> Figure:
    return Figure(name, title, caption, chart, data_table(f"Numbers of “{title}”", rows, heads.split()))


def stage_results(study: Study, stage: str, setting: str) -> dict[str, Any] | None:
    """What a stage found for a setting; None where it was not computed."""
    entry = study.manifest.stages.get(stage)
    return None if entry is None else entry.results["settings"].get(setting)


def languages_of(result: SettingResult) -> list[str]:
    return list(result.summary["languages"])
