"""How the figures for papers look: sizes, colours, lines and markers, and the few things that all of them draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xprobe.errors import UsageError
from xprobe.report.palette import GREY, PALE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLUMN, TWO_COLUMNS = 3.3, 7.0  # inches: one column of a paper, and both

STYLE: Any = {  # matplotlib's settings
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 0.9,
    "figure.dpi": 150,
    "hatch.linewidth": 0.5,
}
TICKS = {"labelsize": 7.0, "length": 2.5, "width": 0.6}
SAVED: Any = {"pdf.fonttype": 42, "ps.fonttype": 42}  # letters stay letters: journals refuse Type 3


@dataclass(frozen=True)
class Look:
    """How one thing is drawn wherever it appears.

    Attributes
    ----------
    label : str
        In legends.
    colour : str
    line : str
        matplotlib's line style.
    marker : str
        matplotlib's marker; empty for none.
    """

    label: str
    colour: str
    line: Any = "-"
    marker: str = ""


DASHES, DOTS, DASH_DOT = (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2))
LONG_DASHES = (0, (9, 3))


def check_matplotlib() -> None:
    """Raises a UsageError if matplotlib is not installed.

    Examples
    --------
    >>> check_matplotlib()
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install 'xprobe[plot]'") from error


@contextmanager
def panels(
    count: int, size: tuple[float, float], given: Axes | Sequence[Axes] | None, *, stacked: bool = False,
    pyplot: bool = True,
) -> Iterator[list[Axes]]:  # fmt: skip
    """The Axes of one figure: those that the caller gives, or new ones in the style of this module.

    The caller's Axes keep their fonts and ticks. New ones belong to a new figure. matplotlib's settings are those of
    this module inside the block only.

    Parameters
    ----------
    count : int
        Number of panels.
    size : (float, float)
        Width and height of a new figure, in inches.
    given : Axes, sequence of Axes, or None
    stacked : bool
        Panels of a new figure stand on top of each other, and share the layers.
    pyplot : bool
        A new figure is one of pyplot, so that notebooks show it. Otherwise it belongs to nobody.

    Raises
    ------
    UsageError
        matplotlib is not installed, or the number of given Axes is not ``count``.

    Examples
    --------
    >>> with panels(2, (TWO_COLUMNS, 2.0), None, pyplot=False) as (left, right):
    ...     print(left.figure is right.figure, left.figure.get_size_inches().tolist())
    True [7.0, 2.0]
    >>> with panels(2, (TWO_COLUMNS, 2.0), [left], pyplot=False):
    ...     pass
    Traceback (most recent call last):
    xprobe.errors.UsageError: axes: this figure has 2 panels, and got 1 Axes
    """
    check_matplotlib()
    import numpy as np
    from matplotlib import interactive, is_interactive, rc_context

    if given is not None:
        own = list(np.atleast_1d(np.asarray(given, dtype=object)).ravel())
        if len(own) != count:
            raise UsageError(f"axes: this figure has {count} panels, and got {len(own)} Axes")
        yield own
        return
    with rc_context(STYLE):
        if pyplot:
            from matplotlib import pyplot as plt

            figure = plt.figure(figsize=size, layout="constrained")
        else:
            from matplotlib.figure import Figure

            figure = Figure(figsize=size, layout="constrained")
        shape = (count, 1) if stacked else (1, count)
        new = list(figure.subplots(*shape, sharex=stacked, squeeze=False).ravel())
        for axes in new:
            axes.tick_params(**TICKS)
        yield new
        shows_figures = is_interactive()  # a notebook turns this on when pyplot makes its first figure
    interactive(shows_figures)


def layer_axis(axes: Axes, n_blocks: int, name: str = "layer") -> None:
    """Layers 0 to L from left to right, with whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.02 * n_blocks, 1.02 * n_blocks)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.set_xlabel(name)


def curve(axes: Axes, table: pd.DataFrame, look: Look, **options: Any) -> None:
    """A line by layer, with markers at a few layers, and a band for the interval where the table has one.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"value": [0.0, 1.0, 1.0], "lo": [0.0, 0.8, 0.9], "hi": [0.1, 1.0, 1.0]})
    >>> with panels(1, (COLUMN, 2.0), None, pyplot=False) as (axes,):
    ...     curve(axes, table, Look("T", GREY))
    >>> axes.lines[0].get_label(), axes.lines[0].get_ydata().tolist(), len(axes.collections)
    ('T', [0.0, 1.0, 1.0], 1)
    """
    step = max(1, len(table) // 8)
    style = {"color": look.colour, "linestyle": look.line, "marker": look.marker, "label": look.label, "zorder": 3}
    axes.plot(table.index, table["value"], markevery=(step // 2, step), **(style | options))
    if "lo" in table and table[["lo", "hi"]].notna().any(axis=None):
        axes.fill_between(table.index, table["lo"], table["hi"], color=look.colour, alpha=0.18, linewidth=0, zorder=2)


def background(axes: Axes, by_language: pd.DataFrame, label: str) -> None:
    """One thin line by layer for each language (column): English dark and dashed, the others pale.

    Examples
    --------
    >>> import pandas as pd
    >>> with panels(1, (COLUMN, 2.0), None, pyplot=False) as (axes,):
    ...     background(axes, pd.DataFrame({"en": [0.0, 1.0], "de": [0.0, 0.5], "th": [0.1, 0.4]}), "other languages")
    >>> [line.get_label() for line in axes.lines]
    ['English', '_de', '_th', 'other languages']
    """
    others = [name for name in by_language if name != "en"]
    if "en" in by_language:
        english: dict[str, Any] = {"color": GREY, "linestyle": DASHES, "linewidth": 1.0, "label": "English"}
        axes.plot(by_language.index, by_language["en"], zorder=2, **english)
    for name in others:
        axes.plot(by_language.index, by_language[name], color=PALE, linewidth=0.7, zorder=1, label=f"_{name}")
    if others:
        axes.plot([], [], color=PALE, linewidth=0.7, label=label)


def numbers(entry: Mapping[str, float | None] | None) -> tuple[float, float, float]:
    """value, lo and hi of an entry of the manifest; NaN where there is none.

    Examples
    --------
    >>> numbers({"value": 24.0, "lo": None, "hi": None})
    (24.0, nan, nan)
    """
    found = [None if entry is None else entry.get(part) for part in ("value", "lo", "hi")]
    value, lo, hi = (math.nan if number is None else float(number) for number in found)
    return value, lo, hi


def with_interval(entry: Mapping[str, float | None] | None) -> str:
    """A figure and its interval as text.

    Examples
    --------
    >>> with_interval({"value": 24.0, "lo": 23.0, "hi": 24.5}), with_interval({"value": 24.0}), with_interval(None)
    ('24 [23, 24.5]', '24', 'undefined')
    """
    value, lo, hi = numbers(entry)
    if math.isnan(value):
        return "undefined"
    short = [f"{number:.1f}".removesuffix(".0") for number in (value, lo, hi)]
    return short[0] if math.isnan(lo + hi) else f"{short[0]} [{short[1]}, {short[2]}]"


def mark_layer(axes: Axes, entry: Mapping[str, float | None] | None, look: Look) -> None:
    """A vertical line at a layer, and a pale band for its interval. Nothing where the layer is not defined."""
    value, lo, hi = numbers(entry)
    if math.isnan(value):
        return
    if hi > lo:
        axes.axvspan(lo, hi, color=look.colour, alpha=0.12, linewidth=0, zorder=0)
    axes.axvline(value, color=look.colour, linestyle=look.line, linewidth=1.0, zorder=1, label=look.label)


def dots(axes: Axes, heights: Iterable[float], entries: Iterable[Mapping[str, Any] | None], look: Look) -> None:
    """A marker for each entry, from left to right by value, with a line for its interval.

    Examples
    --------
    >>> with panels(1, (COLUMN, 2.0), None, pyplot=False) as (axes,):
    ...     dots(axes, [0, 1], [{"value": 3, "lo": 2, "hi": 4}, {"value": None}], Look("onset", GREY, marker="o"))
    >>> axes.lines[0].get_xdata().tolist(), axes.lines[0].get_ydata().tolist(), len(axes.collections)
    ([3.0], [0.0], 1)
    """
    known = [(height, *numbers(entry)) for height, entry in zip(heights, entries, strict=True)]
    known = [row for row in known if not math.isnan(row[1])]
    ranges = [row for row in known if not math.isnan(row[2] + row[3])]
    if ranges:
        at, _, lo, hi = zip(*ranges, strict=True)
        axes.hlines(at, lo, hi, color=look.colour, linewidth=0.9, zorder=2)
    if known:
        at, values, _, _ = zip(*known, strict=True)
        axes.plot([float(value) for value in values], [float(height) for height in at], linestyle="",
                  marker=look.marker, color=look.colour, label=look.label, zorder=3)  # fmt: skip


def rows(axes: Axes, names: Sequence[str], name: str = "language") -> None:
    """One row for each name, from top to bottom; every second row has a pale ground."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    for row in range(1, len(names), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#F3F3F3", linewidth=0, zorder=0)
    axes.set_ylabel(name)


def undefined(axes: Axes, why: str) -> None:
    """Writes into an empty panel why it is empty."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=GREY, wrap=True)


def legend_above(axes: Axes, columns: int = 2) -> None:
    """A legend on top of the panel, where it covers no line."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
        axes.legend(handles, labels, ncols=columns, **place)


def fix_layout(figure: Any) -> None:
    """Puts the panels of a figure where its layout wants them. Part of a figure (SubFigure) stays as it is."""
    if hasattr(figure, "draw_without_rendering"):
        figure.draw_without_rendering()


def label_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names to the right of points. Names that would cover each other move up. Limits and layout must be set before.

    Examples
    --------
    >>> with panels(1, (COLUMN, 2.0), None, pyplot=False) as (axes,):
    ...     label_points(axes, {"en": (0.5, 0.5), "de": (0.5, 0.5), "th": (0.5, 0.9)})
    >>> [(text.get_text(), bool(text.get_position()[1] > 0)) for text in axes.texts]
    [('en', False), ('de', True), ('th', False)]
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    height = 72 * axes.bbox.height / axes.figure.dpi
    placed: list[tuple[float, float]] = []
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        across, up = (x - left) / (right - left), height * (y - low) / (high - low)
        shifted = up
        for other, top in sorted(placed, key=lambda pair: pair[1]):
            if abs(other - across) < 0.12 and abs(top - shifted) < 7.5:
                shifted = top + 7.5
        placed.append((across, shifted))
        place: dict[str, Any] = {"xytext": (4.0, shifted - up), "textcoords": "offset points", "va": "center"}
        label = axes.annotate(name, (x, y), fontsize="small", zorder=4, **place)
        label.set_in_layout(False)  # the places were chosen for this layout
