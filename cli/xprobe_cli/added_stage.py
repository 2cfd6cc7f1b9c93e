"""What the commands share that add a stage to a finished run: progress, interruption, table or JSON, warnings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from xprobe.events import Notify
from xprobe_cli.options import echo_json, tracked
from xprobe_cli.progress import Progress
from xprobe_cli.stopping import EXIT_CODES, Stoppable, Stopped

if TYPE_CHECKING:
    from xprobe.results import Study


def add_stage(
    stage: str,
    compute: Callable[[Notify], Study],
    report: Callable[[Study], str],
    *,
    as_json: bool,
    track: str | None = None,
) -> int:
    """Computes a stage and prints its table, or one JSON object. Returns the exit code.

    Parameters
    ----------
    stage : str
        Its name in the manifest.
    compute : callable (progress) -> Study
    report : callable (study) -> str
        The table.
    as_json : bool
    track : str, optional
        What ``--track`` says.
    """
    try:
        with Progress() as progress, Stoppable(progress) as stoppable:
            study = compute(tracked(stoppable, track))
    except Stopped as stopped:
        click.echo("xprobe: interrupted: what was computed is kept; the same command goes on", err=True)
        return EXIT_CODES[stopped.signal]
    if as_json:
        echo_json(plain_stage(study, stage))
    else:
        click.echo(report(study))
    for warning in study.manifest.stages[stage].warnings:
        click.echo(f"xprobe: {warning}", err=True)
    return 0


def plain_stage(study: Study, stage: str) -> dict[str, Any]:
    """What ``--json`` prints of a stage."""
    entry = study.manifest.stages[stage]
    return {
        "run_dir": str(study.path),
        "model": study.manifest.model.name,
        **entry.results,
        "seconds": entry.seconds,
        "warnings": entry.warnings,
    }
