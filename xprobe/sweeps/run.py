"""A sweep from its plan to its table: start what is left, show how it goes, compare what there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from xprobe.arguments import check_least, folder_path
from xprobe.sweeps.engines import Engine, make_engine
from xprobe.sweeps.folder import Status, SweepFolder
from xprobe.sweeps.plan import read_plan

SECONDS_BETWEEN = 0.3  # two looks at the status files
Show = Callable[[list[Status]], None]


@dataclass(frozen=True)
class Sweep:
    """A sweep as it stands.

    Attributes
    ----------
    path : Path
    statuses : tuple of Status
        One for each model, in the order of the plan.
    """

    path: Path
    statuses: tuple[Status, ...]


def open_sweep(file: str | Path, out: str | Path | None = None) -> SweepFolder:
    """The folder of a sweep, from a TOML file or from the folder itself.

    ``out`` is the folder of a TOML file's sweep: ``sweeps/NAME`` of ``NAME.toml`` if None.
    """
    path = folder_path("file", file)
    if path.is_dir():
        return SweepFolder.open(path)
    plan = read_plan(path)
    return SweepFolder.create(Path("sweeps") / path.stem if out is None else folder_path("out", out), plan, path)


def compute(folder: SweepFolder, engine: Engine, show: Show) -> None:
    """Computes what the run folders lack, and shows the status of all runs while it does.

    KeyboardInterrupt makes all runs stop at their next safe points, and a second one at once. It is raised when they
    have stopped.
    """
    names = [model.name for model in folder.plan.models]
    folder.may_go_on()
    running = set()
    asked = 0
    try:
        for name in names:
            status = folder.status(name)
            if status.state in ("done", "refused"):
                continue
            folder.set_status(Status(name, starts=status.starts, notes=status.notes))
            engine.start(name, folder.plan[name].resources)
            running.add(name)
        while running:
            try:
                for name, wrong in engine.ended().items():
                    running.discard(name)
                    status = folder.status(name)
                    if wrong is not None:
                        folder.set_status(replace(status, state="failed", errors={**status.errors, "engine": wrong}))
                show([folder.status(name) for name in names])
                time.sleep(SECONDS_BETWEEN)
            except KeyboardInterrupt:
                asked += 1
                folder.ask_to_stop(now=asked > 1)
                engine.cancel()
    finally:
        engine.close()
    show([folder.status(name) for name in names])
    if asked:
        raise KeyboardInterrupt
