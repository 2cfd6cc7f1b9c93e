"""`xprobe export`: the tables of a run in other formats."""

from __future__ import annotations

from pathlib import Path

import click

from xprobe_cli.options import Folder, common, echo_json

FORMATS = ("csv", "parquet", "latex")


@click.command("export")
@click.argument("run", type=Folder())
@click.option("--format", "file_format", type=click.Choice(FORMATS), default="csv", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder; made if it is not there.")
@common
def command(run: Path, file_format: str, out: Path, as_json: bool) -> None:
    """Write the tables of RUN in another format.

    csv and parquet: every table of the run. latex: the tables of the page, one file each, for the package booktabs.
    """
    from xprobe.report.export import export
    from xprobe.results import load_study

    files = export(load_study(run), out, file_format)
    if as_json:
        echo_json({"run_dir": str(run), "files": [str(path) for path in files]})
    else:
        click.echo("\n".join(str(path) for path in files))
