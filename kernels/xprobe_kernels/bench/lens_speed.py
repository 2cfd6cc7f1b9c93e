"""Compares the lens backends with their rivals on one shape."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from xprobe_kernels.bench import baselines
from xprobe_kernels.bench.accuracy import truth
from xprobe_kernels.bench.baselines import COMPILED, Task, Variant
from xprobe_kernels.bench.measure import Call, Clock, Sample, clock, time_in_turn
from xprobe_kernels.bench.metrics import Ceilings, figures
from xprobe_kernels.bench.shapes import Work

COPY, SQUARE = "large copy", "large square product"
WRONG, FAILED, OK, SKIPPED = "wrong", "failed", "ok", "skipped"
CACHES = 4  # all copies of the inputs together are this many times as large as the GPU's cache
CPU_MEMORY = 6 << 30  # bytes that a naive variant may use on a CPU; if it needs more, it takes its rows in chunks


class Judge(Protocol):
    """The truth about a sample of rows."""

    def judge(self, reading: Any) -> tuple[dict[str, float], str | None]:
        """The errors of a reading, and a description of what is wrong with it, or None."""


class WrongError(ArithmeticError):
    """The error of a result is above its bound."""


def compare(
    work: Work,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backends: list[str],
    rounds: int | None,
    seconds: float,
    kl: bool = False,
    quick: bool = False,
) -> dict[str, Any]:
    """Figures of every variant on ``work``. A variant that fails or is wrong is reported; the others are measured.

    ``quick`` leaves out torch.compile and measures the ceilings with small tensors.
    """
    timer = clock(device)
    report = describe(work, dtype) | {"kl": kl}
    try:
        tasks = make_tasks(work, device, dtype, kl=kl)
        judge = truth(tasks[0])
    except (RuntimeError, MemoryError) as error:  # torch's out-of-memory error is a RuntimeError
        return report | {"message": inputs_failed(error)}
    variants = baselines.variants(work, dtype, backends, usable_memory(timer), kl=kl, device=device.type)
    if quick:
        variants = [
            replace(variant, skip_reason="left out by --quick") if variant.kind == COMPILED else variant
            for variant in variants
        ]
    large = LARGE["quick" if quick else device.type]
    samples, entries = measure_variants(variants, tasks, judge, large, timer, dtype, rounds=rounds, seconds=seconds)
    short = baselines.DTYPES[report["dtype"]]
    naive, product = median(samples["naive fp32"]), median(samples[f"bare product {short}"])
    ceilings = large.ceilings(samples, work, product)
    for entry in entries:
        if entry["status"] == OK:
            speed = figures(work, dtype.itemsize, entry["seconds"], naive=naive, product=product, ceilings=ceilings)
            entry |= speed
    report |= {"variants": entries, "copies_of_inputs": len(tasks)}
    report |= {"bounds": judge.bounds, "sampled_rows": len(judge.index)}
    report["ceilings"] = None if ceilings is None else vars(ceilings)
    del tasks, judge, variants
    gc.collect()
    if not quick:
        torch.compiler.reset()  # each shape compiles its own code
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return report


def describe(work: Work, dtype: torch.dtype) -> dict[str, Any]:
    """The beginning of a report on ``work``, before anything is measured."""
    return {
        "name": work.name,
        "text": str(work),
        "model": work.head.title,
        "regime": work.regime,
        "rows": work.rows,
        "full_rows": work.full_rows,
        "width": work.head.width,
        "vocabulary": work.vocabulary,
        "full_vocabulary": work.head.vocabulary,
        "softcap": work.head.softcap,
        "cut": work.cut,
        "dtype": str(dtype).removeprefix("torch."),
        "operations": work.operations,
        "least_bytes": work.least_bytes(dtype.itemsize),
        "message": None,
        "variants": [],
    }


def inputs_failed(error: Exception) -> str:
    return f"inputs: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def usable_memory(timer: Clock) -> float:
    """Bytes that one call of a variant may use."""
    free = timer.free() * 0.8
    return min(free, CPU_MEMORY) if timer.device.type == "cpu" else free


def measure_variants(
    variants: list[Variant],
    tasks: list[Task],
    judge: Judge,
    large: Large,
    timer: Clock,
    dtype: torch.dtype,
    *,
    rounds: int | None,
    seconds: float,
) -> tuple[dict[str, Sample], list[dict[str, Any]]]:
    """Measures the variants and the machine's own speed in turn, after ``judge`` checked each variant's first result.

    Returns the samples by name, and one entry per variant. Only an entry whose status is ok has a time.
    """
    run = [variant for variant in variants if variant.skip_reason is None]
    errors: dict[str, dict[str, float]] = {}
    wrong: set[str] = set()
    checks = {variant.name: _check(variant, judge, errors, wrong) for variant in run if variant.read is not None}
    calls: dict[str, Call] = {variant.name: _in_turn(variant.call, tasks) for variant in run}
    samples = time_in_turn(calls | large.calls(timer.device, dtype), timer, checks, rounds=rounds, seconds=seconds)
    entries = []
    for variant in variants:
        sample = samples.get(variant.name, Sample(message=variant.skip_reason))
        status = (
            SKIPPED if variant.skip_reason else WRONG if variant.name in wrong else FAILED if sample.message else OK
        )
        entry: dict[str, Any] = {
            "name": variant.name,
            "kind": variant.kind,
            "status": status,
            "message": sample.message,
            "rows_at_once": variant.rows_at_once,
            "errors": errors.get(variant.name),
        }
        if status == OK:
            entry |= {"seconds": sample.median, "spread": sample.spread, "rounds": sample.seconds}
            entry |= {"extra_bytes": sample.extra_bytes, "kept_bytes": sample.kept_bytes}
        entries.append(entry)
    return samples, entries


def make_tasks(work: Work, device: torch.device, dtype: torch.dtype, *, kl: bool = False) -> list[Task]:
    """Copies of one input, which the calls use in turn; on a GPU so many that no call finds its inputs in the cache."""
    tasks = [baselines.make(work, device, dtype, kl=kl)]
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        copies = -(-CACHES * cache // work.least_bytes(dtype.itemsize))
        tasks += [tasks[0].clone() for _ in range(1, copies)]
    return tasks


def _in_turn(call: Callable[[Task], Any], tasks: list[Task]) -> Call:
    return lambda turn: call(tasks[turn % len(tasks)])


def _check(
    variant: Variant, judge: Judge, errors: dict[str, dict[str, float]], wrong: set[str]
) -> Callable[[Any], None]:
    """A check that stores the errors of a result. If one is above its bound, the variant is wrong and fails."""

    def check(result: Any) -> None:
        assert variant.read is not None
        reading = variant.read(result)
        errors[variant.name], fault = judge.judge(reading)
        if fault is not None:
            wrong.add(variant.name)
            raise WrongError(fault)

    return check


@dataclass(frozen=True)
class Large:
    """Two measurements of the machine's own speed: a square product of ``side``, and a copy of ``size`` bytes."""

    side: int
    size: int

    def calls(self, device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
        """Calls to measure in turn with the variants."""
        square = torch.randn(self.side, self.side, device=device).to(dtype)
        out = torch.empty_like(square)
        source = torch.ones(self.size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        return {COPY: lambda turn: target.copy_(source), SQUARE: lambda turn: torch.mm(square, square, out=out)}

    def ceilings(self, samples: dict[str, Sample], work: Work, product: float | None) -> Ceilings | None:
        copy, square = median(samples[COPY]), median(samples[SQUARE])
        if copy is None or square is None:
            return None
        operations = 2 * self.side**3 / square
        if product is not None:
            operations = max(operations, work.operations / product)
        return Ceilings(2 * self.size / copy, operations)


def median(sample: Sample) -> float | None:
    """Median seconds; None if the call failed."""
    return None if sample.message else sample.median


LARGE = {"cuda": Large(8192, 1 << 30), "cpu": Large(2048, 256 << 20), "quick": Large(512, 64 << 20)}
