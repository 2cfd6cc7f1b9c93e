"""Measures whole runs on this machine's device: examples per second, shares of time, rate compared with the floor.

    python benchmarks/whole_run.py OUT.json                                     the demo model, XQuAD en-x
    python benchmarks/whole_run.py OUT.json --shape llama-3-8b                  a random model of that shape, bf16
    python benchmarks/whole_run.py OUT.json --batch-tokens 4096,16384 --seconds 60

Every budget of ``--batch-tokens`` runs the loop of ``xprobe run`` (forward with capture, lens, shards on the disk) over
as many contexts as fit its share of ``--seconds``. About two waves run twice before that to warm up; they do not count.
The loop is then compared, in turn, with ``usual``, the lens of most notebooks (all positions, layer by layer, one
example at a time), and ``careful`` (rows of the answer only, all layers in one product), as in engine_speed.py. Ratios
are medians over rounds.

On a GPU four more things are measured: the share of the wall time in which kernels and copies run, and the longest of
them (torch's profiler); the capture's share of the forward pass (events around it, in a separate run); what made the
host wait inside the loop (torch's warnings of synchronisation); and the rate of a large library product, the ceiling.
The floor is the time that the arithmetic of the blocks and of the lens takes at that ceiling, without attention. The
prompts of a random model come from the demo model's tokenizer (``--tokenizer`` names another model). Its tokens are
shorter than a large model's. The seconds for all of XQuAD are extrapolated and hold for these tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # set before torch is imported, as `xprobe run` does

import torch
from xprobe_kernels import lens
from xprobe_kernels.bench.environment import environment

from benchmarks.engine_speed import EXAMPLES, HandWrittenLens, by_group, timed
from xprobe.capture import rows as captured_rows
from xprobe.capture.engine import Engine
from xprobe.capture.plan import Plan, count_rows
from xprobe.capture.requests import Group, group_requests
from xprobe.config import Execution
from xprobe.errors import XprobeError
from xprobe.models import loading
from xprobe.models.anatomy import Anatomy, inspect
from xprobe.qa.parallel import load_data
from xprobe.qa.prompts import Prompt, build_prompts
from xprobe.qa.templates import load_template
from xprobe.runs.folder import RunFolder
from xprobe.runs.manifest import Manifest
from xprobe.stages.requests import study_request
from xprobe.stages.states import write_shards
from xprobe.timing import Stopwatch

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 256, "vocab_size": 49152, "max_position_embeddings": 8192,
    },
}  # fmt: skip


def random_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A Llama with random weights, created on its device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prepare(options: argparse.Namespace) -> tuple[Any, Anatomy, list[Prompt]]:
    """The model, its anatomy and all prompts of the data."""
    source = loading.resolve(options.tokenizer if options.shape else options.model)
    if options.shape:
        dtype = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
        model = random_model(options.shape, loading.pick_device(options.device), dtype)
        tokenizer, window = loading.load(source, Execution(device="cpu")).tokenizer, loading.window(model.config)
    else:
        loaded = loading.load(source, Execution(device=options.device), dtype=options.dtype)
        model, tokenizer, window = loaded.model, loaded.tokenizer, loaded.window
    examples = load_data(options.data).examples(("en-x",), None, options.questions)
    prompts, _ = build_prompts(examples, tokenizer, load_template("auto"), window)
    return model, inspect(model), prompts


class Bench:
    """One model on one device, and its prompts in groups."""

    def __init__(self, model: Any, anatomy: Anatomy, prompts: list[Prompt]) -> None:
        self.model, self.anatomy, self.prompts = model, anatomy, prompts
        self.groups = group_requests([study_request(prompt) for prompt in prompts])
        self.by_group = by_group(prompts)
        self.device = anatomy.head.weight.device
        self.parameters = sum(p.numel() for block in anatomy.blocks for p in block.parameters())

    def engine(self, batch_tokens: int) -> Engine:
        engine = Engine(self.model, self.anatomy, batch_tokens)
        engine.choose_strategy(self.groups[0].requests[:3])
        return engine

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def operations(self, plan: Plan) -> float:
        """Operations of the blocks' products for the tokens run and of the lens for its rows, without attention."""
        head, (positions, _) = self.anatomy.head, totals(plan)
        lens_rows = positions * self.anatomy.n_layers
        return 2.0 * self.parameters * plan.tokens_run + 2.0 * lens_rows * head.vocab_size * head.width

    def loop(self, engine: Engine, groups: list[Group]) -> tuple[float, dict[str, float], Plan]:
        """Seconds of the loop over groups and of its stages. Shards are written to a temporary folder."""
        plan, watch = engine.plan(groups), Stopwatch()
        with tempfile.TemporaryDirectory() as path:
            folder = RunFolder.create(Path(path) / "run")
            folder.write_manifest(Manifest())
            self.synchronize()
            started = time.perf_counter()
            write_shards(engine, plan, self.by_group, {g.key for g in groups}, folder, watch, lambda count: None)
            self.synchronize()
            return time.perf_counter() - started, watch.seconds, plan

    def rate(self, batch_tokens: int, seconds: float) -> dict[str, Any]:
        """Runs the loop over as many groups as fit ``seconds``, with one budget of tokens."""
        engine = self.engine(batch_tokens)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        two_waves = max(1, round(batch_tokens * 2 / max(engine.plan(self.groups[:1]).tokens_run, 1)))
        first = min(two_waves, max(1, len(self.groups) // 2))
        cold, _, _ = self.loop(engine, self.groups[:first])  # compiles kernels, allocates memory
        warm, _, _ = self.loop(engine, self.groups[:first])
        fits = int(first * seconds / max(warm, 1e-6))
        groups = self.groups[: max(1, min(len(self.groups), fits))]
        wall, stages, plan = self.loop(engine, groups)
        examples = sum(len(group.requests) for group in groups)
        whole = engine.plan(self.groups)
        found = {
            "batch_tokens": batch_tokens, "strategy": engine.strategy, "attention_kernel": engine.kernel,
            "warnings": engine.warn.messages, "first_waves_seconds": {"cold": cold, "warm": warm},
            "contexts": len(groups), "examples": examples, "waves": len(plan.waves), "tokens_run": plan.tokens_run,
            "tokens": plan.tokens, "seconds": wall, "stages": stages, "examples_per_second": examples / wall,
            "tokens_run_per_second": plan.tokens_run / wall, "operations_per_second": self.operations(plan) / wall,
            "all": {
                "contexts": len(self.groups), "examples": len(self.prompts), "waves": len(whole.waves),
                "tokens_run": whole.tokens_run,
                "operations": self.operations(whole), "seconds_extrapolated": wall * whole.tokens_run / plan.tokens_run,
            },
        }  # fmt: skip
        if self.device.type == "cuda":
            found["memory_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            found |= self.on_gpu(engine, groups[: max(1, first)])
        return found

    def on_gpu(self, engine: Engine, groups: list[Group]) -> dict[str, Any]:
        """Measurements that need a GPU: waits, the capture's share, kernels within the wall time."""
        with recorded_waits() as waits:
            self.loop(engine, groups)
        watch, receive = Stopwatch(), captured_rows.Receiver.__call__

        def timed_receive(self_: captured_rows.Receiver, layer: int, hidden: torch.Tensor) -> None:
            with watch.timed("capture", self.device):
                receive(self_, layer, hidden)

        captured_rows.Receiver.__call__ = timed_receive  # type: ignore[method-assign]
        try:
            _, stages, _ = self.loop(engine, groups)
        finally:
            captured_rows.Receiver.__call__ = receive  # type: ignore[method-assign]
        watch.collect()
        return {"waits": waits, "capture_share_of_forward": watch.seconds["capture"] / stages["forward"]} | profiled(
            lambda: self.loop(engine, groups)
        )

    def compare_with_hand_written(self, batch_tokens: int, rounds: int) -> dict[str, Any]:
        """Times the loop and the hand-written lenses in turn, and compares their values."""
        engine, hand_written = self.engine(batch_tokens), HandWrittenLens(self.model)
        methods = {"usual": hand_written.usual, "careful": hand_written.careful}
        plan = engine.plan(self.groups)
        waves = [list(wave.groups) for wave in plan.waves[: rounds + 1]]
        self.loop(engine, waves[0])
        for method in methods.values():
            method(self.by_group[waves[0][0].key][0])
        times: dict[str, list[float]] = {name: [] for name in (*methods, "xprobe")}
        largest_difference = 0.0
        for number in range(rounds):
            groups = waves[number % len(waves)]
            prompts = [prompt for group in groups for prompt in self.by_group[group.key]]
            wall, _, _ = self.loop(engine, groups)
            times["xprobe"].append(wall / len(prompts))
            for name, method in methods.items():
                chosen = prompts[number :: max(1, len(prompts) // EXAMPLES[name])][: EXAMPLES[name]]
                seconds, found = timed(lambda method=method, chosen=chosen: [method(prompt) for prompt in chosen])
                times[name].append(seconds / len(chosen))
                if name == "careful":
                    ours = self.log_probabilities(engine, chosen)
                    theirs = torch.cat(found, 1).float().cpu()
                    largest_difference = max(largest_difference, float((ours - theirs).abs().max()))
        ratios = {n: [a / b for a, b in zip(times[n], times["xprobe"], strict=True)] for n in methods}
        return {
            "batch_tokens": batch_tokens, "rounds": rounds,
            "ms_per_example": {name: 1e3 * statistics.median(each) for name, each in times.items()},
            "ratio": {name: statistics.median(each) for name, each in ratios.items()},
            "ratio_range": {name: [min(each), max(each)] for name, each in ratios.items()},
            "largest_difference_nats": largest_difference,
        }  # fmt: skip

    def log_probabilities(self, engine: Engine, prompts: list[Prompt]) -> torch.Tensor:
        """Log-probabilities [L + 1, P] of the gold tokens, by the engine."""
        rows = engine.capture_wave([study_request(prompt) for prompt in prompts])["answer"]
        layers, positions, width = rows.shape
        targets = torch.tensor([token for prompt in prompts for token in prompt.targets], device=rows.device)
        head = self.anatomy.head
        values = lens(rows.reshape(-1, width), head, targets.repeat(layers))
        return values.log_probability.view(layers, positions).cpu()


def totals(plan: Plan) -> tuple[int, int]:
    """Answer positions and examples of all waves."""
    rows = count_rows(request for wave in plan.waves for request in wave.requests)
    return rows["answer"], rows["question"]


@contextmanager
def recorded_waits() -> Iterator[list[str]]:
    """Collects the lines that made the host wait for the GPU, from torch's warnings."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            places = [
                f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in caught if "called a synchroniz" in str(w.message)
            ]
            found += [f"{place} x {places.count(place)}" for place in dict.fromkeys(places)]


def profiled(work: Callable[[], tuple[float, Any, Any]]) -> dict[str, Any]:
    """The share of the wall time in which kernels ran, and the kernels that took longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wall, _, _ = work()
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    longest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:15]
    return {
        "kernel_share_of_wall": busy / wall,
        "kernel_launches": sum(event.count for event in kernels),
        "longest_kernels": [
            {"name": e.key[:120], "share_of_kernels": e.self_device_time_total / 1e6 / busy, "launches": e.count}
            for e in longest
        ],
    }


def ceiling(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of a large library product on random numbers; None on a CPU."""
    if device.type != "cuda":
        return None
    size = 8192
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        torch.cuda.synchronize(device)
        seconds, _ = timed(lambda: one @ other)
        times.append(seconds)
    return 2.0 * size**3 / statistics.median(times[3:])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    model, anatomy, prompts = prepare(options)
    bench = Bench(model, anatomy, prompts)
    result: dict[str, Any] = {
        "schema": 1,
        "model": options.shape or options.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": options.data,
        "tokenizer": options.tokenizer if options.shape else options.model,
        "parameters_in_blocks": bench.parameters,
        "answer_positions": sum(len(prompt.targets) for prompt in prompts),
        "environment": environment(bench.device),
        "load_seconds": time.perf_counter() - started,
        "ceiling_operations_per_second": ceiling(bench.device, model.dtype),
        "rates": [],
    }
    if options.commit:
        result["environment"]["commit"] = options.commit
    budgets = [int(number) for number in options.batch_tokens.split(",")]

    def save() -> None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for budget in budgets:
        found = bench.rate(budget, options.seconds / len(budgets))
        if result["ceiling_operations_per_second"]:
            floor = found["all"]["operations"] / result["ceiling_operations_per_second"]
            found["all"]["floor_seconds"] = floor
            found["share_of_ceiling"] = found["operations_per_second"] / result["ceiling_operations_per_second"]
        result["rates"].append(found)
        save()
    if options.rounds:
        result["against"] = bench.compare_with_hand_written(budgets[-1], options.rounds)
        save()
    return result


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--model", default="smollm2-135m", help="as for xprobe run (default: smollm2-135m)")
    parser.add_argument("--shape", choices=SHAPES, help="use a random model of this shape instead of MODEL")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="model whose tokenizer the random model uses")
    parser.add_argument("--data", default="xquad", help="as for xprobe run (default: xquad)")
    parser.add_argument("--questions", type=int, help="number of questions, each in 12 languages (default: all)")
    parser.add_argument("--dtype", default="auto", help="as for xprobe run; auto is bfloat16 for a random model")
    parser.add_argument("--device", default="auto", help="as for xprobe run")
    parser.add_argument("--batch-tokens", default="4096,16384", help="budgets to measure (default: 4096,16384)")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds for the loop, for all budgets together")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the comparison; 0 leaves it out (default: 5)")
    parser.add_argument("--commit", help="commit that is measured, needed where git is missing")
    options = parser.parse_args(given)
    if not all(part.isdecimal() and int(part) > 0 for part in options.batch_tokens.split(",")):
        parser.error(f"--batch-tokens must be whole numbers above 0, separated by commas, got {options.batch_tokens!r}")
    if options.seconds <= 0 or options.rounds < 0 or (options.questions is not None and options.questions < 1):
        parser.error("--seconds and --questions must be above 0, and --rounds at least 0")
    try:
        options.out.write_text("{}\n", encoding="utf-8")
    except OSError as error:
        parser.error(f"cannot write {options.out}: {error.strerror}")
    try:
        result = measure(options)
    except XprobeError as error:
        print(f"whole_run.py: {error}", file=sys.stderr)
        return 1
    for found in result["rates"]:
        print(json.dumps({k: v for k, v in found.items() if k != "longest_kernels"}, indent=1))
    print(json.dumps(result.get("against"), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
