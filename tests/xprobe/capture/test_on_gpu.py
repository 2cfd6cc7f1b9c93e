"""The engine and whole runs on a real GPU: right in every dtype, the same bits each time, no waiting in the loop."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, tiny_model
from support.prompts import chosen, family_of_prompts, pending, requests, targets

import xprobe
from xprobe.capture.engine import Engine
from xprobe.capture.requests import group_requests
from xprobe.lenses.reading import FIELDS, start_reading
from xprobe.models.anatomy import inspect

pytestmark = pytest.mark.gpu

PROMPTS = family_of_prompts(4)
SAMPLE = [PROMPTS[0], PROMPTS[2], PROMPTS[3], PROMPTS[-1]]


PACKED = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt2", "olmo2", "gpt_oss", "cohere2", "deepseek_v3"]

EXPERTS = {"gpt_oss", "deepseek_v3"}


def on_gpu(family: str, dtype: torch.dtype, budget: int = 10_000) -> Engine:
    model = tiny_model(family, dtype=dtype).to("cuda")
    return Engine(model, inspect(model), budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", [name for name in PACKED if name in FAMILIES])
def test_packed_rows_are_as_accurate_as_single_runs(family, dtype) -> None:
    """The truth is the model in fp64 on the CPU; by the median over rows, as a router of experts may fall otherwise."""
    exact = tiny_model(family, dtype=torch.float64)
    truth = Engine(exact, inspect(exact), 1)
    truth.strategy = "plain"
    wanted = truth.capture(requests(PROMPTS))["answer"]
    engine = on_gpu(family, dtype)
    if dtype == torch.float32 or family not in EXPERTS:  # a router that falls otherwise is no rounding
        assert chosen(engine, SAMPLE) == "tree"
        assert engine.kernel, engine.warn.messages
    errors = []
    for way in ("tree", "plain"):
        engine.strategy = way
        found = engine.capture(requests(PROMPTS))["answer"].double().cpu()
        errors.append(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).flatten(1).median(-1).values)
    slack = 1e-5 if dtype == torch.float32 else 2e-3
    assert (errors[0] <= 1.5 * errors[1] + slack).all(), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_and_the_kernel_agree(dtype) -> None:
    engine = on_gpu("llama", dtype)
    found = {}
    for engine.kernel in (True, False):
        found[engine.kernel] = engine.capture(requests(PROMPTS))["answer"].clone().float()
    size = found[False].abs().amax()
    assert float((found[True] - found[False]).abs().max() / size) < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_waves_give_the_same_bits(dtype) -> None:
    engine = on_gpu("llama", dtype, 120)
    plan = engine.plan(group_requests(requests(PROMPTS)))
    keys = {group.key for wave in plan.waves for group in wave.groups}
    first, second = (
        [pending(wave, rows, PROMPTS, engine.anatomy.head).wait() for wave, rows in engine.run(plan, keys)]
        for _ in range(2)
    )
    for (values, rows), (again, also) in zip(first, second, strict=True):
        assert all((getattr(values, name) == getattr(again, name)).all() for name in FIELDS)
        assert all(torch.equal(rows[name], also[name]) for name in rows)


def test_the_loop_does_not_wait_for_the_gpu() -> None:
    engine = on_gpu("llama", torch.bfloat16, 120)
    chosen(engine, SAMPLE)
    plan = engine.plan(group_requests(requests(PROMPTS)))
    assert len(plan.waves) > 2
    keys = {group.key for wave in plan.waves for group in wave.groups}
    for _ in engine.run(plan, keys):
        break  # compiles what there is to compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaving = [pending(wave, rows, PROMPTS, engine.anatomy.head) for wave, rows in engine.run(plan, keys)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(each.wait()[0].finite for each in leaving)


def test_lens_values_on_a_gpu_equal_those_of_the_cpu() -> None:
    values = {}
    for device in ("cpu", "cuda"):
        model = tiny_model("gemma2").to(device)
        anatomy = inspect(model)
        rows = Engine(model, anatomy, 120).capture(requests(PROMPTS))["answer"]
        values[device] = start_reading(rows, targets(PROMPTS), anatomy.head).values()
    for name in FIELDS:
        ours, theirs = (getattr(values[device], name).astype(float) for device in ("cuda", "cpu"))
        slack = 1 if name == "rank" else 1e-4 * abs(theirs).max() + 1e-5  # neighbours closer than rounding may swap
        assert abs(ours - theirs).max() <= slack, name


@pytest.mark.parametrize("stream", [False, True])
def test_a_study_on_a_gpu_equals_one_on_the_cpu_and_can_be_resumed(tiny, tmp_path, stream) -> None:
    some = {"languages": ("en", "de"), "limit": 4, "dtype": "float32", "stream": stream}
    studies = {
        device: xprobe.run(str(tiny), out=tmp_path / device, device=device, **some) for device in ("cuda", "cpu")
    }
    ours, theirs = (studies[device].stability for device in ("cuda", "cpu"))
    assert abs(ours["log_probability"] - theirs["log_probability"]).max() < 1e-3
    before = {path.name: path.read_bytes() for path in (tmp_path / "cuda" / "shards").iterdir()}
    sorted((tmp_path / "cuda" / "shards").iterdir())[0].unlink()
    xprobe.run(str(tiny), out=tmp_path / "cuda", device="cuda", resume=True, **some)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cuda" / "shards").iterdir()} == before
    assert {"forward", "lens", "write"} <= set(studies["cuda"].manifest.seconds)
