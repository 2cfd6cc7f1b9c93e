"""Computing and writing side by side: a writer thread waits for a GPU and writes its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

Pending = TypeVar("Pending")


def in_turn(
    pending: Iterable[Pending], write: Callable[[Pending, Callable[[int], None]], None], written: Callable[[int], None]
) -> None:
    """Writes each piece of work before the next is computed: on a CPU both need the same cores.

    Parameters
    ----------
    pending : iterable
        Gives one piece of work after the other; computing happens while it is asked for the next.
    write : callable (pending, written)
        Waits for a piece of work and writes it; calls ``written(count)`` for every part that is on the disk.
    written : callable (count)
    """
    for piece in pending:
        write(piece, written)


def overlapped(
    pending: Iterable[Pending], write: Callable[[Pending, Callable[[int], None]], None], written: Callable[[int], None]
) -> None:
    """The same with a writer thread, while the caller's thread computes the next piece.

    If something fails or stops the run, what was computed is still written before this returns. ``written`` is called
    from the caller's thread.
    """
    counts: list[int] = []  # of parts that are on the disk and not yet reported

    def report() -> None:
        total = sum(counts.pop(0) for _ in range(len(counts)))
        if total:
            written(total)

    writer = ThreadPoolExecutor(1, "xprobe-write")
    futures: list[Future[None]] = []
    try:
        for piece in pending:
            futures.append(writer.submit(write, piece, counts.append))
            if len(futures) > 1:
                futures.pop(0).result()
            report()
        for future in futures:
            future.result()
    except BaseException:
        _finish(writer, futures)
        with suppress(BaseException):  # the first error is the one to raise
            report()  # so that the last report has the right count
        raise
    _finish(writer, futures)
    report()


def _finish(writer: ThreadPoolExecutor, futures: list[Future[None]]) -> None:
    """Waits until everything is written, also if interrupted: the folder must stay locked until then."""
    while True:
        try:
            wait(futures)
            writer.shutdown()
            return
        except KeyboardInterrupt:
            continue
