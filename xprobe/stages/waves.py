"""The loop of a run. A GPU computes one wave while a thread waits for the one before it and writes it."""

from __future__ import annotations

from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING

from xprobe.runs.folder import RunFolder
from xprobe.stages.states import Leaving, write_wave
from xprobe.timing import Stopwatch

if TYPE_CHECKING:
    from xprobe.capture.engine import Engine
    from xprobe.capture.layerwise import LayerwiseEngine
    from xprobe.capture.plan import Plan, Wave


def run_waves(
    engine: Engine | LayerwiseEngine,
    plan: Plan,
    wanted: Container[str],
    folder: RunFolder,
    watch: Stopwatch,
    written: Callable[[int], None],
    *,
    backend: str = "auto",
    store_rows: bool = True,
) -> None:
    """Computes every wave of ``plan`` that holds a group of ``wanted`` and writes those groups' shards.

    On a CPU a wave is written before the next is computed. A GPU is waited for by a thread of its own alone, which
    writes what arrives, so the next wave is on its way meanwhile; if something fails or stops the run, what was
    computed is still written before this returns. ``written`` is called from the caller's thread with the number of
    examples that have been written since the last call. Stages in ``watch``: forward, lens, write.

    Raises
    ------
    RuntimeError, MemoryError
        As ``Engine.capture``; or hidden states hold NaN or infinity.
    """
    device = engine.anatomy.head.weight.device
    waves = engine.waves(plan, wanted, backend)

    def compute() -> tuple[Wave, Leaving] | None:
        with watch.timed("forward", device):
            wave, captured = next(waves, (None, None))
        if wave is None or captured is None:
            return None
        with watch.timed("lens", device):
            return wave, Leaving(captured, engine.anatomy.head, backend, store_rows)

    def write(wave: Wave, leaving: Leaving, kept: Callable[[int], None]) -> None:
        values, rows = leaving.wait()
        for count in write_wave(folder, wave, wanted, leaving.offsets, values, rows, watch):
            kept(count)

    if device.type != "cuda":
        while (found := compute()) is not None:
            write(*found, written)
        return
    _overlapped(compute, write, written)
    watch.settle()


def _overlapped(
    compute: Callable[[], tuple[Wave, Leaving] | None],
    write: Callable[[Wave, Leaving, Callable[[int], None]], None],
    written: Callable[[int], None],
) -> None:
    counts: list[int] = []  # of groups that are on the disk and were not told of yet

    def tell() -> None:
        total = sum(counts.pop(0) for _ in range(len(counts)))
        if total:
            written(total)

    writer = ThreadPoolExecutor(1, "xprobe-write")
    futures: list[Future[None]] = []
    try:
        while (found := compute()) is not None:
            futures.append(writer.submit(write, *found, counts.append))
            if len(futures) > 1:
                futures.pop(0).result()
            tell()
        for future in futures:
            future.result()
    except BaseException:
        _finish(writer, futures)
        with suppress(BaseException):  # what the caller raises once more: the first one is what happened
            tell()  # so that what was told in the end is true
        raise
    _finish(writer, futures)
    tell()


def _finish(writer: ThreadPoolExecutor, futures: list[Future[None]]) -> None:
    """Waits for what is being written, whatever interrupts: the folder is locked as long as somebody writes to it."""
    while True:
        try:
            wait(futures)
            writer.shutdown()
            return
        except KeyboardInterrupt:
            continue
