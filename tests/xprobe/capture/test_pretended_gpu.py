"""On a pretended GPU, the engine and the lens give the same values as on a CPU and do not wait for the device."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from support.families import save_tiny_model, tiny_model
from support.pretended_gpu import GPU, RUBBISH, pretended_gpu, to_gpu
from support.prompts import (
    by_group,
    chosen,
    different_prompts,
    family_of_prompts,
    forced,
    of_wave,
    pending,
    requests,
    targets,
)
from xprobe_kernels import lens
from xprobe_kernels.transfer import HostCopy, upload

from xprobe.capture.engine import Engine
from xprobe.capture.generation import generate_on_tree
from xprobe.capture.layerwise import LayerwiseEngine
from xprobe.capture.requests import group_requests
from xprobe.lenses.reading import FIELDS, start_reading
from xprobe.models.anatomy import inspect
from xprobe.models.streaming.streamed import open_streamed
from xprobe.phases.patch_settings import PatchSettings
from xprobe.runs.folder import RunFolder
from xprobe.runs.manifest import Manifest
from xprobe.stages import states
from xprobe.stages.pairs import choose_pairs
from xprobe.stages.patching import kinds_of, patch
from xprobe.stages.shards import write_wave
from xprobe.stages.states import write_shards
from xprobe.timing import Stopwatch

if torch.cuda.is_available():
    pytest.skip("this machine has a GPU: test_on_gpu.py tests it", allow_module_level=True)

PROMPTS = family_of_prompts(4)
SAMPLE = [PROMPTS[0], PROMPTS[2], PROMPTS[3], PROMPTS[-1]]


def test_the_pretended_gpu_counts_calls_that_wait(monkeypatch) -> None:
    with pretended_gpu(monkeypatch) as gpu:
        there = upload(torch.arange(6.0), GPU)
        assert there.device.type == "cuda"
        assert not gpu.waits
        for number, wait in enumerate((
            lambda: there.cpu(), lambda: float(there[2]), lambda: there[there > 2], lambda: there.nonzero(),
            lambda: torch.ones(3).to("cuda:0"), lambda: bool((there > 1).any()), lambda: there.unique(),
             lambda: there[torch.tensor([1, 2])],
        )):  # fmt: skip
            wait()
            assert len(gpu.waits) > number, number
            del gpu.waits[number + 1 :]
        gpu.waits.clear()
        host_copy = HostCopy({"x": there * 2})
        assert (host_copy._tensors["x"] == RUBBISH).all()
        assert not gpu.waits
        assert host_copy.wait()["x"].tolist() == [0, 2, 4, 6, 8, 10]
        assert len(gpu.waits) == 1


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gpt2", "olmo2"))]
)
def test_a_wave_is_computed_without_waiting_and_equals_that_of_the_cpu(family, monkeypatch) -> None:
    """Whole waves, one after the other in the same memory, as a run computes them."""
    model = tiny_model(family)
    anatomy = inspect(model)
    engine = Engine(model, anatomy, 120)
    assert chosen(engine, SAMPLE) == "tree"
    plan = engine.plan(group_requests(requests(PROMPTS)))
    keys = {group.key for wave in plan.waves for group in wave.groups}
    wanted = []
    for wave, captured in engine.run(plan, keys):
        values = start_reading(captured["answer"], targets(of_wave(wave, PROMPTS)), anatomy.head).values()
        wanted.append((captured["answer"].clone(), captured["question"].clone(), captured.first("answer"), values))
    assert len(wanted) > 2
    with pretended_gpu(monkeypatch) as gpu:
        model = to_gpu(model)
        anatomy = inspect(model)
        said: list[str] = []
        engine = Engine(model, anatomy, 120, said.append)
        assert chosen(engine, SAMPLE) == "tree"
        assert engine.kernel
        assert not said
        before, gpu.waits = gpu.launches, []
        waiting = [pending(wave, rows, PROMPTS, anatomy.head) for wave, rows in engine.run(plan, keys)]
        assert gpu.waits == []
        assert gpu.launches - before >= len(wanted) * (3 * len(anatomy.blocks) + 5)  # capture twice and attention
        for one, (answers, questions, ends, values) in zip(waiting, wanted, strict=True):
            found, rows = one.wait()
            for name in FIELDS:
                ours, theirs = getattr(found, name), getattr(values, name)
                assert abs(ours.astype(float) - theirs).max() <= 2e-5 * abs(theirs.astype(float)).max() + 2e-6, name
            assert torch.allclose(rows["question_mean"], questions, atol=2e-5 * float(questions.abs().max()))
            assert torch.allclose(rows["prompt_end"], ends, atol=2e-5 * float(answers.abs().max()))


def test_a_step_of_generation_does_not_wait_and_the_number_of_prompts_changes_no_launches(monkeypatch) -> None:
    """The host looks at the tokens after every fourth step."""
    launches = []
    for count in (1, 3):
        prompts = [prompt.ids[: prompt.length] for prompt in different_prompts(count)]
        model = tiny_model("llama")
        wanted = generate_on_tree(model, inspect(model), prompts, [8] * len(prompts), {1})
        with pretended_gpu(monkeypatch) as gpu:
            anatomy = inspect(to_gpu(model))
            gpu.waits, before = [], (gpu.launches, gpu.operations)
            found = generate_on_tree(model, anatomy, prompts, [8] * len(prompts), {1}, kernel=True)
            assert [one.ids for one in found] == [one.ids for one in wanted]
            assert len(gpu.waits) == 2, gpu.waits
            launches.append((gpu.launches - before[0], gpu.operations - before[1]))
    assert launches[0] == launches[1]


def test_patches_do_not_wait_and_equal_those_of_the_cpu(monkeypatch) -> None:
    """But for the choice of pairs, the question whether an edit at layer 0 changes anything, and the results."""
    prompts = different_prompts(3)
    pairs = choose_pairs(prompts, PatchSettings(), 0)[:5]
    assert "random" in kinds_of(pairs[0])
    model, lines = tiny_model("llama"), []
    for on_gpu in (False, True):
        with pretended_gpu(monkeypatch) if on_gpu else nullcontext() as gpu:
            engine = Engine(to_gpu(model) if on_gpu else model, inspect(model), 4096)
            engine.strategy = "tree"
            engine._edits_on_tree = True  # a check of the model, which waits
            if on_gpu:
                gpu.waits.clear()
            lines.append(patch(engine, pairs))
            if on_gpu:
                assert [wait.rpartition(" at ")[2].partition(":")[0] for wait in gpu.waits] == [
                    "generation.py", "edited_tree.py", "generation.py",
                ]  # fmt: skip
    for ours, theirs in zip(*lines, strict=True):
        for kind, found in ours["kinds"].items():
            values, others = found["values"], theirs["kinds"][kind]["values"]
            assert (values is None) == (others is None)
            if values is not None:
                torch.testing.assert_close(torch.tensor(values), torch.tensor(others), rtol=0, atol=2e-5)
    assert any(found["values"] for line in lines[0] for found in line["kinds"].values())


def test_shards_of_a_gpu_equal_those_of_the_cpu(monkeypatch, tmp_path) -> None:
    """A wave leaves its memory before the next overwrites it."""
    model = tiny_model("llama")
    folders = {}
    for place in ("cpu", "gpu"):
        folders[place] = RunFolder.create(tmp_path / place)
        with pretended_gpu(monkeypatch) if place == "gpu" else nullcontext():
            model = to_gpu(model) if place == "gpu" else model
            anatomy = inspect(model)
            engine = Engine(model, anatomy, 120)
            plan = engine.plan(group_requests(requests(PROMPTS)))
            keys = {group.key for wave in plan.waves for group in wave.groups}
            folders[place].write_manifest(Manifest())
            found = [(wave, pending(wave, rows, PROMPTS, anatomy.head)) for wave, rows in engine.run(plan, keys)]
            written: list[int] = []
            for wave, one in found:
                parts = (wave, of_wave(wave, PROMPTS), keys, one.offsets, *one.wait(), Stopwatch())
                write_wave(folders[place], *parts, kept=written.append)
            assert sum(written) == len(PROMPTS)
    for name in folders["cpu"].finished_shards():
        (ours, described), (theirs, also) = (folders[place].read_shard(name) for place in ("gpu", "cpu"))
        assert json.dumps(described) == json.dumps(also)
        for key, values in theirs.items():
            assert abs(ours[key].astype(float) - values).max() <= 2e-5 * abs(values.astype(float)).max() + 2e-6, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "workspace", "cpu", "cpu-eager", "reference"])
def test_every_backend_runs_on_a_gpu(backend, dtype, monkeypatch) -> None:
    """16-bit operands go to a product of the library that only a GPU has."""
    head = replace(inspect(tiny_model("gemma2", dtype=dtype)).head, bias=torch.randn(160).to(dtype))
    rows, lookup, final = torch.randn(12, head.width).to(dtype), torch.arange(12), torch.tensor([10, 11] * 6)
    wanted = lens(rows, head, lookup, top_k=3, final_rows=final, backend="reference")
    parts = {name: getattr(head, name) for name in ("weight", "gamma", "beta", "bias")}
    with pretended_gpu(monkeypatch):
        there = replace(head, **{name: None if part is None else upload(part, GPU) for name, part in parts.items()})
        found = lens(
            upload(rows, GPU), there, upload(lookup, GPU), top_k=3, final_rows=final, backend=backend, check=False
        )
        assert found.backend == backend
        slack = 1e-5 if dtype == torch.float32 else 1e-3  # rows are rounded after the norm
        for name in ("logits", "logsumexp", "entropy", "kl", "top_logits"):
            assert float((getattr(found, name).inner - getattr(wanted, name)).abs().max()) < slack, name
        assert torch.equal(found.rank.inner, wanted.rank)
        assert torch.equal(found.top_ids.inner, wanted.top_ids)


def test_a_streamed_model_on_a_gpu_gives_the_values_of_the_cpu(monkeypatch, tmp_path) -> None:
    """Its rows wait in a file, its head is on the GPU."""
    save_tiny_model(tmp_path / "model")
    found = {}
    for device in ("cpu", "cuda:0"):
        with pretended_gpu(monkeypatch) if device != "cpu" else nullcontext():
            engine = LayerwiseEngine(open_streamed(tmp_path / "model", "float32", device), 120, tmp_path)
            assert engine.kernel == (device != "cpu")
            engine.check_parity(forced(PROMPTS[:4]))
            chosen(engine, SAMPLE)
            plan = engine.plan(group_requests(requests(PROMPTS)))
            keys = {group.key for wave in plan.waves for group in wave.groups}
            head = engine.anatomy.head
            found[device] = [pending(wave, rows, PROMPTS, head).wait() for wave, rows in engine.run(plan, keys)]
            assert engine.warn.messages == []
            assert engine.parity_error < 1e-4
    for (ours, rows), (theirs, also) in zip(*found.values(), strict=True):
        for name in FIELDS:
            assert abs(getattr(ours, name).astype(float) - getattr(theirs, name)).max() < 1e-5, name
        for name in ("prompt_end", "question_mean"):
            assert torch.allclose(rows[name], also[name], atol=1e-5)


def test_the_loop_of_a_run_does_not_wait_and_a_thread_writes_the_shards(monkeypatch, tmp_path) -> None:
    """A wave is written while the next is computed: here each write waits until that has begun."""
    model, begun, done = tiny_model("llama"), [threading.Event() for _ in range(99)], []
    real = states.write_wave

    def write(*args):
        begun[len(done) + 1].wait(5)
        done.append(begun[len(done) + 1].is_set())
        return real(*args)

    monkeypatch.setattr(states, "write_wave", write)
    with pretended_gpu(monkeypatch) as gpu:
        anatomy = inspect(to_gpu(model))
        engine = Engine(model, anatomy, 120)
        plan = engine.plan(group_requests(requests(PROMPTS)))
        keys = {group.key for wave in plan.waves for group in wave.groups}
        folder, watch, told = RunFolder.create(tmp_path / "run"), Stopwatch(), []
        folder.write_manifest(Manifest())
        number, take = iter(range(99)), engine.capture_wave

        def capture(prompts):
            begun[next(number)].set()
            return take(prompts)

        monkeypatch.setattr(engine, "capture_wave", capture)
        monkeypatch.setattr(watch, "collect", lambda: None)  # after the loop it may wait
        gpu.waits.clear()
        begun[len(plan.waves)].set()  # the last wave has no next one
        write_shards(engine, plan, by_group(PROMPTS), keys, folder, watch, told.append)
        assert gpu.waits == []
    assert sum(told) == len(PROMPTS)
    assert len(told) > 1  # not all of it in the end
    assert len(done) == len(plan.waves)
    assert all(done)
    assert len(folder.finished_shards()) == len(keys)


@pytest.mark.parametrize("broken", [1, 2])
def test_a_loop_that_fails_has_written_and_reported_what_it_computed(broken, monkeypatch, tmp_path) -> None:
    """Whether computing fails or writing: the folder and what was told agree."""
    model = tiny_model("llama")
    with pretended_gpu(monkeypatch):
        anatomy = inspect(to_gpu(model))
        engine = Engine(model, anatomy, 120)
        plan = engine.plan(group_requests(requests(PROMPTS)))
        keys = {group.key for wave in plan.waves for group in wave.groups}
        folder, told, calls = RunFolder.create(tmp_path / "run"), [], []
        folder.write_manifest(Manifest())
        owner, name = (engine, "capture_wave") if broken == 1 else (folder, "write_shards")
        real = getattr(owner, name)

        def failing(*args, **options):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("planted")
            return real(*args, **options)

        object.__setattr__(owner, name, failing)
        with pytest.raises(RuntimeError, match="planted"):
            write_shards(engine, plan, by_group(PROMPTS), keys, folder, Stopwatch(), told.append)
    kept = [folder.read_shard(shard)[1]["examples"] for shard in folder.finished_shards()]
    assert sum(told) == sum(map(len, kept)) > 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("xprobe-write")]


def test_final_rows_in_main_memory_need_no_wait(monkeypatch) -> None:
    anatomy = inspect(tiny_model("llama"))
    rows, final = torch.randn(6, anatomy.head.width), torch.tensor([4, 5, 4, 5, 4, 5])
    lookup = torch.arange(6)
    wanted = lens(rows, anatomy.head, lookup, final_rows=final)
    with pretended_gpu(monkeypatch) as gpu:
        anatomy = inspect(to_gpu(tiny_model("llama")))
        there = [upload(t, GPU) for t in (rows, lookup, final)]
        gpu.waits.clear()
        found = lens(there[0], anatomy.head, there[1], final_rows=final, check=False)
        assert not gpu.waits
        lens(there[0], anatomy.head, there[1], final_rows=there[2], check=False)
        assert gpu.waits
        assert float((found.kl.inner - wanted.kl).abs().max()) < 2e-6


def test_stages_on_a_gpu_are_timed_by_it(monkeypatch) -> None:
    watch = Stopwatch()
    with pretended_gpu(monkeypatch):
        for _ in range(3):
            with watch.timed("forward", GPU):
                pass
        assert watch.seconds == {}
        watch.collect()
    assert watch.seconds == {"forward": pytest.approx(3e-3)}  # a pretended event takes a millisecond
    with watch.timed("write"), watch.timed("lens", torch.device("cpu")):
        pass
    watch.collect()
    assert set(watch.seconds) == {"forward", "lens", "write"}
