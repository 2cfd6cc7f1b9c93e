"""The loop of a run. A GPU computes one wave while a thread waits for the one before it and writes it."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING

from xprobe.runs.folder import RunFolder
from xprobe.stages.states import PendingWave, write_wave
from xprobe.timing import Stopwatch

if TYPE_CHECKING:
    from xprobe.capture.plan import Plan, Wave
    from xprobe.capture.runner import Runner
    from xprobe.qa.prompts import Prompt


def run_waves(
    runner: Runner,
    plan: Plan,
    prompts: Mapping[str, Sequence[Prompt]],
    wanted: Container[str],
    folder: RunFolder,
    watch: Stopwatch,
    written: Callable[[int], None],
    *,
    backend: str = "auto",
    store_rows: bool = True,
) -> None:
    """Computes every wave of ``plan`` that holds a group of ``wanted`` and writes those groups' shards.

    On a CPU a wave is written before the next is computed. With a GPU, a writer thread waits for the results and writes
    them while the GPU computes the next wave; if something fails or stops the run, what was computed is still written
    before this returns. Stages in ``watch``: forward, lens, write.

    Parameters
    ----------
    prompts : mapping of str to sequence of Prompt
        By group key, the prompts of the group's requests, in their order.
    written : callable (count)
        Called from the caller's thread with the number of examples written since the last call.

    Raises
    ------
    RuntimeError, MemoryError
        As ``Runner.run``; or hidden states hold NaN or infinity.
    """
    device = runner.anatomy.head.weight.device
    waves = runner.run(plan, wanted)

    def prompts_of(wave: Wave) -> list[Prompt]:
        return [prompt for group in wave.groups for prompt in prompts[group.key]]

    def compute() -> tuple[Wave, PendingWave] | None:
        with watch.timed("forward", device):
            wave, rows = next(waves, (None, None))
        if wave is None or rows is None:
            return None
        with watch.timed("lens", device):
            return wave, PendingWave(rows, prompts_of(wave), runner.anatomy.head, backend, store_rows)

    def write(wave: Wave, pending: PendingWave, kept: Callable[[int], None]) -> None:
        values, rows = pending.wait()
        for count in write_wave(folder, wave, prompts_of(wave), wanted, pending.offsets, values, rows, watch):
            kept(count)

    if device.type != "cuda":
        while (computed := compute()) is not None:
            write(*computed, written)
        return
    _overlapped(compute, write, written)
    watch.settle()


def _overlapped(
    compute: Callable[[], tuple[Wave, PendingWave] | None],
    write: Callable[[Wave, PendingWave, Callable[[int], None]], None],
    written: Callable[[int], None],
) -> None:
    counts: list[int] = []  # of groups that are on the disk and not yet reported

    def report() -> None:
        total = sum(counts.pop(0) for _ in range(len(counts)))
        if total:
            written(total)

    writer = ThreadPoolExecutor(1, "xprobe-write")
    futures: list[Future[None]] = []
    try:
        while (computed := compute()) is not None:
            futures.append(writer.submit(write, *computed, counts.append))
            if len(futures) > 1:
                futures.pop(0).result()
            report()
        for future in futures:
            future.result()
    except BaseException:
        _finish(writer, futures)
        with suppress(BaseException):  # what the caller raises once more: the first one is what happened
            report()  # so that the last report is true
        raise
    _finish(writer, futures)
    report()


def _finish(writer: ThreadPoolExecutor, futures: list[Future[None]]) -> None:
    """Waits for what is being written, whatever interrupts: the folder is locked as long as somebody writes to it."""
    while True:
        try:
            wait(futures)
            writer.shutdown()
            return
        except KeyboardInterrupt:
            continue
