"""Time and energy of the lens on an NVIDIA GPU in steady state, beside the bare product of the same shape.

    python benchmarks/lens_energy.py OUT.json [--shape llama-3-8b] [--seconds 30] [--parts 1,2,4]

A large product draws as much power as the card may take, so the card lowers its clock, and what a kernel costs is its
energy. Single calls with pauses between them do not show this. Here each variant runs without a pause for some tenths
of a second, in turn with the others, forwards and then backwards. The energy is that of the card's own counter (NVML,
package nvidia-ml-py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from xprobe_kernels.bench import baselines, shapes
from xprobe_kernels.bench.environment import environment
from xprobe_kernels.configs import Config
from xprobe_kernels.request import LensRequest
from xprobe_kernels.triton_lens import configuration
from xprobe_kernels.triton_readout import readout

Call = Callable[[], object]
PRODUCT = "bare product"


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(sorted(shapes.HEADS)), default="llama-3-8b", show_default=True)
@click.option("--seconds", default=30.0, show_default=True, help="For all variants together.")
@click.option("--parts", default="", help="Also read tiles in this many parts, comma-separated.")
@click.option("--commit", help="Commit that is measured, where git is missing.")
def main(out: Path, shape: str, seconds: float, parts: str, commit: str | None) -> None:
    """Measures the variants and writes OUT."""
    if not torch.cuda.is_available():
        raise click.ClickException("this needs an NVIDIA GPU, and torch sees none")
    device = torch.device("cuda")
    with torch.inference_mode():
        calls = variants(shape, device, [int(part) for part in parts.split(",") if part])
        for call in calls.values():
            call()
        share = seconds / (2 * len(calls))
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for order in (list(calls), list(calls)[::-1]):
            for name in order:
                found[name].append(steady(calls[name], share))
    product = [mean(values) for values in zip(*found[PRODUCT], strict=True)]
    result: dict[str, Any] = {"shape": shape, "environment": environment(device), "variants": {}}
    result["environment"]["commit"] = commit or result["environment"]["commit"]
    for name, turns in found.items():
        own, joules = (mean(values) for values in zip(*turns, strict=True))
        figures = {"seconds": own, "joules": joules, "of_product": product[0] / own, "energy": joules / product[1]}
        result["variants"][name] = figures | {"turns": turns}
        click.echo(f"{name:<16}{own * 1e3:8.2f} ms {product[0] / own:6.3f} {joules:8.2f} J {joules / product[1]:6.3f}")
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def variants(shape: str, device: torch.device, parts: list[int]) -> dict[str, Call]:
    """The bare product and calls of the lens on the same rows, by name."""
    task = baselines.make(shapes.work(shapes.HEADS[shape], "many", shapes.GPU), device, torch.bfloat16, kl=True)

    def call(config: Config | None = None, **asked: Any) -> Call:
        request = LensRequest(task.hidden, task.head, task.lookup.reshape(-1, 1), **asked)
        return lambda: readout(request, config)

    usual = configuration(LensRequest(task.hidden, task.head, task.lookup.reshape(-1, 1)))
    calls: dict[str, Call] = {
        PRODUCT: lambda: torch.mm(task.normed, task.head.weight.T),
        "lens": call(), "lens, top 5": call(top_k=5), "lens, KL": call(final_rows=task.final_rows),
    }  # fmt: skip
    return calls | {f"lens, {each} parts": call(replace(usual, parts=each)) for each in parts}


def steady(call: Call, seconds: float) -> tuple[float, float]:
    """Seconds and joules of one call, from calls without a pause."""
    import pynvml

    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    torch.cuda.synchronize()
    before, start, calls = pynvml.nvmlDeviceGetTotalEnergyConsumption(card), time.monotonic(), 0
    while time.monotonic() - start < seconds:
        call()
        calls += 1
        if calls % 3 == 0:  # so that the host does not run far ahead
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    spent = time.monotonic() - start
    return spent / calls, (pynvml.nvmlDeviceGetTotalEnergyConsumption(card) - before) / 1e3 / calls


if __name__ == "__main__":
    main()
