"""The measuring process of tune.py: compiles candidates in parallel, then checks and times them on the GPU.

tune.py starts this script with its own options, and starts it again if a candidate hangs or kills it.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch
from tune import (
    OK,
    PRODUCT,
    Halving,
    SameCodeError,
    Trial,
    WrongAnswerError,
    arguments,
    choose_winner,
    configs_entry,
    earlier_trials,
    neighbours,
    regime_index,
    trials_for,
    write,
)
from xprobe_kernels import triton_lens, triton_readout, workspace
from xprobe_kernels.bench import baselines
from xprobe_kernels.bench.accuracy import truth
from xprobe_kernels.bench.environment import environment
from xprobe_kernels.bench.lens_speed import make_tasks
from xprobe_kernels.bench.measure import SHORT
from xprobe_kernels.bench.shapes import GPU, HEADS, Work, work
from xprobe_kernels.configs import choose
from xprobe_kernels.readout import Readout
from xprobe_kernels.request import LensRequest
from xprobe_kernels.triton_rows import Prepared
from xprobe_kernels.unembedding import Unembedding

CLOSE = 4e-5  # allowed relative difference of fp32 sums; a missing tile of 64 tokens causes ten times as much
COMPILERS = 12  # compiling processes at most; each has its own context on the GPU


class Watched:
    """Wraps a Triton kernel: compiles it without a launch, or records what was launched."""

    def __init__(self, kernel: Any, *, launch: bool) -> None:
        self.kernel, self.launch, self.built, self.grid = kernel, launch, None, None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            run = self.kernel[grid] if self.launch else lambda *a, **o: self.kernel.warmup(*a, grid=grid, **o)
            self.built, self.grid = run(*args, **options), grid
            return self.built

        return call


@contextmanager
def watching(*, launch: bool) -> Iterator[Watched]:
    kernel = triton_lens.lens_kernel
    triton_lens.lens_kernel = Watched(kernel, launch=launch)
    try:
        yield triton_lens.lens_kernel
    finally:
        triton_lens.lens_kernel = kernel


_INPUTS: dict[tuple[int, int, int, torch.dtype], tuple[LensRequest, Prepared]] = {}  # of the last shape


def compile_only(trial: Trial, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cuda") -> float:
    """Compiles the kernel for a shape into Triton's disk cache; returns seconds. Runs in a compiling process."""
    rows, width, vocabulary = shape
    if (*shape, dtype) not in _INPUTS:
        _INPUTS.clear()
        lookup = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        each = torch.empty(rows, 1, device=device)
        normed = torch.empty(rows, width, dtype=dtype, device=device)
        head = Unembedding(torch.empty(vocabulary, width, dtype=dtype, device=device))
        prepared = Prepared(normed, finite=each.to(torch.int8), logits=each, thresholds=each)
        _INPUTS[*shape, dtype] = (LensRequest(normed, head, lookup, baselines.TOP_K), prepared)
    start = perf_counter()
    with watching(launch=False):
        triton_lens.launch(*_INPUTS[*shape, dtype], trial.config, trial.splits)
    return perf_counter() - start


def code(built: Any) -> str:
    """A hash of the assembly without debugging information; "" if there is no assembly."""
    assembly = getattr(built, "asm", {})
    text = assembly.get("ptx") or assembly.get("amdgcn") or ""
    lines = (line for line in text.split(".section")[0].splitlines() if ".loc" not in line and "$L__tmp" not in line)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if text else ""


class CudaCard:
    """Inputs on the GPU, the expected results, and CUDA graphs of the calls to time."""

    def __init__(self, job: Work, dtype: torch.dtype, pool: ProcessPoolExecutor | None) -> None:
        self.job, self.dtype, self.pool = job, dtype, pool
        device = torch.device("cuda")
        self.tasks = make_tasks(job, device, dtype)
        self.out = torch.empty(job.rows, job.vocabulary, dtype=dtype, device=device)
        self.expected = self._run(workspace.readout)
        reading = baselines.read_lens(Readout(**self.expected, backend="workspace", precision="ieee"))
        self.fault = truth(self.tasks[0]).judge(reading)[1]  # what is wrong with the expected results, or None
        self.seen: dict[tuple[str, Any], str] = {}  # code and grid -> the first candidate that had them
        self.futures: dict[str, Future[float]] = {}
        self.graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}

    def start_compiling(self, trials: list[Trial]) -> None:
        """Starts compiling the trials ahead of time, in this order."""
        shape = (self.job.rows, self.job.head.width, self.job.vocabulary)
        for trial in trials if self.pool else []:
            if trial.name not in self.futures:
                try:
                    self.futures[trial.name] = self.pool.submit(compile_only, trial, shape, self.dtype)
                except (BrokenProcessPool, RuntimeError):
                    self.pool = None
                    return

    def check(self, trial: Trial) -> None:
        future = self.futures.pop(trial.name, None)
        if future is not None:
            try:
                trial.about["compile_seconds"] = future.result()
            except BrokenProcessPool:  # a candidate killed its compiler: compile in this process from now on
                self.pool, self.futures = None, {}
        with watching(launch=True) as watched, poisoned():
            found = self._run(triton_readout.readout, trial.config, trial.splits)
            torch.cuda.synchronize()
        built = watched.built
        trial.about |= {"registers": getattr(built, "n_regs", None), "spills": getattr(built, "n_spills", None)}
        trial.about["shared"] = getattr(getattr(built, "metadata", None), "shared", None)
        key = (code(built), watched.grid)
        first = self.seen.setdefault(key, trial.name) if key[0] else trial.name
        if first != trial.name:
            raise SameCodeError(f"as {first}")
        self._compare(found)

    def _compare(self, found: dict[str, Any]) -> None:
        """Compares all rows with those of the workspace backend."""
        for name in ("logits", "logsumexp", "entropy", "top_logits"):
            expected = self.expected[name]
            error = ((found[name] - expected).abs() / expected.abs().clamp(min=1)).nan_to_num(nan=float("inf")).max()
            if not float(error) <= CLOSE:
                raise WrongAnswerError(f"{name} has a relative error of {float(error):.2g}")
        ranks, expected = found["rank"], self.expected["rank"]
        if (
            bool(((ranks - expected).abs() > 2 + 0.0005 * expected).any())
            or float((ranks == expected).float().mean()) < 0.7
        ):
            raise WrongAnswerError(f"ranks: {float((ranks == expected).float().mean()):.1%} agree")
        same = (found["top_ids"] == self.expected["top_ids"]).float().mean()
        if float(same) < 0.99:  # different ids are allowed for logits that are equal within the bound above
            raise WrongAnswerError(f"top ids: {float(same):.1%} agree")

    def _run(self, readout: Any, *options: Any, copy: int = 0) -> dict[str, Any]:
        task = self.tasks[copy]
        return readout(LensRequest(task.hidden, task.head, task.lookup[:, None], baselines.TOP_K), *options)

    def time(self, trials: list[Trial]) -> dict[str, float]:
        wanted = {PRODUCT, *(trial.name for trial in trials)}
        self.graphs = {name: graph for name, graph in self.graphs.items() if name in wanted}
        products = [(task.normed, task.head.weight.T) for task in self.tasks]
        self._graph(PRODUCT, lambda copy: torch.mm(*products[copy], out=self.out))
        for trial in trials:
            self._graph(
                trial.name, lambda copy, t=trial: self._run(triton_readout.readout, t.config, t.splits, copy=copy)
            )
        return {name: self._seconds(name) for name in (PRODUCT, *(trial.name for trial in trials))}

    def _graph(self, name: str, call: Any) -> None:
        """Records one call for each copy of the inputs as a graph, so that no launch gaps are timed."""
        if name in self.graphs:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the library picks its workspace and algorithm before the capture
            call(0)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for copy in range(len(self.tasks)):
                call(copy)
        self.graphs[name] = (graph, 1)
        once = self._seconds(name)
        self.graphs[name] = (graph, max(1, round(SHORT / max(once * len(self.tasks), 1e-7))))

    def _seconds(self, name: str) -> float:
        graph, repeats = self.graphs[name]
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeats / len(self.tasks)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills new tensors with NaN, or the largest integer, so that results that were not written are detected."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def measure(options: argparse.Namespace) -> int:
    """Measures all shapes, one after the other. Results of an earlier process are kept."""
    end = monotonic() + options.seconds
    dtype = getattr(torch, options.dtype)
    device = torch.device("cuda")
    architecture, slots = triton_lens.device_limits(device)
    before, finished = earlier_trials(options.out), {}
    if options.out.exists():
        old = json.loads(options.out.read_text(encoding="utf-8"))["shapes"]
        finished = {shape["regime"]: shape for shape in old if shape["done"]}
    report: dict[str, Any] = {"schema": 1, "environment": environment(device), "architecture": architecture}
    report |= {"dtype": options.dtype, "top_k": baselines.TOP_K, "shapes": [], "paste": None}
    pool = _pool()
    winners: dict[int, Trial] = {}
    regimes = options.rows.split(",")
    with torch.inference_mode():
        for number, regime in enumerate(regimes):
            if regime in finished:
                report["shapes"].append(finished[regime])
                done = [trial for trial in before[regime] if trial.name == finished[regime]["chosen"]]
                winners |= {regime_index(regime): trial for trial in done}
                continue
            job = work(HEADS[options.shape], regime, GPU, torch.cuda.mem_get_info()[0], dtype.itemsize)
            left = end - monotonic()
            share = 1.0 if number == len(regimes) - 1 else 0.6
            best = _regime(job, dtype, architecture, slots, before.get(regime), pool, left * share, report, options.out)
            if best is not None:
                winners[regime_index(regime)] = best
            found = report["environment"]
            report["paste"] = configs_entry(architecture, dtype.itemsize, winners, found["device"], found["date"])
            write(options.out, report)
            gc.collect()
            torch.cuda.empty_cache()
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)
    os._exit(0 if len(winners) == len(regimes) else 1)  # does not wait for compilers that are still running


def _regime(
    job: Work,
    dtype: torch.dtype,
    architecture: str,
    slots: int,
    before: list[Trial] | None,
    pool: ProcessPoolExecutor | None,
    seconds: float,
    report: dict[str, Any],
    out: Path,
) -> Trial | None:
    trials = before or trials_for(architecture, dtype.itemsize, choose(architecture, dtype, job.rows), job.rows)
    shape: dict[str, Any] = {"name": job.name, "regime": job.regime, "text": str(job), "chosen": None, "done": False}
    shape |= {"rows": job.rows, "width": job.head.width, "vocabulary": job.vocabulary, "operations": job.operations}
    shape |= {"least_bytes": job.least_bytes(dtype.itemsize), "trials": []}
    report["shapes"].append(shape)
    started = monotonic()
    card = CudaCard(job, dtype, pool)
    shape["fault"] = card.fault
    card.start_compiling(trials)

    def save() -> None:
        records = []
        for trial in trials:
            record = trial.record()
            if trial.seconds:
                record["operations_per_second"] = job.operations / trial.seconds
                record["bytes_per_second"] = shape["least_bytes"] / trial.seconds
            records.append(record)
        shape["trials"] = records
        if halving.product:
            shape["product_seconds"] = statistics.median(halving.product)
        write(out, report)

    def neighbours_of(trial: Trial) -> list[Trial]:
        found = neighbours(trial, architecture, dtype.itemsize, job.rows, job.vocabulary, slots)
        card.start_compiling(found)
        return found

    halving = Halving(
        card, trials, seconds=max(seconds - (monotonic() - started), 1.0), neighbours_of=neighbours_of, save=save
    )
    best = halving.run()
    winner = choose_winner(trials, best)
    shape |= {"chosen": winner.name if winner.status == OK else None, "done": True}
    for future in card.futures.values():
        future.cancel()
    save()
    return winner if winner.status == OK else None


def _pool() -> ProcessPoolExecutor | None:
    count = min(COMPILERS, (os.cpu_count() or 1) - 2)
    if count < 2:
        return None
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _silence)


def _silence() -> None:
    """Discards stderr of a compiling process: a compiler that fails prints whole programs there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    sys.exit(measure(arguments()))
