"""From prompts to lens values with xprobe, compared with hand-written lenses: interleaved runs in one process.

    python benchmarks/engine_speed.py                      en-x, fp32
    python benchmarks/engine_speed.py --setting x-x
    python benchmarks/engine_speed.py --dtype bfloat16 --json FILE

``usual``    all positions, layer by layer, one example at a time: what most notebooks do
``careful``  one forward pass per example, rows of the answer positions only, all layers in one product
``xprobe``   the capture engine and the lens, group by group, as ``xprobe run`` uses them

Every round times a whole group of prompts with xprobe and a few of the same prompts with the others, in milliseconds
per example. The ratios are medians over rounds. The values of all three methods are compared.

``--torch-products`` makes xprobe use torch's own matrix products where it would choose oneDNN's
(``xprobe_kernels.precision``), so that only the effect of sharing remains. ``--memory`` runs each method in its own
process and reports its peak resident memory, with the model but without the peak of loading it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from xprobe_kernels import precision

from xprobe.capture import products
from xprobe.capture.engine import Engine
from xprobe.capture.plan import Plan
from xprobe.capture.requests import group_requests
from xprobe.config import Execution
from xprobe.lenses.reading import read_answers
from xprobe.models import loading
from xprobe.models.anatomy import Anatomy, inspect
from xprobe.qa.parallel import load_data
from xprobe.qa.prompts import Prompt, build_prompts
from xprobe.qa.templates import load_template
from xprobe.runs.provenance import environment
from xprobe.stages.requests import study_request

EXAMPLES = {"usual": 1, "careful": 5}  # examples per round; these methods are slow


class HandWrittenLens:
    """The hand-written lenses. Both return the log-probabilities [L + 1, n] of an example's answer tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        base = model.base_model
        self.norm, self.head, self.blocks = base.norm, model.lm_head, base.layers

    def usual(self, prompt: Prompt) -> torch.Tensor:
        ids = torch.tensor([prompt.ids], device=self.model.device)
        with torch.inference_mode():
            states = self.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            by_layer = []
            for layer, state in enumerate(states):
                normed = state if layer == len(states) - 1 else self.norm(state)  # transformers norms the last one
                log_p = self.head(normed)[0].float().log_softmax(-1)
                by_layer.append(log_p[:-1].gather(1, ids[0, 1:, None])[prompt.length - 1 :, 0])
        return torch.stack(by_layer)

    def careful(self, prompt: Prompt) -> torch.Tensor:
        rows: list[torch.Tensor] = []
        answer = slice(prompt.length - 1, len(prompt.ids) - 1)

        def keep_answer_rows(hidden: torch.Tensor) -> None:
            rows.append(hidden[0, answer].clone())

        hooks = [self.blocks[0].register_forward_pre_hook(lambda module, args: keep_answer_rows(args[0]))]
        hooks += [
            block.register_forward_hook(lambda module, args, out: keep_answer_rows(hidden_of(out)))
            for block in self.blocks
        ]
        try:
            with torch.inference_mode():
                self.model.base_model(input_ids=torch.tensor([prompt.ids], device=self.model.device), use_cache=False)
                log_p = self.head(self.norm(torch.cat(rows))).float().log_softmax(-1)
                gold = torch.tensor(prompt.targets, device=log_p.device).repeat(len(rows))
                return log_p.gather(1, gold[:, None])[:, 0].view(len(rows), -1)
        finally:
            for hook in hooks:
                hook.remove()


def hidden_of(out: Any) -> torch.Tensor:
    """The hidden state in a block's output, which may be a tuple that starts with it."""
    return out if isinstance(out, torch.Tensor) else out[0]


def with_xprobe(engine: Engine, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Log-probabilities [L + 1, P] of prompts. The same call also computes ranks, entropies and divergences."""
    rows = engine.capture_wave([study_request(prompt) for prompt in prompts])["answer"]
    targets = torch.tensor([token for prompt in prompts for token in prompt.targets])
    values = read_answers(rows, targets, engine.anatomy.head)
    return torch.from_numpy(values.logit - values.logsumexp).T


def by_group(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Prompts by the key of their group, in order."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.example.group, []).append(prompt)
    return groups


def waves_of(plan: Plan, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """The prompts of every wave of a plan."""
    groups = by_group(prompts)
    return [[prompt for group in wave.groups for prompt in groups[group.key]] for wave in plan.waves]


def load(dtype: str, setting: str, questions: int) -> tuple[Any, Anatomy, list[Prompt]]:
    loaded = loading.load(loading.resolve("smollm2-135m"), dtype=dtype)
    examples = load_data("xquad").examples((setting,), None, None)
    # questions of one paragraph follow each other, so the first questions are those of whole paragraphs
    chosen = set(list(dict.fromkeys(example.question_id for example in examples))[:questions])
    examples = [example for example in examples if example.question_id in chosen]
    prompts, _ = build_prompts(examples, loaded.tokenizer, load_template("auto"), loaded.window)
    return loaded.model, inspect(loaded.model), prompts


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    model, anatomy, prompts = load(arguments.dtype, arguments.setting, arguments.questions)
    engine = Engine(model, anatomy, Execution().tokens_on("cpu"))
    engine.choose_strategy([study_request(prompt) for prompt in prompts[:3]])
    plan = engine.plan(group_requests([study_request(prompt) for prompt in prompts]))
    waves = waves_of(plan, prompts)
    hand_written = HandWrittenLens(model)
    methods = {"usual": hand_written.usual, "careful": hand_written.careful}
    random_source = random.Random(0)
    with_xprobe(engine, waves[0])
    for method in methods.values():
        method(prompts[0])
    times: dict[str, list[float]] = {name: [] for name in (*methods, "xprobe")}
    largest_difference = 0.0
    for number in range(arguments.rounds):
        wave = waves[number % len(waves)]
        seconds, ours = timed(lambda wave=wave: with_xprobe(engine, wave))
        times["xprobe"].append(seconds / len(wave))
        offsets = [0]
        for prompt in wave:
            offsets.append(offsets[-1] + len(prompt.targets))
        for name, method in methods.items():
            indices = random_source.sample(range(len(wave)), min(EXAMPLES[name], len(wave)))
            seconds, theirs = timed(
                lambda method=method, indices=indices, wave=wave: [method(wave[i]) for i in indices]
            )
            times[name].append(seconds / len(indices))
            for i, values in zip(indices, theirs, strict=True):
                difference = (values.cpu() - ours[:, offsets[i] : offsets[i + 1]]).abs().max()
                largest_difference = max(largest_difference, float(difference))
    ratios = {n: [a / b for a, b in zip(times[n], times["xprobe"], strict=True)] for n in methods}
    return {
        "ms_per_example": {name: round(1e3 * statistics.median(values), 1) for name, values in times.items()},
        "ratio": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "ratio_range": {name: [round(min(values), 2), round(max(values), 2)] for name, values in ratios.items()},
        "largest_difference_nats": largest_difference,
        "strategy": engine.strategy,
        "tokens_per_example": round(plan.tokens / len(prompts), 1),
        "tokens_run_per_example": round(plan.tokens_run / len(prompts), 1),
        "examples": len(prompts),
        "rounds": arguments.rounds,
    }


def peak(name: str, arguments: argparse.Namespace) -> None:
    """Runs one method and prints its peak resident memory in MB."""
    model, anatomy, prompts = load(arguments.dtype, arguments.setting, arguments.questions)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if name == "xprobe":
        engine = Engine(model, anatomy, Execution().tokens_on("cpu"))
        plan = engine.plan(group_requests([study_request(prompt) for prompt in prompts]))
        for wave in waves_of(plan, prompts)[:3]:
            with_xprobe(engine, wave)
    else:
        for prompt in sorted(prompts, key=lambda p: len(p.ids))[-5:]:
            getattr(HandWrittenLens(model), name)(prompt)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def peak_memory(names: Sequence[str]) -> dict[str, float]:
    """Peak resident memory of each method in MB, each measured in its own process."""
    peaks = {}
    for name in names:
        command = [sys.executable, *sys.argv, "--peak-of", name]
        peaks[name] = round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=("en-x", "x-x"), default="en-x")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--questions", type=int, default=40, help="number of XQuAD questions, each in 12 languages")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--torch-products", action="store_true", help="use torch's own matrix products, not oneDNN's")
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory of each method")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_products:
        precision.onednn_is_faster = products.onednn_is_faster = lambda: False
    if arguments.peak_of:
        peak(arguments.peak_of, arguments)
        return
    result = {"command": " ".join(["python", *sys.argv]), "setting": arguments.setting, "dtype": arguments.dtype}
    result["products"] = "oneDNN" if precision.onednn_is_faster() else "torch"
    result |= compare(arguments)
    if arguments.memory:
        result["peak_rss_mb"] = peak_memory(["careful", "xprobe"])
    result["environment"] = environment()
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
