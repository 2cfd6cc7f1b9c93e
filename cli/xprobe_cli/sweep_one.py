"""`xprobe sweep FOLDER --only NAME`: one model of a sweep, in this process."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xprobe.errors import UsageError
from xprobe_cli.progress import Progress
from xprobe_cli.stopping import EXIT_CODES, Stoppable, Stopped

if TYPE_CHECKING:
    from xprobe.sweeps.plan import SweepModel


def compute(path: Path, name: str) -> int:
    """Computes one model, and returns the exit code."""
    from xprobe.sweeps.child import watch_parent
    from xprobe.sweeps.folder import SweepFolder

    folder = SweepFolder.open(path)
    limit_memory(folder.plan[name])
    from xprobe.sweeps.one import compute_model

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


def limit_memory(model: SweepModel) -> None:
    """Makes allocations beyond the memory of a model fail, in this process. Only Linux counts all of them.

    Raises
    ------
    UsageError
        This process may not have so much.
    """
    memory = model.resources.memory
    if memory is None or not Path("/proc/self/status").exists():
        return
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    except ValueError as error:
        raise UsageError(f"{model.name}: memory {memory:,} is above the limit of this process: {error}") from error
