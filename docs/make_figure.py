"""Draws the README's picture from a run folder: python docs/make_figure.py runs/demo docs/images/demo.png"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import xprobe

INK, ACCENT, PALE = "#222222", "#b5452c", "#9aa5b1"


def draw(run: str, out: str) -> None:
    """Left: readiness by layer, one line per language. Right: phase stability S(l) with its 95 % interval."""
    study = xprobe.load_study(run)
    result = next(iter(study))
    layers = study.layers[study.layers["setting"] == result.setting]
    readiness = layers[layers["signal"] == "readiness"].pivot(index="layer", columns="language", values="value")
    table, boundary = result.stability, result.boundary["value"]

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for language in readiness.columns.drop("all"):
        left.plot(readiness.index, readiness[language], color=PALE, linewidth=0.9)
    left.plot(readiness.index, readiness["en"], color=INK, linewidth=1.4, label="English questions")
    left.plot([], [], color=PALE, label=f"{len(readiness.columns) - 2} other languages")
    left.set(title="How ready is the gold answer?", xlabel="layer", ylabel="readiness", ylim=(0, 1))
    right.fill_between(table.index, table["stability_lo"], table["stability_hi"], color=ACCENT, alpha=0.18, linewidth=0)
    right.plot(table.index, table["stability"], color=ACCENT, linewidth=1.6, label="S(l), 95% interval")
    right.set(title="Do the languages agree on the phase?", xlabel="layer", ylabel="phase stability", ylim=(0, 1.02))
    for axes, place in ((left, "upper left"), (right, "lower left")):
        axes.axvline(boundary, color=ACCENT, linestyle=":", linewidth=1.2)
        axes.legend(frameon=False, loc=place)
    left.annotate(
        "retrieval onset", (boundary, 0.05), xytext=(-4, 0), textcoords="offset points", ha="right", color=ACCENT
    )
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    draw(*sys.argv[1:3])
