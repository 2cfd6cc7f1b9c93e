"""In every family, shared passes give the rows of single runs. If memory runs out, no row is lost or computed twice."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES, tiny_model
from support.prompts import chosen, family_of_prompts, prompt, readout, requests

from xprobe.capture import tree_attention
from xprobe.capture.engine import Engine
from xprobe.capture.requests import group_requests
from xprobe.capture.rows import Rows
from xprobe.models.anatomy import inspect, watch_states

PROMPTS = family_of_prompts()
# families whose attention cannot be replaced; the others are run as a tree
PREFIX = {"gptj", "gpt_neo", "falcon", "bloom", "mpt"}
PLAIN = {"lfm2"}  # its convolutions carry a state from token to token
SAMPLE = [PROMPTS[0], PROMPTS[2], PROMPTS[3], PROMPTS[-1]]


def strategy_of(family: str) -> str:
    return "prefix" if family in PREFIX else "plain" if family in PLAIN else "tree"


def one_by_one(model, anatomy, prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Answer rows [L + 1, P, D] and question means [L + 1, N, D] from a run of the whole model per prompt."""
    answers, questions = [], []
    for item in prompts:
        states: list[torch.Tensor] = []
        with (
            torch.inference_mode(),
            watch_states(anatomy.blocks, lambda layer, hidden, to=states: to.append(hidden[0])),
        ):
            model(input_ids=torch.tensor([item.ids[:-1]]), use_cache=False)
        stacked = torch.stack(states)
        answers.append(stacked[:, list(item.answer_positions)])
        questions.append(stacked[:, slice(*item.spans["question"])].mean(1))
    return torch.cat(answers, 1), torch.stack(questions, 1)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def double(family):
    model = tiny_model(family, dtype=torch.float64)
    anatomy = inspect(model)
    return model, anatomy, *one_by_one(model, anatomy, PROMPTS)


@pytest.mark.parametrize("budget", [1000, 1])
def test_each_family_gets_the_fastest_strategy_that_it_allows(family, double, budget):
    """The budget does not matter: the prompts of the check run together even if it is small."""
    model, anatomy, *_ = double
    warnings: list[str] = []
    assert chosen(Engine(model, anatomy, budget, warnings.append), SAMPLE) == strategy_of(family)
    assert len(warnings) == {"tree": 0, "prefix": 1, "plain": 2}[strategy_of(family)]


@pytest.mark.parametrize("budget", [10_000, 70, 1])
def test_rows_equal_those_of_one_example_at_a_time(family, double, budget):
    model, anatomy, answers, questions = double
    engine = Engine(model, anatomy, budget)
    for strategy in dict.fromkeys([strategy_of(family), "plain"]):
        engine.strategy = strategy
        captured = engine.capture(requests(PROMPTS))
        assert captured["answer"].shape == answers.shape
        assert captured["question"].shape == questions.shape
        assert relative_error(captured["answer"], answers) < 1e-5  # many models compute norms in fp32 even so
        assert relative_error(captured["question"], questions) < 1e-5
        assert captured.offsets["answer"].diff().tolist() == [len(item.targets) for item in PROMPTS]
        assert captured.offsets["question"].tolist() == list(range(len(PROMPTS) + 1))


def test_rows_in_fp32_and_bf16_are_as_accurate_as_single_runs(family):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, None)):
        model = tiny_model(family, dtype=dtype)
        anatomy = inspect(model)
        engine = Engine(model, anatomy, 10_000)
        engine.strategy = strategy_of(family)
        found = engine.capture(requests(PROMPTS))["answer"]
        wanted, _ = one_by_one(model, anatomy, PROMPTS)
        if tolerance is None:
            exact = tiny_model(family, dtype=torch.float64)
            truth, _ = one_by_one(exact, inspect(exact), PROMPTS)
            # no farther from the exact model than a run of its own in the same dtype; by the median over rows, since
            # a router of experts that falls the other way changes a row altogether
            errors = [(rows.double() - truth).norm(dim=-1) / truth.norm(dim=-1) for rows in (found, wanted)]
            ours, theirs = (error.flatten(1).median(-1).values for error in errors)
            assert (ours <= 1.5 * theirs + 2e-3).all()
        else:
            assert relative_error(found, wanted) < tolerance


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU test_on_gpu.py does this, with the compiled kernel")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss", "cohere2", "deepseek_v3", "phi3"])
def test_the_attention_kernel_gives_the_rows_of_one_example_at_a_time(name, monkeypatch):
    """In Triton's interpreter: windows, soft-caps, sinks, values narrower than keys, shared heads."""
    calls = []
    real = tree_attention.tree_attention
    monkeypatch.setattr(
        tree_attention, "tree_attention", lambda *args, **options: calls.append(1) or real(*args, **options)
    )
    model = tiny_model(name)
    anatomy = inspect(model)
    answers, questions = one_by_one(model, anatomy, PROMPTS)
    engine = Engine(model, anatomy, 10_000)
    assert not engine.kernel  # a GPU's
    engine.kernel = True
    assert chosen(engine, SAMPLE) == "tree"
    assert engine.kernel
    calls.clear()
    captured = engine.capture(requests(PROMPTS))
    assert len(calls) == len(anatomy.blocks)
    assert relative_error(captured["answer"], answers) < 1e-5
    assert relative_error(captured["question"], questions) < 1e-5


def test_the_library_replaces_an_attention_kernel_that_fails_or_is_wrong(monkeypatch):
    model = tiny_model("llama")
    anatomy = inspect(model)
    answers, _ = one_by_one(model, anatomy, PROMPTS)
    real = tree_attention.tree_attention

    def failing(*args, **options):
        raise RuntimeError("no kernel image is available")

    for broken, message in (
        (failing, "no kernel image"),
        (lambda *a, **o: real(*a, **o) * 1.01, "its log-probabilities"),
    ):
        monkeypatch.setattr(tree_attention, "tree_attention", broken)
        engine = Engine(model, anatomy, 10_000)
        engine.kernel = True
        assert chosen(engine, SAMPLE) == "tree"
        assert not engine.kernel
        assert len(engine.warn.messages) == 1
        assert "the attention kernel" in engine.warn.messages[0]
        assert message in engine.warn.messages[0]
        assert relative_error(engine.capture(requests(PROMPTS))["answer"], answers) < 1e-5


def test_prompts_are_longer_than_the_sliding_windows_of_the_families():
    """Windows of 8 tokens and prompts of 50: the tests above cover keys inside and outside of a window."""
    assert max(len(item.ids) for item in PROMPTS) > 5 * 8
    assert {"mistral", "gemma2", "gemma3", "gpt_oss", "exaone4", "cohere2"} <= set(FAMILIES)
    for family in ("mistral", "gemma2", "gpt_oss"):
        assert FAMILIES[family][1]["sliding_window"] == 8


def test_nothing_is_left_on_the_model(family, double):
    model, anatomy, *_ = double
    before = model.config._attn_implementation
    Engine(model, anatomy, 1000).choose_strategy(requests(SAMPLE))
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- one small model from here on ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    model = tiny_model("llama")
    return model, inspect(model)


def test_means_of_a_bf16_model_are_computed_in_fp32():
    model = tiny_model("llama", dtype=torch.bfloat16)
    anatomy = inspect(model)
    item = prompt(30, 2, 0)
    item.spans["question"] = (2, 25)
    states: list[torch.Tensor] = []
    with torch.inference_mode(), watch_states(anatomy.blocks, lambda layer, hidden: states.append(hidden[0].clone())):
        model.base_model(input_ids=torch.tensor([item.ids[:-1]]), use_cache=False)
    engine = Engine(model, anatomy, 1000)
    engine.strategy = "plain"
    found = engine.capture(requests([item]))["question"][:, 0]
    assert torch.equal(found, torch.stack(states)[:, 2:25].float().mean(1).to(torch.bfloat16))


def test_a_model_that_allows_no_sharing_is_run_plainly_with_a_warning(small):
    model, anatomy = small
    warnings: list[str] = []

    class Counting(torch.nn.Module):
        """Its states depend on the number of tokens in the pass, so packed and cached runs give other states."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            out = self.inner(*args, **kwargs)
            return out * (1 + args[0].shape[1] / 100 if args else 1)

    mlp = model.model.layers[0].mlp
    model.model.layers[0].mlp = Counting(mlp)
    try:
        engine = Engine(model, anatomy, 1000, warnings.append)
        assert chosen(engine, SAMPLE) == "plain"
        assert "tree" in warnings[0]
        assert "log-probabilities" in warnings[0]
        assert "one prompt at a time: its rows depend on the batch" in warnings[-1]
        assert engine.batch_tokens == 1
    finally:
        model.model.layers[0].mlp = mlp


class SmallDevice:
    """A device with memory for a pass of ``limit`` tokens: larger passes raise ``error``. Counts finished passes."""

    def __init__(self, model, limit: int, error: Exception):
        self.limit, self.error, self.sizes, self.failed = limit, error, [], 0
        self.hook = model.base_model.layers[1].register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, module, args, kwargs):
        tokens = (args[0] if args else kwargs["hidden_states"]).shape[:2].numel()
        if tokens > self.limit:
            self.failed += 1
            raise self.error
        self.sizes.append(tokens)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["device", "cpu", "python"])
@pytest.mark.parametrize("strategy", ["tree", "prefix", "plain"])
def test_the_engine_halves_the_batch_if_memory_runs_out_and_gives_the_same_rows(small, strategy, error):
    model, anatomy = small
    wanted, questions = one_by_one(model, anatomy, PROMPTS)
    warnings: list[str] = []
    engine = Engine(model, anatomy, 10_000, warnings.append)
    engine.strategy = strategy
    device = SmallDevice(model, 90, error)
    try:
        captured = engine.capture(requests(PROMPTS))
        assert torch.allclose(captured["answer"], wanted, rtol=0, atol=1e-4)
        assert torch.allclose(captured["question"], questions, rtol=0, atol=1e-4)
        assert device.failed
        assert len(warnings) == device.failed
        assert f"at most {engine.batch_tokens} tokens" in warnings[-1]
        failures = device.failed
        again = engine.capture(requests(PROMPTS))["answer"]
        assert torch.allclose(again, captured["answer"], rtol=0, atol=1e-5)  # other batches: a rounding at most
        assert device.failed == failures  # the engine keeps the size that fits
    finally:
        device.hook.remove()


def test_too_little_memory_for_one_prompt_is_an_error(small):
    model, anatomy = small
    engine = Engine(model, anatomy, 10_000)
    device = SmallDevice(model, 5, ERRORS[0])
    try:
        with pytest.raises(torch.OutOfMemoryError):
            engine.capture(requests(PROMPTS))
    finally:
        device.hook.remove()


def test_other_errors_are_not_treated_as_out_of_memory(small):
    model, anatomy = small
    engine = Engine(model, anatomy, 10_000)
    device = SmallDevice(model, 5, RuntimeError("shapes do not match"))
    try:
        with pytest.raises(RuntimeError, match="shapes do not match"):
            engine.capture(requests(PROMPTS))
        assert device.failed == 1
    finally:
        device.hook.remove()


def test_the_row_buffer_is_allocated_once(small):
    model, anatomy = small
    engine = Engine(model, anatomy, 10_000)
    engine._space.reserve({"answer": sum(len(item.targets) for item in PROMPTS), "question": len(PROMPTS)})
    place = engine.capture_wave(requests(PROMPTS))["answer"].data_ptr()
    for some in (PROMPTS[:3], PROMPTS[2:], PROMPTS):
        assert engine.capture_wave(requests(some))["answer"].data_ptr() == place


def test_part_gives_the_rows_of_some_requests(small):
    model, anatomy = small
    whole = Engine(model, anatomy, 10_000).capture(requests(PROMPTS))
    part: Rows = whole.part(2, 5)
    first, last = whole.offsets["answer"][[2, 5]].tolist()
    assert torch.equal(part["answer"], whole["answer"][:, first:last])
    assert part.offsets["answer"].tolist() == (whole.offsets["answer"][2:6] - first).tolist()
    assert torch.equal(part["question"], whole["question"][:, 2:5])
    assert torch.equal(part.first("answer"), whole.first("answer")[:, 2:5])


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_prompt_beyond_the_rotary_limit_does_not_change_other_prompts(kind):
    """With LongRoPE and dynamic NTK, the longest prompt of a pass decides the angles of all prompts in it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    factors = {"short_factor": [1.0] * 4, "long_factor": [6.0] * 4} if kind == "longrope" else {"factor": 6.0}
    rope = {"rope_type": kind, "rope_theta": 1e4, **factors}
    options = {**FAMILIES["phi3" if kind == "longrope" else "llama"][1], "rope_parameters": rope}
    if kind == "longrope":
        options |= {"original_max_position_embeddings": 32, "max_position_embeddings": 192}
    else:
        options |= {"max_position_embeddings": 32}
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi3" if kind == "longrope" else "llama", **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    lengths = sorted(len(item.ids) - 1 for item in PROMPTS)
    assert lengths[0] < 32 < lengths[-1]
    anatomy = inspect(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    # a short prompt runs before each one, and resets the angles
    alone = [one_by_one(model, anatomy, [prompt(5, 1, 0), item])[0][:, 1:] for item in PROMPTS]
    wanted = torch.cat(alone, 1)
    engine = Engine(model, anatomy, 10_000)
    engine.limits = replace(engine.limits, window=None)  # dynamic NTK runs beyond the configuration's window
    assert engine.max_shared_tokens == 32
    plan = engine.plan(group_requests(requests(PROMPTS)))
    assert [part for part in plan.parts(plan.waves[0]) if len(part) > 1]
    assert relative_error(engine.capture(requests(PROMPTS))["answer"], wanted) < 1e-4
    engine.max_shared_tokens = None
    assert relative_error(engine.capture(requests(PROMPTS))["answer"], wanted) > 1e-3  # the limit makes them equal


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm of Linux")
@pytest.mark.parametrize("strategy", ["tree", "prefix", "plain"])
def test_memory_stays_flat_over_a_long_run(small, strategy):
    """Three hundred waves, with the lens after each one, do not use more memory than a few."""
    model, anatomy = small
    engine = Engine(model, anatomy, 400)
    engine.strategy = strategy
    resident = []
    for turn in range(300):
        # libraries keep code for each shape; padded batches would bring new shapes in each turn, so these repeat
        prompts = family_of_prompts(2, 6, seed=turn if strategy == "tree" else turn % 5)
        assert readout(engine.capture(requests(prompts)), prompts, anatomy.head).finite
        if turn % 20 == 19:
            gc.collect()
            resident.append(resident_bytes())
    assert max(resident[5:]) - resident[4] < 3_000_000
