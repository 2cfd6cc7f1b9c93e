"""The memory that a process really holds, watched from a thread."""

from __future__ import annotations

import re
import threading
from pathlib import Path


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs (RssAnon): libraries and mapped files are left out."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


class PeakMemory:
    """``with PeakMemory() as peak: ...`` then ``peak.growth``: most bytes held inside, less those held before."""

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        self.before = self.most = anonymous_bytes()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.most - self.before

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.most = max(self.most, anonymous_bytes())
