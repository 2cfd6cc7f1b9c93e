"""The figure of `xprobe patch`: what the model uses beside what can be read, and both boundaries by language."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xprobe.results import Study

CAUSAL = {
    ("same", "answer"): ("T: state of the last token replaced", "tab:red", "-"),
    ("same", "question"): ("Q: states of the question replaced", "tab:green", "-"),
    ("cross", "answer"): ("T, other language", "tab:red", ":"),
    ("cross", "question"): ("Q, other language", "tab:green", ":"),
    ("same", "same_question"): ("control: same question, other language", "tab:gray", "--"),
}
READ = {"readiness": ("readiness (read)", "tab:orange"), "encoding": ("encoding (read)", "tab:blue")}


def save_figure(study: Study, path: Path) -> None:
    """Draws one row for each setting of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = study.manifest.stages["patching"].results["settings"]
    figure, axes = pyplot.subplots(
        len(settings),
        2,
        figsize=(10, 0.9 + 3.2 * len(settings)),
        width_ratios=(1.7, 1),
        squeeze=False,
        layout="constrained",
    )
    for (left, right), (setting, summary) in zip(axes, settings.items(), strict=True):
        _curves(left, study, setting)
        _boundaries(right, study, setting, summary["same"])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _curves(axes: Any, study: Study, setting: str) -> None:
    curves = study.table("patching_by_layer.parquet")
    own = curves[(curves["setting"] == setting) & (curves["measure"] == "effect") & (curves["language"] == "all")]
    for (pairs, kind), (label, colour, style) in CAUSAL.items():
        some = own[(own["pairs"] == pairs) & (own["kind"] == kind)]
        if some.empty:
            continue
        axes.plot(some["layer"], some["value"], style, color=colour, label=label, linewidth=2)
        if style == "-":
            axes.fill_between(some["layer"], some["lo"], some["hi"], color=colour, alpha=0.15, linewidth=0)
    signals = study[setting].signals
    for name, (label, colour) in READ.items():
        if name in signals.index.get_level_values("signal"):
            values = signals["value"].xs((name, "all"), level=("signal", "language"))
            axes.plot(values.index, values, color=colour, linewidth=1, label=label)
    axes.axhline(0.5, color="black", linewidth=0.5)
    axes.set_ylim(-0.3, 1.2)
    axes.set_xlabel("layer")
    axes.set_ylabel("effect; signal")
    axes.set_title(f"{setting}: used (thick) and read (thin)", fontsize=10)


def _boundaries(axes: Any, study: Study, setting: str, same: dict[str, Any]) -> None:
    read = study[setting].summary
    rows = [*same["languages"].items(), ("all", same)]
    for place, (name, row) in enumerate(rows):
        onset = (read["languages"][name] if name != "all" else read)["boundary"]
        for shift, colour, value in (
            (-0.2, "tab:green", row.get("question_boundary")),
            (0.0, "tab:red", row["answer_boundary"]),
            (0.2, "tab:orange", onset),
        ):
            if value is None or value["value"] is None:
                continue
            ends = [value[end] if value[end] is not None else value["value"] for end in ("lo", "hi")]
            axes.plot(ends, [place + shift] * 2, color=colour, linewidth=1)
            axes.plot([value["value"]], [place + shift], "o", color=colour, markersize=4)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, study.manifest.model.n_blocks)
    axes.set_xlabel("layer")
    axes.set_title("question used up to (green), answer held from (red),\nretrieval onset as read (orange)", fontsize=8)
