"""`xprobe sweep FOLDER --only NAME`: one model of a sweep, in this process."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import click

from xprobe_cli.progress import Progress
from xprobe_cli.stopping import EXIT_CODES, Stoppable, Stopped


def compute(path: Path, name: str) -> int:
    """Computes one model, and returns the exit code."""
    from xprobe.sweeps.child import watch_parent
    from xprobe.sweeps.folder import SweepFolder
    from xprobe.sweeps.one import compute_model

    folder = SweepFolder.open(path)
    if stat.S_ISFIFO(os.fstat(0).st_mode):  # an engine has started this process
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
