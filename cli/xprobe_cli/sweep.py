"""`xprobe sweep`: many models, and what they say together."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from xprobe_cli.options import Folder, debug_option
from xprobe_cli.stopping import EXIT_CODES


class Workers(click.ParamType):
    """A number of at least 1, or ``auto``."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto" or isinstance(value, int):
            return value
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither a number of at least 1 nor auto", param, ctx)
        return int(value)


@click.command("sweep")
@click.argument("file", type=Folder())
@click.option("--out", type=Folder(), help="Folder of the sweep. [default: sweeps/NAME of NAME.toml]")
@click.option(
    "--engine",
    type=click.Choice(["here", "ray", "slurm"]),
    default="here",
    show_default=True,
    help="Where the runs are computed: processes of this machine, Ray, or Slurm (docs/sweeps.md).",
)
@click.option(
    "--workers",
    type=Workers(),
    default=1,
    show_default=True,
    metavar="N|auto",
    help="Runs at the same time on this machine. auto: as many as fit into its memory.",
)
@click.option("--address", metavar="ADDRESS", help="Of a Ray cluster. [default: Ray is started on this machine]")
@click.option("--forecast/--no-forecast", default=True, help="Forecast memory, disk and time of all models first.")
@click.option("--dry-run", is_flag=True, help="Print the forecast, and stop. Exit code 1: a model cannot run.")
@click.option("--only", metavar="NAME", help="Compute one model of the sweep in the folder FILE, in this process.")
@click.option("--started-by-engine", is_flag=True, hidden=True)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on a line for each change; the last is the summary."
)
@debug_option
def command(
    file: Path, out: Path | None, engine: str, workers: int | str, address: str | None, forecast: bool, dry_run: bool,
    only: str | None, started_by_engine: bool, as_json: bool,
) -> int:  # fmt: skip
    """Run the models that the TOML file FILE names, and compare them.

    FILE may also be the folder of a sweep. The same command goes on where a sweep was stopped, with the same engine or
    with another. A model that fails does not stop the others.

    \b
    xprobe sweep models.toml --dry-run
    xprobe sweep models.toml --workers auto
    xprobe sweep models.toml --engine ray --address auto
    """
    if only is not None:
        from xprobe_cli import sweep_one

        return sweep_one.compute(file, only, started_by_engine=started_by_engine)
    from xprobe.sweeps.run import prepare_only, sweep
    from xprobe_cli.sweep_tables import forecast_report, sweep_report
    from xprobe_cli.sweep_view import View, terminated

    if dry_run and not forecast:
        raise click.UsageError("--dry-run prints the forecast: leave out --no-forecast")
    try:
        # Ray prints its warnings on stdout, which belongs to the results
        with View(as_json=as_json) as view, redirect_stdout(sys.stderr), terminated():
            if dry_run:
                folder, outlook = prepare_only(file, out, engine, address, view)
            else:
                found = sweep(
                    file, out=out, engine=engine, workers=workers, address=address, look=forecast, progress=view
                )
    except KeyboardInterrupt as stopped:
        click.echo("xprobe: interrupted: the runs keep what was computed; the same command goes on", err=True)
        return EXIT_CODES[getattr(stopped, "signal", signal.SIGINT)]
    if dry_run:
        click.echo(_line("forecast", outlook.to_dict()) if as_json else forecast_report(folder, outlook))
        return 1 if outlook.refused or outlook.failed else 0
    click.echo(_line("summary", found.to_dict()) if as_json else sweep_report(found))
    return 0 if found.done else 1


def _line(event: str, values: dict[str, Any]) -> str:
    return json.dumps({"event": event, **values}, ensure_ascii=False, allow_nan=False)
