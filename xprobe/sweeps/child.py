"""The process of one run. All engines start the same one, so a run is the same wherever it is computed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from xprobe.sweeps.folder import NOW, Status, SweepFolder

SECONDS_BETWEEN = 0.2  # two looks at the file ``stop``
LOST = 137  # exit code of a process whose parent is gone; as if it had been killed


def run_child(path: str, name: str, cpus: int | None = None) -> Status:
    """Computes one model in a process of its own, and waits for it.

    A process that is killed, by a user or for want of memory, is started again, as often as the plan says. It goes on
    where the run folder stands.

    Parameters
    ----------
    path : str
        Folder of the sweep.
    name : str
        Of the model.
    cpus : int, optional
        Threads of the process; as the system chooses if None.

    Returns
    -------
    Status
        As it is in the status file.
    """
    folder = SweepFolder.open(path)
    for last in [False] * folder.plan.retries + [True]:
        if folder.stop_asked() is not None:
            break
        status = folder.status(name)
        folder.set_status(replace(status, state="running", starts=status.starts + 1))
        code = _wait(folder, name, cpus)
        status = _settled(folder, name, code)
        if code >= 0 or last:
            folder.set_status(status)
            break
    return folder.status(name)


def _wait(folder: SweepFolder, name: str, cpus: int | None) -> int:
    """Exit code of a process that computes a model; negative: the signal that killed it.

    Its standard input is a pipe that nothing is written to. It ends when this process ends, however that happens.
    """
    command = [sys.executable, "-m", "xprobe_cli", "sweep", str(folder.path), "--only", name, "--started-by-engine"]
    # the process finds the packages that this one finds
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    if cpus is not None:
        env["OMP_NUM_THREADS"] = str(cpus)
    with folder.log(name).open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True
        )
        try:
            return process.wait()
        finally:
            if process.stdin is not None:
                process.stdin.close()


def _settled(folder: SweepFolder, name: str, code: int) -> Status:
    """The status of a run whose process has ended with ``code``."""
    status = folder.status(name)
    if status.state != "running":  # the process had time to write it
        return status
    if code < 0:
        words = f"its process was killed by signal {-code}; if nobody did that, memory ran out"
    else:
        words = f"its process ended with exit code {code}: {last_line(folder.log(name))}"
    return replace(status, state="failed", errors={**status.errors, status.stage or "start": words})


def last_line(path: Path) -> str:
    """The last line of a log; says so if it is empty."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def watch_parent(folder: SweepFolder, stop: Callable[[], None]) -> None:
    """Starts a thread in the process of a run: it calls ``stop`` when the sweep is to stop, and ends the process with
    its parent.

    ``stop`` is called once for a stop at a safe point, and once more for a stop at once. A run whose parent is gone
    ends like a run that was killed: another process may go on with it.
    """

    def watch_stop() -> None:
        for wanted in (None, NOW):
            while (asked := folder.stop_asked()) is None or (wanted is not None and asked != wanted):
                time.sleep(SECONDS_BETWEEN)
            stop()

    def watch_pipe() -> None:
        while os.read(0, 1024):
            pass
        os._exit(LOST)

    for target in (watch_stop, watch_pipe):
        threading.Thread(target=target, daemon=True).start()
