"""Draws the picture of docs/study.md from a run folder: python docs/make_study_figure.py RUN docs/images/study.png"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import xprobe

INK, ACCENT, PALE, COLD = "#222222", "#b5452c", "#9aa5b1", "#2c6e8f"
NAMED = {"en": INK, "zh": ACCENT, "th": COLD}


def draw(run: str, out: str) -> None:
    """Left: encoding and readiness. Middle: encoding by language. Right: phase stability."""
    result = next(iter(xprobe.load_study(run)))
    signals = result.signals
    boundary = result.boundary["value"]
    depth = result.summary["encoding_depth"]["value"]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK})
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for name, color, label in (
        ("encoding", COLD, "encoding, last prompt token"),
        ("encoding_question", INK, "encoding, question's tokens"),
        ("readiness", ACCENT, "readiness of the gold answer"),
    ):
        pooled = signals.loc[name, "all"]
        axes[0].fill_between(pooled.index, pooled["lo"], pooled["hi"], color=color, alpha=0.15, linewidth=0)
        axes[0].plot(pooled.index, pooled["value"], color=color, linewidth=1.6, label=label)
    control = signals.loc["encoding_question_control", "all"]["value"]
    axes[0].plot(control.index, control, color=PALE, linestyle="--", linewidth=1.2, label="encoding's control")
    axes[0].set(title="Told apart, then answered", ylabel="0 to 1", ylim=(0, 1))
    by_language = signals.loc["encoding"]["value"].unstack("language").drop(columns="all")
    for language in by_language:
        color = NAMED.get(language, PALE)
        axes[1].plot(by_language.index, by_language[language], color=color, linewidth=1.6 if language in NAMED else 0.9)
    for language, color in NAMED.items():
        axes[1].plot([], [], color=color, label=language)
    axes[1].plot([], [], color=PALE, label=f"{by_language.shape[1] - len(NAMED)} others")
    axes[1].set(title="Encoding at the last prompt token, by language", ylabel="encoding", ylim=(0, 1))
    table = result.stability
    axes[2].fill_between(
        table.index, table["stability_lo"], table["stability_hi"], color=ACCENT, alpha=0.18, linewidth=0
    )
    axes[2].plot(table.index, table["stability"], color=ACCENT, linewidth=1.6, label="S(l), 95% interval")
    axes[2].set(title="Do the languages agree on the phase?", ylabel="phase stability", ylim=(0.5, 1.02))
    for one in axes:
        one.axvline(boundary, color=ACCENT, linestyle=":", linewidth=1.2)
        if depth is not None:
            one.axvline(depth, color=COLD, linestyle=":", linewidth=1.2)
        one.set_xlabel("layer")
        one.legend(frameon=False, loc="lower left")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(*sys.argv[1:3])
