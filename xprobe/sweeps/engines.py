"""Where the runs of a sweep are computed: here, on Ray, or on Slurm. None of them knows what a run is."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from xprobe.errors import UsageError, XprobeError
from xprobe.sweeps.child import run_child
from xprobe.sweeps.folder import SweepFolder
from xprobe.sweeps.plan import Resources

ENGINES = {
    "here": "processes of this machine",
    "ray": "tasks on a Ray cluster, or on one that is started here (needs xprobe[ray])",
    "slurm": "jobs of a Slurm cluster (needs xprobe[slurm])",
}


class Engine(Protocol):
    """Runs ``run_child`` for every model that it is given, wherever it can."""

    def start(self, name: str, resources: Resources) -> None:
        """Has a model computed as soon as there is room for it."""

    def ended(self) -> Mapping[str, str | None]:
        """Models that have ended since the last call -> what went wrong with the engine itself, or None."""

    def cancel(self) -> None:
        """Forgets models that no process computes yet."""

    def close(self) -> None:
        """Ends what the engine has started, runs excepted."""


class Here:
    """Processes of this machine, at most ``workers`` at a time."""

    def __init__(self, folder: SweepFolder, workers: int) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(workers)  # a thread waits for a process
        self._waiting: dict[str, Future[Any]] = {}

    def start(self, name: str, resources: Resources) -> None:
        self._waiting[name] = self._pool.submit(run_child, str(self._folder.path), name, resources.cpus)

    def ended(self) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for name in [name for name, future in self._waiting.items() if future.done()]:
            future = self._waiting.pop(name)
            error = None if future.cancelled() else future.exception()
            found[name] = None if error is None else f"{type(error).__name__}: {error}"
        return found

    def cancel(self) -> None:
        for future in self._waiting.values():
            future.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=True)


def make_engine(name: str, folder: SweepFolder, workers: int, address: str | None) -> Engine:
    """An engine by its name.

    Raises
    ------
    UsageError
        It is unknown, a package is missing, or its cluster cannot be reached.
    """
    if name == "here":
        return Here(folder, workers)
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}")
    raise XprobeError("not yet")
