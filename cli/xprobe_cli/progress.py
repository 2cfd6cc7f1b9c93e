"""Progress on stderr: lines, and a bar with rate and remaining time."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from xprobe.events import Begun, Event, Finished, Note, Step

WIDTH = 30  # of the bar, in characters
SECONDS_BETWEEN = 0.1  # two drawings of the bar


class Progress:
    """Shows the events of a run (``xprobe.events``). Only important notes are printed if the stream is no terminal.

    A ``Step`` moves the bar of its stage. Rate and remaining time count only what this process did, from the first
    step on, not what a resumed run held already. A ``Stage`` or a ``Note`` is printed as a line above a bar that is
    not full.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.enabled = self.stream.isatty()
        self.done = self.total = 0
        self._clock = clock
        self.stage = ""  # of the bar; empty before the first
        self._open = False  # whether the bar may still move
        self._started = self._drawn = 0.0
        self._done_at_start = 0
        self._shown = 0  # characters that the bar takes on its line

    def __call__(self, event: Event) -> None:
        if isinstance(event, Begun | Finished):
            return  # the command itself says where the files are
        if not isinstance(event, Step):
            self._line(str(event), important=isinstance(event, Note) and event.important)
            return
        stage, done, total = event.stage, event.done, event.total
        if stage != self.stage or not self._open:
            self.close()
            self.stage, self._open, self._started, self._done_at_start = stage, True, self._clock(), done
            self._drawn = float("-inf")
        self.done, self.total = done, total
        if self.enabled and (done >= total or self._clock() - self._drawn >= SECONDS_BETWEEN):
            self._draw()

    def close(self) -> None:
        """Ends the line of the bar."""
        if self._shown:
            self._draw()
            self._write("\n")
        self._open, self._shown = False, 0

    def _line(self, text: str, important: bool) -> None:
        if self._open and self.done >= self.total:
            self.close()
        if self.enabled:
            self._write(f"\r{text.ljust(self._shown)}\n")
            if self._shown:
                self._draw()
        elif important:
            self._write(f"xprobe: {text}\n")

    def _draw(self) -> None:
        filled = WIDTH * min(self.done, self.total) // self.total
        bar = "#" * filled + "-" * (WIDTH - filled)
        text = f"{self.stage}  [{bar}]  {self.done}/{self.total}{self._pace()}"
        text = text[: max(shutil.get_terminal_size().columns - 1, 20)]
        self._write(f"\r{text.ljust(self._shown)}")
        self._shown, self._drawn = len(text), self._clock()

    def _pace(self) -> str:
        """Rate and remaining time; empty before the first step of this process."""
        count, seconds = self.done - self._done_at_start, self._clock() - self._started
        if count <= 0 or seconds <= 0:
            return ""
        rate = f"{count / seconds:.1f} per s" if count >= seconds else f"{seconds / count:.1f} s each"
        if self.done >= self.total:
            return f"  {rate}, took {duration(seconds)}"
        return f"  {rate}, {duration(seconds / count * (self.total - self.done))} left"

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def duration(seconds: float) -> str:
    """``0:07``, ``12:30``, ``3:04:00``, ``5 d 3 h``."""
    whole = round(seconds)
    if whole >= 2 * 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
