"""How many times faster than the naive fp32 lens, and what share of a bare matrix product's throughput.

    python benchmarks/lens_ratio.py --shape small --rounds 5 --json ratio.json

All variants run by turns in one process, so that what slows the machine slows each of them; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xprobe_kernels import Unembedding, lens

TOP_K = 5


@dataclass(frozen=True)
class Shape:
    """R = layers * positions rows of width D against V vocabulary entries."""

    layers: int
    positions: int
    width: int
    vocabulary: int

    @property
    def rows(self) -> int:
        return self.layers * self.positions

    def __str__(self) -> str:
        return f"R = {self.layers} x {self.positions}, D = {self.width}, V = {self.vocabulary}"


SHAPES = {"small": Shape(13, 8, 576, 16384), "smollm2": Shape(31, 64, 576, 49152)}


@dataclass(frozen=True, eq=False)
class Task:
    hidden: Tensor  # [R, D] fp32
    head: Unembedding
    lookup: Tensor  # [R]
    normed: Tensor  # [R, D], for the bare product


def make(shape: Shape) -> Task:
    """The one setup of every variant."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.rows, shape.width, generator=random)
    weight = torch.randn(shape.vocabulary, shape.width, generator=random) * 0.1
    head = Unembedding(weight, gamma=1 + 0.1 * torch.randn(shape.width, generator=random))
    lookup = torch.randint(0, shape.vocabulary, (shape.rows,), generator=random)
    return Task(hidden, head, lookup, head.normalize(hidden))


def naive(task: Task) -> tuple[Tensor, ...]:
    """All logits at once, then one pass per statistic: log-probability, rank, entropy."""
    logits = task.head.normalize(task.hidden) @ task.head.weight.T
    log_p = logits.log_softmax(-1)
    wanted = log_p.gather(1, task.lookup[:, None])
    rank = 1 + (log_p > wanted).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return wanted, rank, entropy


def naive_top(task: Task) -> tuple[Tensor, ...]:
    """The naive lens and the five largest logits."""
    logits = task.head.normalize(task.hidden) @ task.head.weight.T
    log_p = logits.log_softmax(-1)
    wanted = log_p.gather(1, task.lookup[:, None])
    rank = 1 + (log_p > wanted).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    top = logits.topk(TOP_K, -1)
    return wanted, rank, entropy, top.values, top.indices


def product(task: Task) -> Tensor:
    """The matrix product alone: what no exact lens can undercut."""
    return task.normed @ task.head.weight.T


def lens_cpu(task: Task) -> Any:
    return lens(task.hidden, task.head, task.lookup, backend="cpu")


def lens_cpu_top(task: Task) -> Any:
    return lens(task.hidden, task.head, task.lookup, top_k=TOP_K, backend="cpu")


VARIANTS: dict[str, Callable[[Task], Any]] = {
    "naive fp32": naive,
    "naive fp32, top 5": naive_top,
    "bare fp32 product": product,
    "lens cpu": lens_cpu,
    "lens cpu, top 5": lens_cpu_top,
}


def processor() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def compare(shape: Shape, rounds: int) -> dict[str, Any]:
    """Seconds of every variant in every round, the variants by turns and in the opposite order every other round."""
    task = make(shape)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_ in range(rounds + 1):
        order = list(VARIANTS.items())
        for name, variant in reversed(order) if round_ % 2 else order:
            start = time.perf_counter()
            variant(task)
            elapsed = time.perf_counter() - start
            if round_:  # the first round warms up
                seconds[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "shape": asdict(shape),
        "rounds": rounds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": processor(),
        "times_naive": {name: median["naive fp32"] / value for name, value in median.items()},
        "share_of_product": {name: median["bare fp32 product"] / value for name, value in median.items()},
        "median_seconds": median,
        "seconds": seconds,
    }


def report(result: dict[str, Any]) -> str:
    lines = [
        f"{Shape(**result['shape'])}; torch {result['torch']}, {result['threads']} threads, {result['cpu']}",
        f"{'x naive':>8} {'of product':>11} {'median ms':>10}  variant ({result['rounds']} rounds)",
    ]
    for name, ratio in result["times_naive"].items():
        share, milliseconds = result["share_of_product"][name], 1e3 * result["median_seconds"][name]
        lines.append(f"{ratio:8.2f} {share:11.2f} {milliseconds:10.1f}  {name}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 (default: 5)")
    parser.add_argument("--threads", type=int, help="threads for torch (default: its own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error(f"--rounds must be at least 5, got {arguments.rounds}")
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = []
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            if arguments.shape in (name, "all"):
                results.append(compare(shape, arguments.rounds))
                print(report(results[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
