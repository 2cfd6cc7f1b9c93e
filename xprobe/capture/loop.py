"""The loop of a run: one wave is computed while the one before it is written."""

from __future__ import annotations

from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from xprobe.shards import Leaving, write_wave
from xprobe.store import RunFolder
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

    A GPU is waited for by the thread that writes alone, so the next wave is on its way before the last has arrived.
    ``written`` is called from this thread with the number of examples of each wave that has been written; also of the
    last one computed when something fails. Stages in ``watch``: forward, lens, write.

    Raises
    ------
    RuntimeError, MemoryError
        As ``Engine.capture``; or hidden states hold NaN or infinity.
    """
    device = engine.anatomy.head.weight.device
    waves = engine.waves(plan, wanted, backend)
    writing: Future[int] | None = None

    def write(wave: Wave, leaving: Leaving) -> int:
        values, rows = leaving.wait()
        with watch.timed("write"):
            return write_wave(folder, wave, wanted, leaving.offsets, values, rows)

    with ThreadPoolExecutor(1, "xprobe-write") as writer:
        try:
            while True:
                with watch.timed("forward", device):
                    wave, captured = next(waves, (None, None))
                if wave is None or captured is None:
                    break
                with watch.timed("lens", device):
                    leaving = Leaving(captured, engine.anatomy.head, backend, store_rows)
                before, writing = writing, writer.submit(write, wave, leaving)
                if before is not None:
                    written(before.result())
        finally:
            if writing is not None:  # whatever happened: what is computed is kept
                written(writing.result())
    watch.settle()
