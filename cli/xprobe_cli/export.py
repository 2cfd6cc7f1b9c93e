"""`xprobe export`: the tables of a run in other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xprobe.report.export import FORMATS, export
from xprobe.report.hub import upload
from xprobe_cli.options import Folder, common, echo_json


def _help() -> str:
    """The text of `xprobe export --help`, with one line for each format."""
    width = max(map(len, FORMATS))
    lines = [f"{name:<{width}}  {description}" for name, description in FORMATS.items()]
    return "\n".join([
        "Write the tables of RUN in another format. --to-hub uploads the format hub; --format hub --out FOLDER writes",
        "what would be uploaded, to look at first.",
        "",
        "\b",
        *lines,
    ])  # fmt: skip


@click.command("export", help=_help())
@click.argument("run", type=Folder())
@click.option(
    "--format",
    "file_format",
    type=click.Choice(list(FORMATS)),
    help="One of the formats above.  [default: csv; hub with --to-hub]",
)
@click.option("--out", type=click.Path(path_type=Path), help="The folder; made if it is not there.")
@click.option("--to-hub", "repository", metavar="[OWNER/]NAME", help="Upload to this data set of the Hugging Face Hub.")
@click.option("--private", is_flag=True, help="Make a new data set private.")
@click.option("--revision", metavar="BRANCH", help="Upload to this branch.  [default: main]")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@click.option("--license", metavar="ID", help="Licence that the card names, such as cc-by-4.0.  [default: none]")
@common
def command(
    run: Path, file_format: str | None, out: Path | None, repository: str | None, license: str | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Runs `xprobe export`; ``_help`` has the text for users."""
    from xprobe.results import load_study

    if repository is None and out is None:
        raise click.UsageError("name the folder (--out), or a data set of the Hub (--to-hub)")
    given = [f"--{name}" for name, value in options.items() if value]
    if repository is None and given:
        raise click.UsageError(f"{given[0]} is for an upload: add --to-hub NAME")
    if repository is not None and file_format not in (None, "hub"):
        raise click.UsageError(f"--to-hub uploads the format hub, not {file_format}: leave out --format")
    study = load_study(run)
    file_format = file_format or ("csv" if repository is None else "hub")
    files = [] if out is None else export(study, out, file_format, license=license)
    address = None if repository is None else upload(study, repository, license=license, **options)
    if as_json:
        echo_json({"run_dir": str(run), "files": [str(path) for path in files], "commit": address})
    else:
        click.echo("\n".join([*map(str, files), *([address] if address else [])]))
