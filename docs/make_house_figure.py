"""Draws docs/images/house.png: the rooms of xprobe/ and which imports which, read from the sources.

python docs/make_house_figure.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import house  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "house.png"
# rooms that any other may import; their arrows are not drawn
GROUND = ("events", "timing", "cache", "config", "arguments", "errors")
# from left to right, so that few arrows cross; heights are computed
COLUMNS = {
    "models": 0.8, "capture": 0.8, "qa": 1.9, "phases": 3, "probes": 2.5, "scoring": 3.3, "runs": 4.1, "results": 4.1,
    "report": 5, "doctor": 5.4, "single_prompt": 0, "lenses": 0.8, "attribution": 1.6,
    "stages": 2.5, "forecast": 1.6, "study": 2.5, "evaluation": 3.4,
}  # fmt: skip
INK, QUIET, LINE = "#222222", "#8a8a86", "#2f5d8a"
FILLS = {"room": "#e6edf5", "ground": "#f4f4f2", "package": "#f6e6d6"}
WIDTH, HALF_WIDTH, HALF_HEIGHT, FLOOR = 12.0, 0.72, 0.2, 0.95


def upper_imports() -> dict[str, set[str]]:
    """Which rooms each room imports, without the rooms of ``GROUND``."""
    table = house.imports_between_rooms()
    return {room: targets - {*GROUND, room} for room, targets in table.items() if room not in GROUND}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Of every room, the length of the longest chain of imports below it."""
    found: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in found:
            found[room] = max((floor(target) + 1 for target in graph[room]), default=0)
        return found[room]

    for room in graph:
        floor(room)
    return found


def direct(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports that no longer chain of imports implies."""

    def below(room: str) -> set[str]:
        return graph[room] | {far for target in graph[room] for far in below(target)}

    return {
        (room, target)
        for room, targets in graph.items()
        for target in targets
        if not any(target in below(other) for other in targets - {target})
    }


def description(graph: dict[str, set[str]]) -> str:
    """The imports in words; the picture carries them, so that a test can tell whether it is of today."""
    return "; ".join(f"{room}: {' '.join(sorted(graph[room]))}".strip() for room in sorted(graph))


def places(graph: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """Centre of every room: the imports give its height, ``COLUMNS`` where it stands from left to right."""
    middle = (max(COLUMNS.values()) + 1) / 2
    side = WIDTH / (max(COLUMNS.values()) + 1)
    return {room: (side * (COLUMNS.get(room, middle) + 0.5), FLOOR * floor) for room, floor in floors(graph).items()}


def box(axes: Axes, x: float, y: float, text: str, kind: str, half_width: float = HALF_WIDTH) -> None:
    corner, width = (x - half_width, y - HALF_HEIGHT), 2 * half_width
    axes.add_patch(
        FancyBboxPatch(
            corner, width, 2 * HALF_HEIGHT, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=FILLS[kind], edgecolor=QUIET, linewidth=0.8, zorder=3,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", color=INK, zorder=4)


def main() -> None:
    graph = upper_imports()
    where, shown = places(graph), direct(graph)
    top = max(y for _, y in where.values())
    plt.rcParams.update({"font.size": 11})
    figure, axes = plt.subplots(figsize=(10, 0.95 * (top / FLOOR + 4)), constrained_layout=True)
    for room, target in sorted(shown):
        (x, y), (far_x, far_y) = where[room], where[target]
        arrow = FancyArrowPatch(
            (x, y - HALF_HEIGHT), (far_x, far_y + HALF_HEIGHT), arrowstyle="-|>", mutation_scale=11,
            color=LINE, linewidth=1.1, shrinkA=0, shrinkB=1, zorder=2,
        )  # fmt: skip
        axes.add_patch(arrow)
    for room, (x, y) in where.items():
        box(axes, x, y, room, "room")
    box(axes, WIDTH / 2, top + FLOOR, "xprobe_cli: commands, options, what is printed", "package", WIDTH / 2)
    for number, room in enumerate(GROUND):
        box(axes, WIDTH * (number + 0.5) / len(GROUND), -FLOOR, room, "ground")
    axes.text(WIDTH / 2, -FLOOR + 0.3, "imported from many places", ha="center", color=QUIET, fontsize=9)
    kernels = "xprobe_kernels: lens, capture, attention; tensors in, tensors out"
    box(axes, WIDTH / 2, -2 * FLOOR, kernels, "package", WIDTH / 2)
    axes.set(xlim=(-0.1, WIDTH + 0.1), ylim=(-2 * FLOOR - 0.4, top + FLOOR + 0.4))
    axes.axis("off")
    figure.savefig(PICTURE, dpi=110, metadata={"Description": description(graph)})


if __name__ == "__main__":
    main()
