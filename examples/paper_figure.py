"""
A figure for a paper
====================

Two panels, and all other figures of a run in a folder: ``python examples/paper_figure.py RUN_FOLDER``
"""

import sys

from matplotlib import pyplot as plt

import xprobe
from xprobe.report.figure_style import STYLE

if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit("usage: python examples/paper_figure.py RUN_FOLDER")
study = xprobe.load_study(sys.argv[1])
plots = study[study.settings[0]].plot
with plt.rc_context(STYLE):  # xprobe's fonts and lines; without it your axes keep your own
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    plots.stability(ax=left)
    plots.boundaries(ax=right)
    for letter, axes in zip("ab", (left, right), strict=True):
        axes.annotate(letter, (0, 1), (-30, 10), "axes fraction", "offset points", weight="bold")
    figure.savefig("stability.pdf")
written = [path.name for path in study.plot.save("figures", formats=("pdf", "png"))]
print("stability.pdf and figures/:", ", ".join(written))
