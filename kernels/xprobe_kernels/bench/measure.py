"""Times calls in turn and measures their memory, on a CPU or a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

SHORT = 2e-3  # seconds; a shorter call is repeated within one measurement until it takes about this long
Call = Callable[[int], object]  # the argument is the number of the call; it selects one of several copies of the inputs


@dataclass
class Sample:
    """The measurements of one call."""

    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None  # peak memory of a call beyond the memory before it, outputs included
    kept_bytes: int | None = None  # memory that the first call keeps: copies, caches, compiled code
    message: str | None = None  # why it failed

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float | None:
        """Interquartile range over the median; None with fewer than three rounds."""
        if len(self.seconds) < 3:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


class Clock:
    """Wall clock and resident memory of this process."""

    device = torch.device("cpu")

    def time(self, call: Call, turn: int, repeats: int = 1) -> float:
        """Seconds per call over ``repeats`` calls in a row."""
        start = time.perf_counter()
        for repeat in range(repeats):
            call(turn + repeat)
        return (time.perf_counter() - start) / repeats

    def memory_in_use(self) -> int | None:
        """Bytes in use now, after freed memory was returned to the system; None where the system does not report it."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        return _status("VmRSS")

    def reset_peak(self) -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        except OSError:
            return False
        return True

    def peak(self) -> int | None:
        return _status("VmHWM")

    def free(self) -> int:
        """Bytes of memory that a call can use."""
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/meminfo").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
        return 4 << 30


class CudaClock(Clock):
    """Events on the current stream, and the statistics of torch's caching allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, call: Call, turn: int, repeats: int = 1) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        for repeat in range(repeats):
            call(turn + repeat)
        stop.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(stop) / 1e3 / repeats

    def memory_in_use(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def reset_peak(self) -> bool:
        torch.cuda.reset_peak_memory_stats(self.device)
        return True

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def free(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


def clock(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else Clock()


def interleaved(names: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yields (round, name): each name once per round, in reverse order in every other round."""
    for number in range(rounds):
        for name in reversed(names) if number % 2 else names:
            yield number, name


def first_call(call: Call, clock: Clock, sample: Sample, check: Callable[[object], None]) -> float:
    """Warms up, passes the result to ``check``, measures the memory of a second call and returns its seconds."""
    before = clock.memory_in_use()
    result = call(0)
    check(result)
    del result
    after_first = clock.memory_in_use()
    peak_was_reset = clock.reset_peak()
    seconds = clock.time(call, 1)
    peak = clock.peak()
    if peak_was_reset and before is not None and after_first is not None and peak is not None:
        sample.kept_bytes, sample.extra_bytes = max(after_first - before, 0), max(peak - after_first, 0)
    return seconds


def time_in_turn(
    calls: dict[str, Call],
    clock: Clock,
    checks: dict[str, Callable[[object], None]],
    *,
    rounds: int | None,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 50,
) -> dict[str, Sample]:
    """Times all calls in turn. A call that fails stores its message in its sample and is not called again.

    ``rounds`` None: as many rounds as fit in ``seconds``, from ``min_rounds`` to ``max_rounds``. If a check raises,
    its call fails.
    """
    samples = {name: Sample() for name in calls}
    repeats: dict[str, int] = {}
    expected = 0.0
    for name, call in calls.items():
        with _store_failure(samples[name]):
            once = first_call(call, clock, samples[name], checks.get(name, _accept))
            repeats[name] = max(1, round(SHORT / max(once, 1e-7)))
            expected += max(once, SHORT)
    if rounds is None:
        rounds = min(max(int(seconds / max(expected, 1e-9)), min_rounds), max_rounds)
    for number, name in interleaved(list(repeats), rounds):
        if samples[name].message is None:
            with _store_failure(samples[name]):
                samples[name].seconds.append(clock.time(calls[name], number * repeats[name], repeats[name]))
    return samples


@contextlib.contextmanager
def _store_failure(sample: Sample) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        sample.message = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        error.__traceback__ = None  # frames hold tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _accept(result: object) -> None:
    pass


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)
