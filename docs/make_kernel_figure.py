"""Draws docs/images/lens.png: how the fused lens walks the vocabulary.

python docs/make_kernel_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

INK, SOFT, ROWS, WEIGHT, TILE, STATE = "#222222", "#8a8a8a", "#dbe7f3", "#f6e3c5", "#e2703a", "#d9ecd9"


def box(axes, x, y, width, height, colour, text="", size=9.0, **options):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, linewidth=0.9, **options))
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes, start, end, **options):
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": INK, "linewidth": 1.1} | options
    axes.add_patch(FancyArrowPatch(start, end, **style))


def main() -> None:
    figure, axes = plt.subplots(figsize=(10.4, 5.0))
    axes.set_xlim(0, 104)
    axes.set_ylim(0, 50)
    axes.axis("off")

    axes.text(2, 47.5, "1  rows, once", fontsize=10.5, weight="bold", color=INK)
    box(axes, 2, 14, 12, 30, ROWS, "rows\n[R, D]\n\nall layers,\nall positions\n\nfinal norm\nin fp32,\ncast")
    axes.text(8, 11.6, "+ looked-up logits\nand their thresholds", fontsize=8, ha="center", va="top", color=INK)

    axes.text(21, 47.5, "2  the pass: tiles of rows x parts of the vocabulary", fontsize=10.5, weight="bold", color=INK)
    box(axes, 21, 39.4, 54, 4.6, WEIGHT, "unembedding [V, D], read once per group of row tiles")
    for part in range(3):
        for tile in range(3):
            box(axes, 21 + part * 18, 31.8 - tile * 7, 18, 7, "white")
    for at in range(6):  # the walk of one program
        box(axes, 39 + at * 3, 24.8, 3, 7, TILE if at == 2 else "#f7c7ae" if at < 2 else "white")
    arrow(axes, (39.4, 22.6), (56.6, 22.6))
    axes.text(58, 21.4, "one program\nwalks its part", fontsize=8.5, va="center", color=INK)
    axes.text(48, 15.4, "carried in registers from tile to tile:", fontsize=8.5, ha="center", color=INK)
    sums = r"maximum m · sum of $e^{z-m}$ · sum of $e^{z-m}(z-m)$"
    box(axes, 24, 6.4, 48, 8, STATE, f"{sums}\nhow many tokens exceed each threshold · top k")
    note = "a tile of logits lives in registers and is forgotten: nothing of size R x V is ever written"
    axes.text(48, 3.4, note, fontsize=8.5, ha="center", color=SOFT, style="italic")
    arrow(axes, (14.3, 29), (20.7, 29))

    axes.text(81, 47.5, "3  merge, once per row", fontsize=10.5, weight="bold", color=INK)
    for part in range(3):
        box(axes, 82 + part * 5.4, 32, 4.6, 7, STATE, f"S{part + 1}", 8)
    arrow(axes, (75.3, 29), (81.4, 34))
    arrow(axes, (89.8, 31.6), (89.8, 27))
    outputs = "logit · logsumexp\nrank · entropy · top k\n\nin fixed order:\nthe same bits\nevery time"
    box(axes, 81, 13, 20, 13.6, ROWS, outputs)
    axes.text(81, 11, "KL: W'p of the final rows,\nthen one dot product per row", fontsize=8, va="top", color=INK)
    file = Path(__file__).parent / "images" / "lens.png"
    figure.savefig(file, dpi=150, bbox_inches="tight", facecolor="white")
    print(file)


if __name__ == "__main__":
    main()
