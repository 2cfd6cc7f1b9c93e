"""From prompts to lens values with xprobe, compared with hand-written lenses: interleaved runs in one process.

    python benchmarks/engine_speed.py                      en-x, fp32
    python benchmarks/engine_speed.py --setting x-x
    python benchmarks/engine_speed.py --dtype bfloat16 --json FILE

``usual``    all positions, layer by layer, one example at a time: what most notebooks do
``careful``  one forward pass per example, rows of the answer positions only, all layers in one product
``xprobe``   the capture engine and the lens, group by group, as ``xprobe run`` uses them

Every round times a whole group of prompts with xprobe and a few of the same prompts with the others, in milliseconds
per example. The ratios are medians over rounds. The values of all three are compared.

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


class Lens:
    """The hand-written lenses: log-probabilities [L + 1, n] of an example's answer tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        base = model.base_model
        self.norm, self.head, self.blocks = base.norm, model.lm_head, base.layers

    def usual(self, prompt: Prompt) -> torch.Tensor:
        ids = torch.tensor([prompt.ids], device=self.model.device)
        with torch.inference_mode():
            states = self.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            found = []
            for layer, state in enumerate(states):
                normed = state if layer == len(states) - 1 else self.norm(state)  # the last one is normed already
                log_p = self.head(normed)[0].float().log_softmax(-1)
                found.append(log_p[:-1].gather(1, ids[0, 1:, None])[prompt.length - 1 :, 0])
        return torch.stack(found)

    def careful(self, prompt: Prompt) -> torch.Tensor:
        rows: list[torch.Tensor] = []
        answer = slice(prompt.length - 1, len(prompt.ids) - 1)

        def keep(hidden: torch.Tensor) -> None:
            rows.append(hidden[0, answer].clone())

        hooks = [self.blocks[0].register_forward_pre_hook(lambda module, args: keep(args[0]))]
        hooks += [block.register_forward_hook(lambda module, args, out: keep(first(out))) for block in self.blocks]
        try:
            with torch.inference_mode():
                self.model.base_model(input_ids=torch.tensor([prompt.ids], device=self.model.device), use_cache=False)
                log_p = self.head(self.norm(torch.cat(rows))).float().log_softmax(-1)
                gold = torch.tensor(prompt.targets, device=log_p.device).repeat(len(rows))
                return log_p.gather(1, gold[:, None])[:, 0].view(len(rows), -1)
        finally:
            for hook in hooks:
                hook.remove()


def first(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def with_xprobe(engine: Engine, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Log-probabilities [L + 1, P] of prompts. Rank, entropy and divergence are computed with them."""
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
    first = set(list(dict.fromkeys(example.question_id for example in examples))[:questions])  # whole paragraphs first
    examples = [example for example in examples if example.question_id in first]
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
    by_hand = Lens(model)
    methods = {"usual": by_hand.usual, "careful": by_hand.careful}
    draw = random.Random(0)
    with_xprobe(engine, waves[0])
    for method in methods.values():
        method(prompts[0])
    times: dict[str, list[float]] = {name: [] for name in (*methods, "xprobe")}
    farthest = 0.0
    for turn in range(arguments.rounds):
        wave = waves[turn % len(waves)]
        seconds, ours = timed(lambda wave=wave: with_xprobe(engine, wave))
        times["xprobe"].append(seconds / len(wave))
        offsets = [0]
        for prompt in wave:
            offsets.append(offsets[-1] + len(prompt.targets))
        for name, method in methods.items():
            some = draw.sample(range(len(wave)), min(EXAMPLES[name], len(wave)))
            seconds, theirs = timed(lambda method=method, some=some, wave=wave: [method(wave[i]) for i in some])
            times[name].append(seconds / len(some))
            for i, values in zip(some, theirs, strict=True):
                farthest = max(farthest, float((values.cpu() - ours[:, offsets[i] : offsets[i + 1]]).abs().max()))
    ratios = {n: [a / b for a, b in zip(times[n], times["xprobe"], strict=True)] for n in methods}
    return {
        "ms_per_example": {name: round(1e3 * statistics.median(values), 1) for name, values in times.items()},
        "ratio": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "ratio_range": {name: [round(min(values), 2), round(max(values), 2)] for name, values in ratios.items()},
        "largest_difference_nats": farthest,
        "strategy": engine.strategy,
        "tokens_per_example": round(plan.tokens / len(prompts), 1),
        "tokens_run_per_example": round(plan.tokens_run / len(prompts), 1),
        "examples": len(prompts),
        "rounds": arguments.rounds,
    }


def peak(name: str, arguments: argparse.Namespace) -> None:
    """Runs one method and prints its peak resident memory in MB."""
    model, anatomy, prompts = load(arguments.dtype, arguments.setting, arguments.questions)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    if name == "xprobe":
        engine = Engine(model, anatomy, Execution().tokens_on("cpu"))
        plan = engine.plan(group_requests([study_request(prompt) for prompt in prompts]))
        for wave in waves_of(plan, prompts)[:3]:
            with_xprobe(engine, wave)
    else:
        for prompt in sorted(prompts, key=lambda p: len(p.ids))[-5:]:
            getattr(Lens(model), name)(prompt)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def memory(names: Sequence[str]) -> dict[str, float]:
    found = {}
    for name in names:
        command = [sys.executable, *sys.argv, "--peak-of", name]
        found[name] = round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=("en-x", "x-x"), default="en-x")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--questions", type=int, default=40, help="of XQuAD, in 12 languages each")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--torch-products", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path)
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
        result["peak_rss_mb"] = memory(["careful", "xprobe"])
    result["environment"] = environment()
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
