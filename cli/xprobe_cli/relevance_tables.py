"""The tables of `xprobe attribute`: depths, shares by layer, and the heat map of one example."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe_cli.tables import bar, counted, estimate, last_lines, number

if TYPE_CHECKING:
    from xprobe.results import Study
    from xprobe.stages.relevance import ExampleRelevance

SHADES, PLAIN_SHADES = " ░▒▓█", " .:*#"
TOKEN = 16  # characters of a token in the heat map
OTHERS = 20  # tokens of the heat map besides question and answer: the most relevant ones
GROUPS = ("question", "answer", "context", "template", "given")


def relevance_report(study: Study) -> str:
    """Depths and shares of every setting, and the path of the run."""
    results = study.manifest.stages["relevance"].results
    parts = [_setting(study, setting, summary) for setting, summary in results["settings"].items()]
    return "\n\n".join([*parts, last_lines(study)])


def _setting(study: Study, setting: str, summary: dict[str, Any]) -> str:
    results = study.manifest.stages["relevance"].results
    title = (
        f"{study.manifest.model.name} · {setting} · {counted(summary['n'], 'example')} · rule {results['rule']} · of "
        f"the {results['attributed'].replace('_', ' ')} of the gold answer"
    )
    return "\n".join([title, "", *_shares(study, setting, summary), "", *_depths(summary)])


def _shares(study: Study, setting: str, summary: dict[str, Any]) -> list[str]:
    curves = study.table("relevance_by_layer.parquet")
    own = curves[(curves["setting"] == setting) & (curves["language"] == "all")]
    shares = own.pivot(index="layer", columns="group", values="value")
    groups = [name for name in GROUPS if name in shares]
    header = "  ".join(["layer", *(f"{name:<15}" for name in groups), "conserved"])
    lines = [header, "─" * len(header)]
    kept_by_layer = summary["conservation"]["median"]
    for (layer, row), kept in zip(shares.iterrows(), kept_by_layer, strict=True):
        cells = [f"{number(row[name], 3):>6} {bar(row[name])}" for name in groups]
        lines.append("  ".join([f"{layer:>5}", *cells, f"{number(kept, 3):>9}"]))
    return lines


def _depths(summary: dict[str, Any]) -> list[str]:
    header = "  ".join(["language", f"{'MRD of question':<20}", f"{'MRD of answer':<20}", "answer - question"])
    lines = [header, "─" * len(header)]
    for name, row in [*summary["languages"].items(), ("all", summary)]:
        depths = (row["mrd"].get(group) for group in ("question", "answer"))
        cells = [f"{estimate(depth, 1) if depth else '–':<20}" for depth in depths]
        gap = estimate(row["gap"], 2) if "gap" in row else "–"
        lines.append("  ".join([f"{name:<8}", *cells, gap]))
    return lines


def plain_example(found: ExampleRelevance) -> dict[str, Any]:
    """What `xprobe attribute --show EXAMPLE --json` prints."""
    return {
        "example": found.id,
        "rule": found.rule,
        "attributed": found.attributed,
        "y": found.y,
        "conserved": found.conserved.tolist(),
        "tokens": [
            {"text": text, "group": group, "mrd": None if depth != depth else depth, "relevance": values}
            for text, group, depth, values in zip(
                found.tokens, found.groups, found.mrd.tolist(), found.values.T.tolist(), strict=True
            )
        ],
    }


def chosen_tokens(found: ExampleRelevance) -> list[int]:
    """The tokens of a heat map: question, answer, given answer, and the most relevant others, in their order."""
    amounts = abs(found.values[1:]).sum(0)
    named = {i for i, group in enumerate(found.groups) if group in ("question", "answer", "given")}
    others = sorted((i for i in range(len(found.tokens)) if i not in named), key=lambda i: -amounts[i])
    return sorted({*named, *others[:OTHERS]})


def heat_map(found: ExampleRelevance) -> str:
    """A row for each token, a column for each layer: how much of the layer's relevance the token has."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    shades = SHADES if "utf" in encoding else PLAIN_SHADES
    amounts = abs(found.values)
    largest = amounts.max(1, keepdims=True)
    levels = (amounts / largest.clip(min=1e-30)) ** 0.5  # the root shows small shares, too
    layers = found.values.shape[0]
    ruler = "".join(str(layer // 10 % 10) if layer % 10 == 0 else "·" for layer in range(layers))
    of = f"of the {found.attributed.replace('_', ' ')} of the gold answer, {number(found.y, 2)}"
    lines = [
        f"{found.id} · rule {found.rule} · {of}",
        "|relevance| as a share of the largest of each layer (root)",
        "",
        f"{'group':<9} {'token':<{TOKEN}} {ruler}  MRD",
    ]
    before = -1
    for i in chosen_tokens(found):
        if i > before + 1:
            lines.append(f"{'':<9} …")
        before = i
        cells = "".join(shades[min(int(level * len(shades)), len(shades) - 1)] for level in levels[:, i])
        lines.append(f"{found.groups[i]:<9} {_shown(found.tokens[i]):<{TOKEN}} {cells}  {number(found.mrd[i], 0):>3}")
    kept = found.conserved
    lines += ["", f"conserved: {number(kept[0], 3)} of the answer at layer 0, {number(kept[-1], 3)} at the last"]
    return "\n".join(lines)


def _shown(token: str) -> str:
    text = "".join(c if c.isprintable() else "␣" for c in token.replace("\n", "⏎").replace(" ", "·"))
    return text if len(text) <= TOKEN else text[: TOKEN - 1] + "…"


def save_heat_map(found: ExampleRelevance, path: Path) -> None:
    """Draws the heat map as a figure. ``xprobe_cli.figures.check_figure`` has passed the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = chosen_tokens(found)
    largest = abs(found.values).max(1, keepdims=True).clip(min=1e-30)
    picture = (found.values / largest)[:, rows].T
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.19 * len(rows)), layout="constrained")
    image = axes.imshow(picture, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(rows)), [_shown(found.tokens[i]) for i in rows], fontsize=7)
    colours = {"question": "tab:green", "answer": "tab:red", "given": "tab:purple"}
    for label, i in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(colours.get(found.groups[i], "black"))
    depths = [(row, found.mrd[i]) for row, i in enumerate(rows) if found.mrd[i] == found.mrd[i]]
    axes.plot([depth for _, depth in depths], [row for row, _ in depths], "k|", markersize=6)
    axes.set_xlabel("layer")
    title = f"{found.id}, rule {found.rule}, of the {found.attributed.replace('_', ' ')}"
    axes.set_title(f"{title}\neach layer scaled; | major relevance depth", fontsize=8)
    for row, (before, after) in enumerate(pairwise(rows)):
        if after > before + 1:  # tokens between them are left out
            axes.axhline(row + 0.5, color="black", linewidth=0.4, linestyle=":")
    figure.colorbar(image, ax=axes, shrink=0.5)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
