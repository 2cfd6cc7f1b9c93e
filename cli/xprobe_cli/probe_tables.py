"""The table of `xprobe probe`: score and control by layer, and one line on the best layer of every probe."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from xprobe_cli.tables import counted, estimate, last_lines, number

if TYPE_CHECKING:
    from xprobe.results import SettingResult, Study


def probe_report(study: Study) -> str:
    """The scores of every setting, and the path of the run."""
    parts = [_setting(result) for result in study.values()]
    return "\n\n".join([*parts, last_lines(study)])


def _setting(result: SettingResult) -> str:
    rows: list[dict[str, Any]] = [
        {str(name): value for name, value in row.items()} for row in result.probes.reset_index().to_dict("records")
    ]
    columns = list(dict.fromkeys((row["probe"], row["state"], row["metric"]) for row in rows))
    widths = [max(len(f"{probe} {metric}"), len(state), 15) for probe, state, metric in columns]
    titles = (f"{probe} {metric}" for probe, _, metric in columns)
    names = "  ".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True))
    states = "  ".join(f"{state:>{width}}" for (_, state, _), width in zip(columns, widths, strict=True))
    lines = [f"{result.study.manifest.model.name} · {result.setting} · held-out paragraphs: score (control)", ""]
    lines += [f"{'':>5}  {names}", f"layer  {states}"]
    lines.append("─" * len(lines[-1]))
    for layer, of_layer in groupby(sorted(rows, key=lambda row: row["layer"]), key=lambda row: row["layer"]):
        by_column = {(row["probe"], row["state"], row["metric"]): row for row in of_layer}
        cells = (f"{_scores(by_column.get(column)):>{width}}" for column, width in zip(columns, widths, strict=True))
        lines.append(f"{layer:>5}  {'  '.join(cells)}")
    best = [
        _best([row for row in rows if (row["probe"], row["state"]) == (probe, state)]) for probe, state, _ in columns
    ]
    return "\n".join([*lines, "", *best])


def _scores(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{number(row['score'], 3)} ({number(row['control'], 2)})"


def _best(rows: list[dict[str, Any]]) -> str:
    what = f"{rows[0]['probe']}, {rows[0]['state']}"
    known = [row for row in rows if row["score"] == row["score"]]
    if not known:
        return f"{what}: cannot be trained on this run (one language, one paragraph, or one class)"
    best = max(known, key=lambda row: row["score"])
    baseline = f", baseline {best['baseline']:.3f}" if best["baseline"] == best["baseline"] else ""
    interval = estimate({"value": best["score"], "lo": best["lo"], "hi": best["hi"]}, 3)
    return (
        f"{what}: best at layer {best['layer']}, {best['metric']} {interval}, "
        f"selectivity {number(best['selectivity'], 3)}{baseline}; {counted(best['n'], 'example')}, "
        f"{counted(best['folds'], 'fold')}"
    )
