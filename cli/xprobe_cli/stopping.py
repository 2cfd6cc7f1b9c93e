"""Ctrl-C and SIGTERM during a run: stop at a safe point, and print the command that continues the run."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from xprobe.events import Event
from xprobe.runs.commands import resume_command
from xprobe.runs.folder import MANIFEST
from xprobe_cli.progress import Progress

STEP = "forward and lens"  # the stage that computes examples of a run
SAFE = (STEP, "answers")  # stages whose steps are safe points
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as a shell counts it


class Stopped(KeyboardInterrupt):
    """A signal stopped the run. ``signal`` is that signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


class Stoppable:
    """A ``progress`` that stops the run by raising ``Stopped``. As a context manager it catches the signals.

    While examples are computed, the first signal waits for the next call of ``progress``: then the computed examples
    are on the disk. A second signal does not wait. At other times nothing can be lost, so the first does not wait
    either. Signals that the caller ignores (``nohup``) or handles are not caught. On exit all handlers are restored.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._signal: int | None = None  # waits for the next safe point
        self._before: dict[int, Any] = {}

    def __call__(self, event: Event) -> None:
        self.progress(event)
        if self._signal is not None:
            raise Stopped(self._signal)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        computing = self.progress.stage in SAFE and self.progress.done < self.progress.total
        if self._signal is not None or not computing:
            raise Stopped(number)
        self._signal = number
        line = "xprobe: stopping after the current examples; a second signal stops at once\n"
        # not through sys.stderr: the signal may have interrupted a call that writes to it
        os.write(2, (f"\n{line}" if self.progress.enabled else line).encode())

    def __enter__(self) -> Stoppable:
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) is usual:
                try:
                    self._before[number] = signal.signal(number, self._handle)
                except ValueError:  # not the main thread: the caller handles signals
                    break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def resume_hint(progress: Progress, folder: Path, options: list[str]) -> str:
    """One line: how much is kept, and the command that continues the run."""
    if not (folder / MANIFEST).is_file():
        return "nothing was computed yet; the same command begins again"
    counted = progress.stage == STEP and progress.done < progress.total
    kept = f"{progress.done} of {progress.total} examples are kept" if counted else "what was computed is kept"
    return f"{kept}; continue with: {resume_command(folder, options, program())}"


def program() -> str:
    """The command that starts xprobe here."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return shlex.join([sys.executable, "-m", "xprobe_cli"])
    if called.name == "xprobe" and not shutil.which("xprobe"):
        return shlex.quote(str(called))
    return "xprobe"
