"""Every variant of the lens under pytest-benchmark: ``GOMP_SPINCOUNT=10000 pytest benchmarks --benchmark-only``.

Use it to follow one variant from commit to commit (``--benchmark-compare``). Quote only ratios of ``xprobe bench``,
which measures the same variants in turn.
"""

from __future__ import annotations

import functools

import pytest
import torch
from xprobe_kernels import available_backends
from xprobe_kernels.bench.accuracy import Truth, truth
from xprobe_kernels.bench.baselines import COMPILED, Task, Variant, make, variants
from xprobe_kernels.bench.shapes import CPU, FEW, HEADS, MANY, QUICK, Work, work

DEVICE = torch.device("cpu")
HEAD = HEADS["smollm2-135m"]
WORKS = {"small": work(HEAD, MANY, QUICK), "few rows": work(HEAD, FEW, CPU), "many rows": work(HEAD, MANY, CPU)}
BACKENDS = [name for name in available_backends(DEVICE) if name != "reference"]


def everything(work: Work) -> dict[str, Variant]:
    found = variants(work, torch.bfloat16, BACKENDS, 8 << 30, kl=False, device=DEVICE.type)
    return {variant.name: variant for variant in found}


@functools.cache
def task(name: str) -> Task:
    return make(WORKS[name], DEVICE, torch.bfloat16)


@functools.cache
def judge(name: str) -> Truth:
    return truth(task(name))


@pytest.mark.parametrize("variant", everything(WORKS["small"]))
@pytest.mark.parametrize("name", WORKS)
def test_lens_speed(benchmark, name, variant) -> None:
    benchmark.group = f"{name}: {WORKS[name]}"
    benchmark.name = variant
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    chosen = everything(WORKS[name])[variant]
    with torch.inference_mode():
        result = benchmark.pedantic(chosen.call, args=(task(name),), rounds=5, warmup_rounds=1)
        if chosen.read is not None:
            assert judge(name).judge(chosen.read(result))[1] is None  # a wrong result has no valid time
    if chosen.kind == COMPILED:
        torch.compiler.reset()
