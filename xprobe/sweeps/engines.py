"""Where the runs of a sweep are computed: here, on Ray, or on Slurm. None of them knows what a run is."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from math import ceil
from typing import Any, Protocol

from xprobe.errors import UsageError, XprobeError
from xprobe.sweeps.child import run_child
from xprobe.sweeps.folder import SweepFolder
from xprobe.sweeps.plan import Resources

HOURS = 24  # most, of a job of Slurm
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
        self._threads = threads_each(workers)
        self._pool = ThreadPoolExecutor(workers)  # a thread waits for a process
        self._waiting: dict[str, Future[Any]] = {}

    def start(self, name: str, resources: Resources) -> None:
        cpus = resources.cpus or self._threads
        self._waiting[name] = self._pool.submit(run_child, str(self._folder.path.resolve()), name, cpus)

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


class Ray:
    """Tasks on a Ray cluster. Ray places them by their demands, and starts a task again whose worker was lost."""

    def __init__(self, folder: SweepFolder, workers: int, address: str | None) -> None:
        self._ray = _imported("ray", "ray")
        self._folder = folder
        self._tasks: dict[Any, str] = {}
        self._threads = 1 if address else threads_each(workers)
        cpus = None if address else workers * max(one.resources.cpus or self._threads for one in folder.plan.models)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send statistics to its makers
        with _in_words(f"cannot reach the Ray cluster {address!r}" if address else "cannot start Ray here"):
            _connect(address)
            # "local": a cluster of its own, also if another one runs on this machine
            self._ray.init(address or "local", num_cpus=cpus, include_dashboard=None if address else False,
                           log_to_driver=False, logging_level="ERROR")  # fmt: skip
        self._task = self._ray.remote(run_child)

    def _most(self, what: str) -> float:
        """The most that any node has of a resource."""
        return max((node["Resources"].get(what, 0) for node in self._ray.nodes() if node["Alive"]), default=0)

    def start(self, name: str, resources: Resources) -> None:
        cpus = resources.cpus or self._threads
        for what, wanted in {"CPU": cpus, "GPU": resources.gpus, "memory": resources.memory or 0}.items():
            if wanted > (most := self._most(what)):  # Ray would wait for such a node for ever
                raise UsageError(f"{what} {wanted:,} is more than any node of the Ray cluster has ({most:,.0f})")
        task = self._task.options(
            name=name, num_cpus=cpus, num_gpus=resources.gpus, memory=resources.memory,
            max_retries=self._folder.plan.retries,
        )  # fmt: skip
        self._tasks[task.remote(str(self._folder.path.resolve()), name, cpus)] = name

    def ended(self) -> dict[str, str | None]:
        if not self._tasks:
            return {}
        done, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        found: dict[str, str | None] = {}
        for task in done:
            name = self._tasks.pop(task)
            try:
                self._ray.get(task)
                found[name] = None
            except self._ray.exceptions.TaskCancelledError:
                found[name] = None
            except Exception as error:
                found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return found

    def cancel(self) -> None:
        """A task that has not begun sees the file ``stop`` when it begins, and computes nothing."""

    def close(self) -> None:
        self._ray.shutdown()


class Slurm:
    """Jobs of a Slurm cluster, one for each run, through submitit."""

    def __init__(self, folder: SweepFolder) -> None:
        submitit = _imported("submitit", "slurm")
        self._parameters = dict(folder.plan.slurm)
        self._cluster = self._parameters.pop("cluster", "slurm")
        self._submitit, self._folder = submitit, folder
        self._jobs: dict[str, Any] = {}
        with _in_words("cannot use Slurm"):
            self._executor({})

    def _executor(self, more: dict[str, Any]) -> Any:
        """A new one for each job: an executor keeps what it was told for the job before."""
        logs = self._folder.path.resolve() / "logs" / "slurm"
        executor = self._submitit.AutoExecutor(folder=logs, cluster=self._cluster)
        executor.update_parameters(**self._parameters | more)
        return executor

    def start(self, name: str, resources: Resources) -> None:
        asked = self._folder.plan[name].resources  # a forecast of memory is no limit, and a job's memory is one
        more: dict[str, Any] = {"name": f"xprobe-{name}"}
        if asked.hours is not None or "timeout_min" not in self._parameters:
            hours = HOURS if asked.hours is None else asked.hours
            more["timeout_min"] = max(1, round(60 * hours))
        more |= {"mem_gb": max(1, ceil(asked.memory / 2**30))} if asked.memory else {}
        more |= {"cpus_per_task": resources.cpus} if resources.cpus else {}
        more |= {"gpus_per_node": ceil(resources.gpus)} if resources.gpus else {}
        with _in_words(f"Slurm does not take the job of {name}"):
            self._jobs[name] = self._executor(more).submit(
                run_child, str(self._folder.path.resolve()), name, resources.cpus
            )

    def ended(self) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for name in [name for name, job in self._jobs.items() if job.done()]:
            error = self._jobs.pop(name).exception()
            found[name] = None if error is None else f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        return found

    def cancel(self) -> None:
        for job in self._jobs.values():
            if job.state.upper() == "PENDING":
                job.cancel()

    def close(self) -> None:
        pass


def threads_each(workers: int) -> int:
    """CPU threads of each of several runs on this machine."""
    return max(1, (os.cpu_count() or 1) // workers)


def make_engine(name: str, folder: SweepFolder, workers: int, address: str | None = None) -> Engine:
    """An engine by its name.

    Parameters
    ----------
    name : str
        One of ``ENGINES``.
    folder : SweepFolder
    workers : int
        Runs at the same time, here and on a Ray cluster that is started here.
    address : str, optional
        Of a Ray cluster.

    Raises
    ------
    UsageError
        A package is missing (the message says how to install it), or the cluster cannot be used.
    """
    if name == "ray":
        return Ray(folder, workers, address)
    return Slurm(folder) if name == "slurm" else Here(folder, workers)


def _imported(package: str, extra: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise UsageError(
            f"the engine {extra!r} needs the package {package}: pip install 'xprobe[{extra}]'; the engine 'here' needs "
            "none"
        ) from error


def _connect(address: str | None) -> None:
    """Raises OSError if nothing answers at HOST:PORT. Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Turns errors of an engine's package into one that says what failed."""
    try:
        yield
    except XprobeError:
        raise
    except Exception as error:
        raise UsageError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
