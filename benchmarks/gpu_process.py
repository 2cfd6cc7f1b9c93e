"""Runs the processes of gpu.py, each with a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
LARGEST_LOG = 8 << 20  # bytes; a longer log keeps only its beginning and its end


@dataclass(frozen=True)
class Part:
    """One process of a step.

    ``read_results`` is called when it has ended, also after a failure. It returns a description of a problem, or None.
    """

    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    read_results: Callable[[], str | None] = lambda: None


def run(part: Part, limit: float) -> int | None:
    """Runs a part. Returns its exit code, or None if it and its children were stopped after ``limit`` seconds."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    with part.log.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(part.command)}\n")
        log.flush()
        try:
            child = subprocess.Popen(
                part.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                env=environment | part.environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            log.write(f"{error}\n")
            return 127
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            log.write(f"\nstopped after {limit:.0f} s\n")
        finally:
            stop(child)
    shorten(part.log)
    return code


def stop(child: subprocess.Popen[Any]) -> None:
    """Ends a process and its group. It first gets SIGTERM, so that a supervisor can end its own workers."""
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def shorten(log: Path) -> None:
    size = log.stat().st_size
    if size > LARGEST_LOG:
        content = log.read_bytes()
        cut = b"\n[... %d bytes left out ...]\n" % (size - LARGEST_LOG)
        log.write_bytes(content[: LARGEST_LOG // 8] + cut + content[-(LARGEST_LOG - LARGEST_LOG // 8) :])
