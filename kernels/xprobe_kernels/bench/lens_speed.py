"""Compares the lens backends with their rivals on one shape."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from xprobe_kernels.bench import baselines
from xprobe_kernels.bench.accuracy import Truth, truth
from xprobe_kernels.bench.baselines import COMPILED, Task, Variant
from xprobe_kernels.bench.measure import Call, Sample, by_turns, clock
from xprobe_kernels.bench.metrics import Ceilings, figures
from xprobe_kernels.bench.shapes import Work

COPY, SQUARE = "large copy", "large square product"
WRONG, FAILED, OK, SKIPPED = "wrong", "failed", "ok", "skipped"
CACHES = 4  # all copies of the inputs together are this many times as large as the GPU's cache
CPU_MEMORY = 6 << 30  # bytes that a naive variant may use on a CPU; beyond them it takes its rows in chunks


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
    """Figures of every variant on ``work``. A variant that fails or is wrong is reported, and the others go on.

    ``quick`` leaves out torch.compile and measures the ceilings with small tensors.
    """
    tick = clock(device)
    report: dict[str, Any] = {
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
        "kl": kl,
        "operations": work.operations,
        "least_bytes": work.least_bytes(dtype.itemsize),
        "message": None,
        "variants": [],
    }
    try:
        tasks = make_tasks(work, device, dtype, kl=kl)
        judge = truth(tasks[0])
    except (RuntimeError, MemoryError) as error:  # torch's out-of-memory error is a RuntimeError
        return report | {"message": f"inputs: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    free = tick.free() * 0.8
    variants = baselines.variants(
        work, dtype, backends, min(free, CPU_MEMORY) if device.type == "cpu" else free, kl=kl, device=device.type
    )
    skipped = [variant for variant in variants if quick and variant.kind == COMPILED]
    run = [variant for variant in variants if variant not in skipped]
    errors: dict[str, dict[str, float]] = {}
    wrong: set[str] = set()
    checks = {variant.name: _check(variant, judge, errors, wrong) for variant in run if variant.read is not None}
    large = LARGE["quick" if quick else device.type]
    calls: dict[str, Call] = {variant.name: _turning(variant.call, tasks) for variant in run}
    samples = by_turns(calls | large.calls(device, dtype), tick, checks, rounds=rounds, seconds=seconds)
    short = baselines.DTYPES[report["dtype"]]
    naive, product = _median(samples["naive fp32"]), _median(samples[f"bare product {short}"])
    ceilings = large.ceilings(samples, work, product)
    for variant in variants:
        sample = samples.get(variant.name, Sample())
        entry: dict[str, Any] = {
            "name": variant.name,
            "kind": variant.kind,
            "status": WRONG if variant.name in wrong else FAILED if sample.message else OK,
            "message": sample.message,
            "rows_at_once": variant.rows_at_once,
            "errors": errors.get(variant.name),
        }
        if variant in skipped:
            entry |= {"status": SKIPPED, "message": "left out by --quick"}
        if entry["status"] == OK:
            entry |= figures(work, dtype.itemsize, sample.median, naive=naive, product=product, ceilings=ceilings)
            entry |= {"spread": sample.spread, "rounds": sample.seconds}
            entry |= {"extra_bytes": sample.extra_bytes, "kept_bytes": sample.kept_bytes}
        report["variants"].append(entry)
    report |= {"copies_of_inputs": len(tasks), "bounds": judge.bounds, "sampled_rows": len(judge.index)}
    report["ceilings"] = None if ceilings is None else vars(ceilings)
    del tasks, calls, checks, judge, variants, run
    gc.collect()
    if not quick:
        torch.compiler.reset()  # each shape compiles its own code
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return report


def make_tasks(work: Work, device: torch.device, dtype: torch.dtype, *, kl: bool = False) -> list[Task]:
    """Copies of one input that calls use in turns; on a GPU so many that no call finds its own in the cache."""
    tasks = [baselines.make(work, device, dtype, kl=kl)]
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        copies = -(-CACHES * cache // work.least_bytes(dtype.itemsize))
        tasks += [tasks[0].clone() for _ in range(1, copies)]
    return tasks


def _turning(call: Callable[[Task], Any], tasks: list[Task]) -> Call:
    return lambda turn: call(tasks[turn % len(tasks)])


def _check(
    variant: Variant, judge: Truth, errors: dict[str, dict[str, float]], wrong: set[str]
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
        copy, square = _median(samples[COPY]), _median(samples[SQUARE])
        if copy is None or square is None:
            return None
        operations = 2 * self.side**3 / square
        if product is not None:
            operations = max(operations, work.operations / product)
        return Ceilings(2 * self.size / copy, operations)


def _median(sample: Sample) -> float | None:
    return None if sample.message else sample.median


LARGE = {"cuda": Large(8192, 1 << 30), "cpu": Large(2048, 256 << 20), "quick": Large(512, 64 << 20)}
