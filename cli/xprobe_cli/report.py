"""`xprobe report`: the page of a finished run."""

from __future__ import annotations

from pathlib import Path

import click

from xprobe_cli.options import Folder, common, echo_json


@click.command("report")
@click.argument("run", type=Folder())
@click.option("--out", type=click.Path(path_type=Path), help="The file. [default: report.html in RUN]")
@common
def command(run: Path, out: Path | None, as_json: bool) -> None:
    """Write the page of RUN: one HTML file with all figures and tables, which opens without a network.

    It shows every stage that the run has: phases and signals, probes, answers, evidence, relevance, patching. Write it
    again after another stage.
    """
    from xprobe.results import load_study

    path = load_study(run).to_html(out)
    if as_json:
        echo_json({"run_dir": str(run), "report": str(path)})
    else:
        click.echo(f"page      {path}")
