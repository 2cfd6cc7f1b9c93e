"""What each stage asks of a GPU, by counting: kernels that it launches, and calls that wait for the device.

    python benchmarks/launch_counts.py                        4 layers, 2 and 6 paragraphs with 4 questions each
    python benchmarks/launch_counts.py --layers 8 --json FILE

It needs no GPU. The stages run on the pretended GPU of the tests (``tests/support/pretended_gpu.py``) with a tiny
random Llama and prompts of random tokens. A stage that is bound by the host takes about 5 to 10 microseconds for each
launch.
Views and memory without content launch nothing and are not counted. Columns of the table:

launches    all of them, with Triton's kernels; in brackets those of attention over a tree
unit        launches for each layer of each step (answers) or pass (patching), of each wave (states), or of each example
            (relevance). A layer of the model's own decoding with a cache is the least that a step can take
waits       calls that make the host wait for the GPU
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import click
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if __package__ in (None, ""):  # run as a script
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]

from support.families import tiny_model
from support.pretended_gpu import OnGpu, PretendedGpu, pretended_gpu, to_gpu
from support.prompts import different_prompts, pending, requests

from xprobe.attribution.relevance import GradientRunner
from xprobe.capture.engine import Engine
from xprobe.capture.requests import group_requests
from xprobe.models.anatomy import inspect
from xprobe.phases.patch_settings import PatchSettings
from xprobe.qa.prompts import Prompt
from xprobe.stages.pairs import choose_pairs
from xprobe.stages.patching import patch

NO_LAUNCH = ("empty", "new_empty")


class Counts:
    """Counts what a pretended GPU is asked to do, by the name of the operation."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu, self.by_name = gpu, Counter[str]()
        run = gpu.run

        def counted(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            result = run(function, args, kwargs)
            name = str(function).removeprefix("aten.")
            self.by_name[name] += _launches(name, (args, kwargs), result, OnGpu)
            return result

        gpu.run = counted

    def measure(self, call: Callable[[], Any]) -> dict[str, Any]:
        """What ``call`` launches, and where it waits."""
        self.by_name.clear()
        self.gpu.waits.clear()
        before = self.gpu.launches
        call()
        kernels = self.gpu.launches - before
        named = [(name, times) for name, times in self.by_name.most_common() if times]
        return {
            "launches": sum(self.by_name.values()) + kernels, "kernels": kernels, "waits": len(self.gpu.waits),
            "where": Counter(self.gpu.waits).most_common(), "operations": named,
        }  # fmt: skip


class _CountOnHost(TorchDispatchMode):
    """Counts what operations in main memory would launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += _launches(str(function).removeprefix("aten."), (args, kwargs), result, torch.Tensor)
        return result


def _launches(name: str, given: Any, result: Any, kind: type[torch.Tensor]) -> bool:
    """Whether an operation starts work: it is no view, and has a tensor of ``kind``."""
    before, after = _places(given, kind), _places(result, kind)
    changes = name.partition(".")[0].endswith("_") or not after <= before
    return bool(before | after) and changes and not name.startswith(NO_LAUNCH)


def _places(value: Any, kind: type[torch.Tensor]) -> set[int]:
    """Where the memory of all tensors of ``kind`` begins."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, kind)]
    held = [tensor.inner if isinstance(tensor, OnGpu) else tensor for tensor in tensors]
    return {tensor.untyped_storage().data_ptr() for tensor in held}


def decoding_step(model: Any, prompts: int) -> int:
    """What a step of the model with its own cache launches: one token for each prompt."""
    import transformers

    kept = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model.base_model(torch.ones(prompts, 5, dtype=torch.int64), past_key_values=kept, use_cache=True)
        with _CountOnHost() as counts:
            model.base_model(torch.ones(prompts, 1, dtype=torch.int64), past_key_values=kept, use_cache=True)
    return counts.count


def stages(counts: Counts, model: Any, prompts: list[Prompt], tokens: int, batch_tokens: int) -> dict[str, Any]:
    """The counts of every stage."""
    anatomy = inspect(model)
    engine = Engine(model, anatomy, batch_tokens)
    engine.strategy = "tree"
    engine._edits_on_tree = True  # what the checks of a model cost is not counted
    layers = len(anatomy.blocks)
    plan = engine.plan(group_requests(requests(prompts)))
    keys = {group.key for wave in plan.waves for group in wave.groups}
    found = {}

    def states() -> None:
        for wave, rows in engine.run(plan, keys):
            pending(wave, rows, prompts, anatomy.head)

    states()  # fills caches
    found["states"] = counts.measure(states) | {"units": len(plan.waves)}
    texts = [prompt.ids[: prompt.length] for prompt in prompts]
    found["answers"] = counts.measure(lambda: engine.generate(texts, tokens, {1})) | {"units": tokens * layers}
    pairs = choose_pairs(prompts, PatchSettings(), 0)
    found["patching"] = counts.measure(lambda: patch(engine, pairs)) | {"units": (layers + 1) * layers // 2 + layers}
    runner = GradientRunner(model, anatomy, batch_tokens=batch_tokens)
    answers = [(prompt.ids[: prompt.length], prompt.targets) for prompt in prompts]
    found["relevance"] = counts.measure(lambda: runner.run(answers)) | {"units": len(answers)}
    for entry in found.values():
        entry["each"] = round(entry["launches"] / entry["units"], 1)
    return found


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--layers", default=4, show_default=True)
@click.option("--paragraphs", default="2,6", show_default=True, help="Numbers of paragraphs, comma-separated.")
@click.option("--questions", default=4, show_default=True, help="On each paragraph.")
@click.option("--tokens", default=8, show_default=True, help="Most tokens of an answer.")
@click.option("--batch-tokens", default=4096, show_default=True)
@click.option("--show", help="A stage: print its operations and where it waits.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="File to write.")
def main(
    layers: int, paragraphs: str, questions: int, tokens: int, batch_tokens: int, show: str | None, out: Path | None
) -> None:
    """Counts the launches of every stage."""
    results: dict[str, Any] = {}
    for count in map(int, paragraphs.split(",")):
        model = tiny_model("llama", num_hidden_layers=layers)
        prompts = different_prompts(count, questions)
        own = decoding_step(model, len(prompts)) / layers
        with pytest.MonkeyPatch.context() as patches, pretended_gpu(patches) as gpu:
            found = stages(Counts(gpu), to_gpu(model), prompts, tokens, batch_tokens)
        results[str(count)] = found | {"own decoding": round(own, 1)}
        click.echo(f"\n{count} paragraphs\n{'stage':<16} {'launches':>16} {'unit':>8} {'waits':>6}")
        click.echo(f"{'own decoding':<16} {'':>16} {own:>8.1f}")
        for name, entry in found.items():
            click.echo(
                f"{name:<16} {entry['launches']:>9} ({entry['kernels']:>4}) {entry['each']:>8} {entry['waits']:>6}"
            )
            if name == show:
                for what, times in (*entry["operations"], *entry["where"]):
                    click.echo(f"    {times:>6}  {what}")
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
