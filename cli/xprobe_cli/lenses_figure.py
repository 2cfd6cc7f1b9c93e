"""The figure of `xprobe lenses`: readiness under each lens, and the scripts of the top tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.scoring.scripts import SCRIPTS
from xprobe_cli.lens_tables import labels

if TYPE_CHECKING:
    import pandas as pd

    from xprobe.results import Study

RARE = 0.02  # scripts below this share at every layer are drawn as one
COLOURS = {
    "latin": "tab:blue", "cyrillic": "tab:red", "han": "tab:orange", "arabic": "tab:green", "devanagari": "tab:purple",
    "thai": "tab:brown", "greek": "tab:pink", "hangul": "tab:olive", "kana": "tab:cyan", "other": "gold",
    "none": "lightgray", "undecodable": "gray", "special": "black", "rare": "white",
}  # fmt: skip


def save_figure(study: Study, path: Path) -> None:
    """Draws one row for each setting of the run: readiness, then the scripts under each lens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = study.manifest.stages["lenses"].results
    names = labels(list(results["lenses"]))
    layers = study.table("lenses_by_layer.parquet")
    layers = layers[layers["language"] == "all"]
    rows, columns = len(results["settings"]), len(names)
    figure, axes = pyplot.subplots(
        rows, 1 + columns, figsize=(4.6 + 2.6 * columns, 0.8 + 3.1 * rows), squeeze=False, layout="constrained",
        width_ratios=(1.7, *[1.0] * columns),
    )  # fmt: skip
    shown = _shown_scripts(layers)
    for line, (setting, by_lens) in zip(axes, results["settings"].items(), strict=True):
        part = layers[layers["setting"] == setting]
        _readiness(line[0], part, by_lens, names, setting)
        for axis, lens in zip(line[1:], by_lens, strict=True):
            _scripts(axis, part[part["lens"] == lens], shown, f"{setting}: {names[lens]}")
    handles = dict(zip(*reversed(axes[0, 1].get_legend_handles_labels()), strict=True))
    for axis in axes[:, 1:].flat:  # the latent language is in one setting only
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), fontsize=8, ncols=6, loc="outside lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _readiness(axes: Any, part: pd.DataFrame, by_lens: dict[str, Any], names: dict[str, str], setting: str) -> None:
    for number, (lens, entry) in enumerate(by_lens.items()):
        colour = f"C{number}"
        own = part[(part["lens"] == lens) & (part["signal"] == "readiness")]
        axes.plot(own["layer"], own["value"], color=colour, linewidth=2, label=names[lens])
        axes.fill_between(own["layer"], own["lo"], own["hi"], color=colour, alpha=0.15, linewidth=0)
        if entry["boundary"]["value"] is not None:
            axes.axvline(entry["boundary"]["value"], color=colour, linewidth=1, linestyle="--")
    axes.set_ylim(0, 1)
    axes.set_xlabel("layer")
    axes.set_ylabel("readiness")
    axes.set_title(f"{setting}: readiness, and the boundary under each lens (dashed)", fontsize=9)
    axes.legend(fontsize=8, loc="upper left")


def _scripts(axes: Any, part: pd.DataFrame, shown: list[str], title: str) -> None:
    shares = part[part["signal"].str.startswith("script_")].pivot(index="layer", columns="signal", values="value")
    values = [shares[f"script_{name}"] for name in shown]
    rest = 1 - sum(values)
    names = [*shown, "rare"]
    colours = [COLOURS.get(name, "lightgreen") for name in names]
    axes.stackplot(shares.index, *values, rest, labels=names, colors=colours, linewidth=0)
    latent = part[part["signal"] == "latent_share"]
    if not latent.empty:
        axes.plot(latent["layer"], latent["value"], color="white", linewidth=3.5)  # seen on any script
        axes.plot(latent["layer"], latent["value"], color="black", linewidth=1.5, label="p(own) / (p(en) + p(own))")
    axes.set_ylim(0, 1)
    axes.set_xlim(shares.index.min(), shares.index.max())
    axes.set_xlabel("layer")
    axes.set_title(title, fontsize=9)


def _shown_scripts(layers: pd.DataFrame) -> list[str]:
    """The scripts that reach more than a small share anywhere, in the order of ``SCRIPTS``."""
    most = layers[layers["signal"].str.startswith("script_")].groupby("signal")["value"].max()
    return [name for name in SCRIPTS if most.get(f"script_{name}", 0.0) >= RARE]
