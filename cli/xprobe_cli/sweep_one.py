"""`xprobe sweep FOLDER --only NAME`: one model of a sweep, in this process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click

from xprobe_cli.progress import Progress
from xprobe_cli.stopping import EXIT_CODES, Stoppable, Stopped


def compute(path: Path, name: str, *, started_by_engine: bool = False) -> int:
    """Computes one model, and returns the exit code.

    ``started_by_engine``: standard input is a pipe, and the process ends with the one that holds its other end.
    """
    from xprobe.sweeps.child import watch_parent
    from xprobe.sweeps.folder import SweepFolder
    from xprobe.sweeps.one import compute_model

    folder = SweepFolder.open(path)
    if started_by_engine:
        watch_parent(folder, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with Progress() as progress, Stoppable(progress) as stoppable:
            status = compute_model(folder, name, stoppable)
    except Stopped as stopped:
        click.echo(f"xprobe: interrupted: {name} keeps what was computed; the same command goes on", err=True)
        return EXIT_CODES[stopped.signal]
    for stage, error in status.errors.items():
        click.echo(f"xprobe: error: {name}, {stage}: {error}", err=True)
    return 1 if status.errors else 0
