"""A sweep from its plan to its table: look ahead, start what is left, show how it goes, compare what there is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xprobe.arguments import check_callable, check_least, folder_path
from xprobe.errors import UsageError, XprobeError
from xprobe.runs.lock import FolderLock
from xprobe.sweeps.comparing import SweepComparison, compare_sweep
from xprobe.sweeps.engines import ENGINES, Engine, make_engine, threads_each
from xprobe.sweeps.folder import PAGE, SUMMARY, Status, SweepFolder
from xprobe.sweeps.forecasts import Outlook, Room, fitting, look_ahead, room_here, streaming
from xprobe.sweeps.plan import read_plan

SECONDS_BETWEEN = 0.3  # two looks at the status files
AUTO = "auto"
Show = Callable[[list[Status]], None]


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep as it stands; ``xprobe.sweep`` returns it.

    Attributes
    ----------
    path : Path
    statuses : tuple of Status
        One for each model, in the order of the plan.
    compared : SweepComparison
    """

    path: Path
    statuses: tuple[Status, ...]
    compared: SweepComparison

    @property
    def comparison(self) -> Any:
        """The models side by side, with ``claims``; None if fewer than two runs can be compared."""
        return self.compared.comparison

    @property
    def done(self) -> bool:
        """Whether every model has all its stages."""
        return all(status.state == "done" for status in self.statuses)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``summary.json`` holds them."""
        return {
            "sweep": str(self.path),
            "models": [status.to_dict() for status in self.statuses],
            "comparison": self.compared.to_dict(),
        }


def sweep(
    file: str | Path,
    *,
    out: str | Path | None = None,
    engine: str = "here",
    workers: int | str = 1,
    address: str | None = None,
    look: bool = True,
    progress: Show | None = None,
) -> Sweep:
    """Runs many models, and compares them.

    What the run folders hold is not computed again, whichever engine computed it. A model that fails does not stop the
    others.

    Parameters
    ----------
    file : path
        The TOML file of a sweep (docs/sweeps.md), or the folder of a sweep that was begun.
    out : path, optional
        Folder of the sweep; ``sweeps/NAME`` of ``NAME.toml`` if None.
    engine : str
        ``here``, ``ray`` or ``slurm``.
    workers : int or ``auto``
        Runs at the same time on this machine; ``auto``: as many as fit into its memory by the forecast.
    address : str, optional
        Of a Ray cluster. None: Ray is started on this machine.
    look : bool
        Forecast all runs first; stream or refuse those that do not fit.
    progress : callable (statuses), optional
        Called several times a second with the ``Status`` of every model.

    Raises
    ------
    UsageError
        The file is wrong, the folder holds another sweep, another process works on it, or the engine cannot be used.
    KeyboardInterrupt
        All runs have stopped at a safe point. The same call goes on.

    Examples
    --------
    >>> import xprobe
    >>> found = xprobe.sweep("models.toml", workers=2)                          # doctest: +SKIP
    >>> found.comparison.claims[["claim", "value", "lo", "hi", "verdict"]]      # doctest: +SKIP
    """
    check_callable("progress", progress)
    check_engine(engine, workers, address)
    show: Show = progress or (lambda statuses: None)
    with locked_sweep(file, out) as folder:
        room = room_of(folder.path, engine, address)
        outlook = prepare(folder, room, show) if look else Outlook()
        count = fitting(folder.plan, outlook, room, threads_each(1)) if isinstance(workers, str) else workers
        compute(folder, make_engine(engine, folder, count, address), outlook, show)
        return finish(folder)


def prepare_only(
    file: str | Path, out: str | Path | None, engine: str, address: str | None, progress: Show
) -> tuple[SweepFolder, Outlook]:
    """The forecast of a sweep, which its folder keeps. Nothing is run. Arguments and errors as for ``sweep``."""
    check_engine(engine, 1, address)
    with locked_sweep(file, out) as folder:
        return folder, prepare(folder, room_of(folder.path, engine, address), progress)


def check_engine(engine: str, workers: int | str, address: str | None) -> None:
    """Checks the options of an engine before anything is read."""
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
    if workers != AUTO:
        check_least("workers", workers, 1)
    if address is not None and engine != "ray":
        raise UsageError(f"address is of a Ray cluster, and the engine is {engine!r}: leave it out, or choose ray")


@contextmanager
def locked_sweep(file: str | Path, out: str | Path | None = None) -> Iterator[SweepFolder]:
    """``open_sweep`` for the only process that may change the sweep: its plan is read or written under a lock."""
    path = sweep_path(file, out)
    with FolderLock(path):
        yield open_sweep(file, out)


def sweep_path(file: str | Path, out: str | Path | None = None) -> Path:
    """The folder of a sweep, where one may lie. Arguments and errors as for ``open_sweep``; nothing is written."""
    path = folder_path("file", file)
    if path.is_dir():
        if out is not None:
            raise UsageError(f"out is for a new sweep, and {path} is the folder of one: leave it out")
        return SweepFolder.open(path).path
    read_plan(path)
    place = Path("sweeps") / path.stem if out is None else folder_path("out", out)
    SweepFolder.check_place(place)
    return place


def open_sweep(file: str | Path, out: str | Path | None = None) -> SweepFolder:
    """The sweep of a TOML file, or that in a folder; ``out`` as for ``sweep``.

    Raises
    ------
    UsageError
        As ``sweep``.
    """
    path, place = folder_path("file", file), sweep_path(file, out)
    return SweepFolder.open(place) if path.is_dir() else SweepFolder.create(place, read_plan(path), path)


def room_of(path: Path, engine: str, address: str | None) -> Room:
    """What a run may take. Of another machine only what the sweep's file says is known."""
    here = room_here(path)
    return here if engine == "here" or (engine == "ray" and address is None) else Room(disk=here.disk)


def prepare(folder: SweepFolder, room: Room, show: Show) -> Outlook:
    """Forecasts all runs. The plan of ``folder`` gets ``stream`` for those that fit in no other way."""
    names = [model.name for model in folder.plan.models]
    statuses = {name: folder.status(name) for name in names}

    def looking_at(name: str) -> None:
        show([replace(status, stage="forecast") if status.name == name else status for status in statuses.values()])

    outlook = look_ahead(folder, room, looking_at)
    folder.change_plan(streaming(folder.plan, outlook))
    return outlook


def compute(folder: SweepFolder, engine: Engine, outlook: Outlook, show: Show) -> None:
    """Computes what the run folders lack, and shows the status of all runs meanwhile.

    KeyboardInterrupt makes all runs stop at their next safe points, and a second one at once. It is raised when they
    have stopped.
    """
    names = [model.name for model in folder.plan.models]
    statuses = {name: folder.status(name) for name in names}
    running: set[str] = set()
    stopped: KeyboardInterrupt | None = None
    folder.may_go_on()
    try:
        for name in names:
            if statuses[name].state != "done":
                statuses[name] = _start(folder, name, statuses[name], engine, outlook)
                running |= {name} if statuses[name].state == "waiting" else set()
        while running:
            try:
                for name, wrong in engine.ended().items():
                    running.discard(name)
                    statuses[name] = _ended(folder, name, wrong)
                statuses |= {name: folder.news(name) for name in running}
                show(list(statuses.values()))
                time.sleep(SECONDS_BETWEEN)
            except KeyboardInterrupt as error:
                folder.ask_to_stop(now=stopped is not None)
                engine.cancel()
                stopped = error
    except BaseException:  # of ``show``, or before all runs had started
        folder.ask_to_stop()
        engine.cancel()
        raise
    finally:
        engine.close()
    show(list(statuses.values()))
    if stopped is not None:
        raise stopped


def _start(folder: SweepFolder, name: str, before: Status, engine: Engine, outlook: Outlook) -> Status:
    """Hands a model to the engine, or says why not. Returns its status, which is in the status file, too."""
    notes = tuple(words[name] for words in (outlook.streamed, outlook.unknown) if name in words)
    notes += tuple(
        f"has {stage} with other settings: it is computed again, and replaced" for stage in folder.changed(name)
    )
    status = Status(name, starts=before.starts, notes=notes)
    resources, found = folder.plan[name].resources, outlook.forecasts.get(name)
    if resources.memory is None and found is not None:
        resources = replace(resources, memory=found.memory)
    if name in outlook.failed:
        status = replace(status, state="failed", errors={"forecast": outlook.failed[name]})
    elif name in outlook.refused:
        status = replace(status, state="refused", errors={"forecast": outlook.refused[name]})
    folder.set_status(status)
    if status.state == "waiting":
        try:
            engine.start(name, resources)
        except XprobeError as error:
            status = replace(status, state="refused", errors={"engine": str(error)})
            folder.set_status(status)
    return status


def _ended(folder: SweepFolder, name: str, wrong: str | None) -> Status:
    """The status of a model that the engine has ended with; ``wrong`` says what happened to the engine itself."""
    status = folder.news(name)
    if wrong is not None:
        status = replace(status, state="failed", errors={**status.errors, "engine": wrong})
    elif status.state == "running":  # whoever watched its process was killed
        status = replace(status, state="failed", errors={**status.errors, "engine": "its process is gone"})
    elif status.state == "waiting" and folder.stop_asked() is not None:
        status = replace(status, state="stopped")
    else:
        return folder.status(name)
    folder.set_status(status)
    return status


def finish(folder: SweepFolder) -> Sweep:
    """Compares the runs of a sweep, and writes ``summary.json`` and the page."""
    found = Sweep(folder.path, tuple(folder.status(model.name) for model in folder.plan.models), compare_sweep(folder))
    folder.write(SUMMARY, json.dumps(found.to_dict(), ensure_ascii=False, indent=1, allow_nan=False).encode())
    if found.comparison is not None:
        found.comparison.to_html(folder.path / PAGE)
    return found
