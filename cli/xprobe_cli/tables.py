"""The tables on the terminal: plain text, aligned, with small bars if there is room."""

from __future__ import annotations

import shlex
import shutil
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xprobe.results import SettingResult, Study

EIGHTHS = " ▏▎▍▌▋▊▉█"
BAR = 8
BARS_FROM = 92  # columns of terminal


def study_report(study: Study) -> str:
    """The table of every setting with its summary lines, and the path of the run."""
    width = shutil.get_terminal_size((100, 24)).columns
    parts = [_setting_report(result, width) for result in study.values()]
    return "\n\n".join([*parts, last_lines(study)])


def last_lines(study: Study) -> str:
    """Where the files are, and the next useful command."""
    return f"files     {study.path}\nnext      xprobe report {shlex.quote(str(study.path))}"


def _setting_report(result: SettingResult, width: int) -> str:
    name, summary = result.study.manifest.model.name, result.summary
    title = (
        f"{name} · {result.setting} · {counted(summary['n'], 'example')}, {counted(summary['paragraphs'], 'paragraph')}"
    )
    if (lens := result.study.lens) != "logit":
        title += f" · lens {lens}"
    return "\n".join([title, "", *_layer_lines(result, bars=width >= BARS_FROM), "", *_summary_lines(result)])


def _layer_lines(result: SettingResult, bars: bool) -> list[str]:
    def with_bar(value: float) -> str:
        return f"{number(value, 3):>6}" + (f" {bar(value)}" if bars else "")

    wide, gap = (7 + BAR, "  ") if bars else (9, " ")
    table = result.stability
    encoded = "encoding" in table
    heads = ["layer", "phase", f"{'stability':<{wide}}", f"{'95% interval':<14}", f"{'readiness':<{wide}}"]
    heads += ["encoding (sel.)" if bars else "encoding"] if encoded else []
    header = gap.join([*heads, *(f"{head:>7}" for head in ("log p", "rank", "entropy"))])
    lines = [header, "─" * len(header)]
    phase = 1
    for layer, row in table.iterrows():
        if row["phase"] != phase:
            phase = row["phase"]
            lines.append(f"{'┄┄ retrieval onset ':┄<{len(header)}}")
        interval = f"[{number(row['stability_lo'], 3)}, {number(row['stability_hi'], 3)}]"
        cells = [f"{layer:>5}", f"{int(row['phase']):>5}", f"{with_bar(row['stability']):<{wide}}"]
        cells += [f"{interval:<14}", f"{with_bar(row['readiness']):<{wide}}"]
        if encoded:
            cells.append(f"{number(row['encoding'], 3):>8}" + (f" {f'({selectivity(row)})':>6}" if bars else ""))
        digits = {"log_probability": 2, "rank": 0, "entropy": 2}
        lines.append(gap.join([*cells, *(f"{number(row[name], n):>7}" for name, n in digits.items())]))
    return [line.rstrip() for line in lines]


def _summary_lines(result: SettingResult) -> list[str]:
    manifest, entry = result.study.manifest, result.summary
    counts, parity = manifest.counts, manifest.stages["states"].results["parity_error"]
    languages = "  ".join(f"{name} {number(v['boundary']['value'], 1)}" for name, v in entry["languages"].items())
    boundary = f"layer {estimate(entry['boundary'], 1)} of {manifest.model.n_blocks}"
    phased = f"{100 * entry['phased_fraction']['value']:.0f}% of examples phased"
    if entry["phased_fraction"]["value"] < 0.5:
        phased += " (too few to believe a boundary)"
    skipped = sum(counts.skipped.values())
    why = "".join(f"; {n} {reason}" for reason, n in counts.skipped.items())
    bad = sum(counts.bad_records.values())
    if entry["alpha"]["value"] is None:
        alpha = "undefined: it needs two languages and onsets that differ"
    else:
        alpha = f"alpha {estimate(entry['alpha'], 3)}   1: all languages agree, 0: chance"
    encoding = [f"encoding  {_encoding_line(entry)}"] if "encoding_depth" in entry else []
    return [
        f"boundary  {boundary}; {phased}; by language: {languages}",
        *encoding,
        f"stability {alpha}",
        f"parity    {parity:.1e} nats; {counted(skipped, 'example')} skipped{why}; {counted(bad, 'bad record')}",
    ]


def selectivity(row: Any) -> str:
    """Encoding above its control, for a table."""
    return number(row["encoding_selectivity"], 2)


def _encoding_line(entry: dict[str, Any]) -> str:
    """Depth, peak and phase order."""
    if entry["encoding_peak"]["value"] is None:
        return "undefined: it needs two questions on a paragraph, each in two languages"
    holds = {1.0: "below the boundary", 0.0: "not below the boundary", None: "no order"}[entry["phase_order"]["value"]]
    share = entry["phase_order"]["share"]
    certainty = f" ({100 * share:.0f}% of draws)" if share is not None else ""
    languages = [v["phase_order"]["value"] for v in entry["languages"].values()]
    below = f"below it in {sum(v == 1 for v in languages)} of {counted(len(languages), 'language')}"
    depth = f"layer {estimate(entry['encoding_depth'], 1)}, highest at {estimate(entry['encoding_peak'], 1)}"
    return f"{depth}; {holds}{certainty}, {below}"


def estimate(estimate: dict[str, float | None], digits: int) -> str:
    value, lo, hi = (number(estimate[name], digits) for name in ("value", "lo", "hi"))
    return f"{value} [{lo}, {hi}]"


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    Examples
    --------
    >>> counted(1, "paragraph"), counted(0, "paragraph"), counted(1200, "paragraph")
    ('1 paragraph', '0 paragraphs', '1,200 paragraphs')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def number(value: float | None, digits: int) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def bar(value: float | None, cells: int = BAR) -> str:
    """A bar for a value from 0 to 1, in eighths of a cell; of ``#`` if the terminal lacks these characters."""
    if value is None or value != value:
        return " " * cells
    eighths = round(min(max(value, 0.0), 1.0) * cells * 8)
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    if "utf" not in encoding:
        return ("#" * round(eighths / 8)).ljust(cells)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()).ljust(cells)
