"""`xprobe sweep`: many models."""

from __future__ import annotations

from pathlib import Path

import click

from xprobe.errors import UsageError
from xprobe_cli.options import Folder, common


@click.command("sweep")
@click.argument("file", type=Folder())
@click.option("--out", type=Folder(), help="Folder of the sweep. [default: sweeps/NAME of NAME.toml]")
@click.option("--engine", default="here")
@click.option("--workers", type=click.IntRange(min=1), default=1)
@click.option("--only")
@common
def command(file: Path, out: Path | None, engine: str, workers: int, only: str | None, as_json: bool) -> int:
    """sweep"""
    from xprobe.sweeps.run import compute, open_sweep
    from xprobe.sweeps.engines import make_engine
    from xprobe_cli import sweep_one

    if only is not None:
        return sweep_one.compute(file, only)
    folder = open_sweep(file, out)
    compute(folder, make_engine(engine, folder, workers, None), lambda s: click.echo(str([(x.name, x.state, x.stage, x.done, x.total, x.errors) for x in s])))
    return 0
