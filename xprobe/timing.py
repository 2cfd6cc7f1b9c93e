"""Seconds per stage. Work on a GPU is timed by the GPU itself, and read when all of it is done: nothing waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Adds up the seconds of named stages in ``seconds``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[tuple[str, Any, Any]] = []  # stage, first and last event on the GPU

    @contextmanager
    def timed(self, name: str, device: Any = None) -> Iterator[None]:
        """``device``: a torch.device; on a GPU the stage is what its stream does for the work that is given here."""
        if device is None or device.type != "cuda":
            started = time.perf_counter()
            try:
                yield
            finally:
                self.add(name, time.perf_counter() - started)
            return
        import torch

        stream = torch.cuda.current_stream(device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(stream)
        try:
            yield
        finally:
            last.record(stream)
            self._running.append((name, first, last))

    def add(self, name: str, seconds: float) -> None:
        """Adds to a stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def collect(self) -> None:
        """Waits for the GPU's stages and adds them up."""
        for name, first, last in self._running:
            last.synchronize()
            self.add(name, first.elapsed_time(last) / 1e3)
        self._running.clear()
