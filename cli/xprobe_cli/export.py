"""`xprobe export`: the tables of a run in other formats."""

from __future__ import annotations

from pathlib import Path

import click

from xprobe.report.export import FORMATS, export
from xprobe_cli.options import Folder, common, echo_json


def _help() -> str:
    """The text of `xprobe export --help`, with one line for each format."""
    width = max(map(len, FORMATS))
    lines = [f"{name:<{width}}  {description}" for name, description in FORMATS.items()]
    return "\n".join(["Write the tables of RUN in another format.", "", "\b", *lines])


@click.command("export", help=_help())
@click.argument("run", type=Folder())
@click.option("--format", "file_format", type=click.Choice(list(FORMATS)), default="csv", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder; made if it is not there.")
@common
def command(run: Path, file_format: str, out: Path, as_json: bool) -> None:
    """Runs `xprobe export`; ``_help`` has the text for users."""
    from xprobe.results import load_study

    files = export(load_study(run), out, file_format)
    if as_json:
        echo_json({"run_dir": str(run), "files": [str(path) for path in files]})
    else:
        click.echo("\n".join(str(path) for path in files))
