"""The roofline figure: achieved operations per second over arithmetic intensity, with the measured ceilings."""

from __future__ import annotations

from importlib import util
from math import atan2, degrees, log10
from pathlib import Path
from typing import Any

from xprobe_kernels.bench.command import LENS, SettingsError

COLOURS = {"naive": "#9a9a9a", "compiled": "#b07aa1", "product": "#e0a030", "backend": "#2f6fb0"}
SHADES = ("#1b5e9b", "#d1495b", "#2a9d5c", "#7b52ab", "#00a0b0")  # colours of the lens backends, in order
ROOM = 0.55  # height of the space above the roof for the shapes' names, relative to the height below it
LINE = 0.13  # inches between two vertical labels
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


class NothingToDrawError(Exception):
    """No variant was measured, so there is nothing to draw."""


def check(target: str, measured: tuple[str, ...]) -> None:
    """Raises ``SettingsError`` if the figure cannot be drawn to ``target``. Call it before measuring.

    ``measured`` names the parts that will be measured, as ``Settings.measured`` does.
    """
    if util.find_spec("matplotlib") is None:
        raise SettingsError("the figure needs matplotlib, which is not installed: pip install matplotlib")
    if Path(target).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise SettingsError(f"figure must end in .png, .svg or .pdf, got {target!r}")
    if not Path(target).resolve().parent.is_dir():
        raise SettingsError(f"figure cannot be written: {Path(target).resolve().parent} is not a folder")
    if LENS not in measured:
        raise SettingsError("figure shows the lens: choose kernel lens or all")


def roofline(result: dict[str, Any], target: str) -> None:
    """Draws the lens part of a benchmark's result to a file, with one marker per variant and shape."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    parts = [
        part
        for part in result["lens"]
        if part.get("ceilings") and any(entry["status"] == "ok" for entry in part["variants"])
    ]
    if not parts:
        raise NothingToDrawError("no figure: nothing was measured that can be drawn")
    figure = Figure(figsize=(11.5, 6.6), layout="constrained", dpi=150)
    axes = figure.subplots()
    scale, unit = (1e12, "TFLOP/s") if result["environment"]["device_type"] == "cuda" else (1e9, "GFLOP/s")
    names = list(dict.fromkeys(entry["name"] for part in parts for entry in part["variants"]))
    kinds = {entry["name"]: entry["kind"] for part in parts for entry in part["variants"]}
    style = _styles(names, kinds)
    lowest = float("inf")
    intensity = [part["operations"] / part["least_bytes"] for part in parts]
    for name in names:
        points = [
            (x, entry["operations_per_second"] / scale)
            for x, part in zip(intensity, parts, strict=True)
            for entry in part["variants"]
            if entry["name"] == name and entry["status"] == "ok"
        ]
        if points:
            ours = kinds[name] == "backend"
            horizontal, vertical = zip(*points, strict=True)
            axes.scatter(
                horizontal, vertical, label=name, marker=style[name][1], color=style[name][0],
                s=75 if ours else 45, zorder=4 if ours else 3, edgecolor="white", linewidth=0.7,
            )  # fmt: skip
            lowest = min(lowest, *vertical)
    bandwidth = max(part["ceilings"]["bytes_per_second"] for part in parts)
    peak = max(part["ceilings"]["operations_per_second"] for part in parts)
    left, right = min(intensity) / 3, max(*intensity, peak / bandwidth) * 3
    ridge = peak / bandwidth
    roof = [left, ridge, right]
    axes.plot(roof, [min(x * bandwidth, peak) / scale for x in roof], color="#333333", linewidth=1.4, zorder=2)
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set_ylim(lowest / 1.6, peak / scale * (1.6 * peak / scale / lowest) ** ROOM)
    text = f"matrix product: {_digits(peak / scale)} {unit}"
    axes.annotate(
        text, (right, peak / scale), (-6, 6), textcoords="offset points", ha="right", fontsize=9, zorder=5,
        bbox={"color": "white", "pad": 1},
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("arithmetic intensity: operations 2RVD per byte that must be read, (V + R)D numbers")
    axes.set_ylabel(f"achieved {unit}")
    environment = result["environment"]
    cut = " (cut shapes)" if any(part["cut"] for part in parts) else ""
    axes.set_title(
        f"The fused lens under its roofline{cut}\n{environment['device']}, {parts[0]['dtype']}, "
        f"torch {environment['torch']}, {environment['date'][:10]}",
        fontsize=11,
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    figure.draw_without_rendering()  # places the axes: angles and distances below are in inches
    figure.set_layout_engine("none")
    _along(axes, f"copy: {_digits(bandwidth / 1e9)} GB/s", left, bandwidth / scale)
    _label_shapes(axes, parts, intensity, peak / scale)
    figure.savefig(target)


def _styles(names: list[str], kinds: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every variant: bright colours for the lens backends, muted ones for the rivals."""
    shades = iter(SHADES * len(names))
    return {
        name: (next(shades) if kinds[name] == "backend" else COLOURS[kinds[name]], MARKS[number % len(MARKS)])
        for number, name in enumerate(names)
    }


def _along(axes: Any, text: str, left: float, slope: float) -> None:
    """Writes along the rising part of the roof, near its lower end."""
    start = max(left * 1.15, axes.get_ylim()[0] * 1.4 / slope)
    (x0, y0), (x1, y1) = axes.transData.transform([(start, start * slope), (2 * start, 2 * start * slope)])
    angle = degrees(atan2(y1 - y0, x1 - x0))
    axes.annotate(
        text, (start, start * slope), (-4, 4), textcoords="offset points", rotation=angle, rotation_mode="anchor",
        va="bottom", fontsize=9,
    )  # fmt: skip


def _label_shapes(axes: Any, parts: list[dict[str, Any]], intensity: list[float], roof: float) -> None:
    """Writes the name of each shape vertically above its markers. Names that would overlap are moved apart."""
    bottom, top = axes.get_ylim()
    left, right = axes.get_xlim()
    step = LINE / axes.get_window_extent().width * axes.figure.dpi * log10(right / left)
    order = sorted(range(len(parts)), key=intensity.__getitem__)
    for index, place in zip(order, move_apart([log10(intensity[i]) for i in order], step), strict=True):
        column = intensity[index]
        axes.plot([column, column], [bottom, roof], color="#bbbbbb", linewidth=0.7, linestyle=":", zorder=1)
        name = f"{parts[index]['model']}, {parts[index]['regime']} rows"
        axes.annotate(
            name, (column, roof), (10**place, roof * (top / roof) ** 0.2),
            rotation=90, ha="center", va="bottom", fontsize=8, color="#444444",
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0},
        )  # fmt: skip


def move_apart(places: list[float], step: float) -> list[float]:
    """Moves ascending places to be at least ``step`` apart. Groups of close places keep their centre."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _first(groups[-1], step) < _first(groups[-2], step) + step * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_first(group, step) + step * number for group in groups for number in range(len(group))]


def _first(group: list[float], step: float) -> float:
    return sum(group) / len(group) - step * (len(group) - 1) / 2


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
