"""`xprobe compare`: compares several runs."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xprobe_cli.options import Folder, common, echo_json

if TYPE_CHECKING:
    from xprobe.comparison import Comparison


@click.command("compare")
@click.argument("runs", type=Folder(), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="PAGE.html", help="Also write a page.")
@common
def command(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Compare finished runs on the same questions.

    The table shows the metrics of each model, and how they correlate with F1 over the models. Runs on other questions,
    languages or templates are refused.

    RUN may be the folder of one sweep (`xprobe sweep`). Then all its runs are compared, the claims of the paper are
    tested, and runs that cannot be compared are listed.
    """
    from xprobe.comparison import compare
    from xprobe.sweeps.folder import SweepFolder

    if any(SweepFolder.holds_sweep(run) for run in runs):
        if len(runs) > 1:
            raise click.UsageError("a sweep is compared alone: name one sweep's folder, or run folders")
        return _compare_sweep(runs[0], out, as_json)
    comparison = compare(runs)
    if out is not None:
        comparison.to_html(out)
    if as_json:
        echo_json(comparison.to_dict() | ({} if out is None else {"report": str(out)}))
    else:
        click.echo(comparison_report(comparison, out))


def _compare_sweep(sweep: Path, out: Path | None, as_json: bool) -> None:
    from xprobe.sweeps.comparing import compare_sweep
    from xprobe_cli.sweep_tables import sweep_comparison_report

    compared = compare_sweep(sweep)
    if out is not None and compared.comparison is not None:
        compared.comparison.to_html(out)
    page = out if compared.comparison is not None else None
    if as_json:
        echo_json(compared.to_dict() | ({} if page is None else {"report": str(page)}))
    else:
        click.echo(sweep_comparison_report(compared) + ("" if page is None else f"\n\npage      {page}"))


def comparison_report(comparison: Comparison, out: Path | None = None) -> str:
    """The tables of a comparison; ``out`` is the page that was written."""
    from xprobe.comparison import CAUSAL, FIGURES

    parts = []
    for setting, rows in comparison.table.groupby("setting", sort=False):
        present = [name for name in (*FIGURES, CAUSAL) if name in rows and rows[name].notna().any()]
        lines = [f"{setting}: {len(rows)} models", ""]
        lines += wrapped_table(
            ["model", *present],
            [[row["model"], *(interval(row, name) for name in present)] for row in rows.to_dict("records")],
        )
        own = comparison.correlations[comparison.correlations["setting"] == setting]
        if own["value"].isna().all():
            lines += ["", "no correlations: fewer than three models with answers (xprobe evaluate), or equal values"]
        else:
            own = own[own["value"].notna()]
            lines += ["", "correlations over models (95 % over models and paragraphs, from six models on)", ""]
            lines += wrapped_table(
                ["performance", "metric", "method", "correlation", "models"],
                [
                    [row["performance"], row["figure"], row["method"], interval(row, "value", ("lo", "hi")),
                     str(row["models"])]
                    for row in own.to_dict("records")
                ],
            )  # fmt: skip
        parts.append("\n".join(lines))
    parts += [f"note: {note}" for note in comparison.notes]
    parts += [] if out is None else [f"page      {out}"]
    return "\n\n".join(parts)


def interval(row: dict[Any, Any], name: str, ends: tuple[str, str] | None = None) -> str:
    """A figure of a row with its interval, whose ends have the names ``ends``."""
    lo, hi = ends or (f"{name}_lo", f"{name}_hi")
    nothing = float("nan")
    value, low, high = (float(row.get(key, nothing)) for key in (name, lo, hi))
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" + ("" if math.isnan(low + high) else f" [{low:.3f}, {high:.3f}]")


def wrapped_table(heads: list[str], rows: list[list[str]], width: int | None = None) -> list[str]:
    """Lines of a table. Columns that do not fit into ``width`` stand below, beside the first column again.

    ``width``: characters; those of the terminal if None.

    Examples
    --------
    >>> for line in wrapped_table(["model", "alpha", "f1"], [["a", "0.5 [0.4, 0.6]", "0.1"]], 24):
    ...     print(line)
    model  alpha
    a      0.5 [0.4, 0.6]
    <BLANKLINE>
    model  f1
    a      0.1
    """
    from xprobe.single_prompt.layout import display_width, fitted

    width = width or shutil.get_terminal_size((100, 24)).columns
    table = [heads, *rows]
    widths = [max(display_width(row[column]) for row in table) for column in range(len(heads))]
    blocks: list[list[int]] = []
    for column in range(1, len(heads)):
        used = widths[0] + sum(2 + widths[one] for one in blocks[-1]) if blocks else width
        if used + 2 + widths[column] > width:
            blocks.append([])
        blocks[-1].append(column)
    lines = []
    for block in blocks:
        lines += ["", *("  ".join(fitted(row[one], widths[one]) for one in (0, *block)).rstrip() for row in table)]
    return lines[1:]
