"""The real demo model: converted once, read right at every layer, run over real questions."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.prompts import chosen, readout, requests
from support.runs import parity
from xprobe_cli.main import main

import xprobe
from xprobe.capture.engine import Engine
from xprobe.capture.requests import group_requests
from xprobe.config import DEFAULT_MODEL
from xprobe.errors import ModelError
from xprobe.models import gguf, loading
from xprobe.models.anatomy import inspect
from xprobe.qa.parallel import load_data
from xprobe.qa.prompts import build_prompts
from xprobe.qa.templates import load_template
from xprobe.runs.folder import RunFolder
from xprobe.stages.shards import read_signals

XQUAD = os.environ.get("XPROBE_XQUAD_DIR")
needs_xquad = pytest.mark.skipif(not XQUAD, reason="XPROBE_XQUAD_DIR is not set: no XQuAD here")


@pytest.fixture(scope="module")
def source():
    try:
        return loading.resolve(DEFAULT_MODEL)
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def loaded(source):
    return loading.load(source)


def test_lens_equals_transformers_own_modules_at_every_layer(loaded):
    """Batched, hooked and tiled against one example at a time through the model's own norm and head, in fp32."""
    examples = load_data("builtin", ["en", "th", "zh"]).examples(["en-x"], limit=1)
    prompts, _ = build_prompts(examples, loaded.tokenizer, load_template("auto"), loaded.window)
    model, anatomy = loaded.model, inspect(loaded.model)
    (group,) = group_requests(requests(prompts))
    captured = Engine(model, anatomy, batch_tokens=4096).capture(group.requests)
    values = readout(captured, prompts, anatomy.head)
    offsets = captured.offsets["answer"].tolist()
    for start, stop, prompt in zip(offsets, offsets[1:], prompts, strict=False):
        rows = slice(start, stop)
        with torch.inference_mode():
            out = model(torch.tensor([prompt.ids]), output_hidden_states=True)
            positions = list(prompt.answer_positions)
            layers = [model.lm_head(model.model.norm(state[0, positions])) for state in out.hidden_states[:-1]]
            layers.append(out.logits[0, positions])  # the last entry of hidden_states is normed already
        for layer, logits in enumerate(layers):
            gold = torch.tensor(prompt.targets)[:, None]
            log_p = torch.tensor(values.logit - values.logsumexp)[rows, layer]
            wanted = logits.log_softmax(-1)
            assert torch.allclose(log_p, wanted.gather(1, gold)[:, 0], rtol=0, atol=1e-3), layer
            entropy = -(wanted.exp() * wanted).sum(-1)
            assert torch.allclose(torch.tensor(values.entropy)[rows, layer], entropy, rtol=0, atol=1e-3), layer
            rank = 1 + (logits > logits.gather(1, gold)).sum(-1)
            assert torch.allclose(torch.tensor(values.rank)[rows, layer].double(), rank.double(), rtol=1e-3, atol=1), (
                layer
            )


def one_by_one(engine, prompts):
    """Lens values of a forward pass per prompt, nothing shared."""
    alone = Engine(engine.model, engine.anatomy, batch_tokens=1)
    alone.strategy = "plain"
    return readout(alone.capture(requests(prompts)), prompts, engine.anatomy.head)


@needs_xquad
@pytest.mark.parametrize(
    ("setting", "questions", "saved"),
    [
        ("en-x", 5, 0.75),
        pytest.param("en-x", 13, 0.8, marks=pytest.mark.slow),
        pytest.param("x-x", 13, 0.6, marks=pytest.mark.slow),
    ],
)
def test_shared_beginnings_give_the_numbers_of_one_example_at_a_time(loaded, setting, questions, saved):
    """Real XQuAD: several questions on one paragraph, in three scripts."""
    data = load_data(str(XQUAD), ["en", "th", "zh"])
    examples, _ = data.select([setting], paragraphs=1, questions_per_paragraph=questions)
    prompts, _ = build_prompts(examples, loaded.tokenizer, load_template("auto"), loaded.window)
    engine = Engine(loaded.model, inspect(loaded.model), batch_tokens=4096)
    assert chosen(engine, prompts[:3]) == "tree"
    plan = engine.plan(group_requests(requests(prompts)))
    ours = readout(engine.capture(requests(prompts)), prompts, engine.anatomy.head)
    theirs = one_by_one(engine, prompts)
    assert np.abs((ours.logit - ours.logsumexp) - (theirs.logit - theirs.logsumexp)).max() < 1e-3
    assert np.abs(ours.entropy - theirs.entropy).max() < 1e-3
    assert np.abs(ours.kl - theirs.kl).max() < 1e-3
    # two libraries' products, one example at a time, agree on 99.6 % of ranks; what differs, differs by one
    assert (ours.rank == theirs.rank).mean() >= 0.99
    assert np.abs(ours.rank - theirs.rank).max() <= 1
    assert plan.saved > saved


@pytest.mark.slow
@needs_xquad
def test_shared_beginnings_are_as_near_to_fp64_as_single_runs(loaded):
    data = load_data(str(XQUAD), ["en", "th", "zh"])
    examples, _ = data.select(["en-x"], paragraphs=1, questions_per_paragraph=5)
    prompts, _ = build_prompts(examples, loaded.tokenizer, load_template("auto"), loaded.window)
    engine = Engine(loaded.model, inspect(loaded.model), batch_tokens=4096)
    shared, alone = (
        readout(engine.capture(requests(prompts)), prompts, engine.anatomy.head),
        one_by_one(engine, prompts),
    )
    double = copy.deepcopy(loaded.model).double()
    exact = one_by_one(Engine(double, inspect(double), 1), prompts)
    for error in (
        lambda values: np.abs((values.logit - values.logsumexp) - (exact.logit - exact.logsumexp)).mean(),
        lambda values: np.abs(values.rank - exact.rank).mean(),
    ):
        assert error(shared) < 1.2 * error(alone)


@needs_xquad
def test_in_bf16_sharing_adds_nothing_to_the_error_of_bf16(source, loaded):
    """Against fp32: packed runs are no farther off than runs of one example at a time in the same dtype."""
    data = load_data(str(XQUAD), ["en", "de", "th"])
    examples, _ = data.select(["en-x"], paragraphs=1, questions_per_paragraph=5)
    prompts, _ = build_prompts(examples, loaded.tokenizer, load_template("auto"), loaded.window)
    exact = one_by_one(Engine(loaded.model, inspect(loaded.model), 1), prompts)
    narrow = loading.load(source, dtype="bfloat16").model
    engine = Engine(narrow, inspect(narrow), batch_tokens=4096)
    assert chosen(engine, prompts[:3]) == "tree"
    found = {
        "shared": readout(engine.capture(requests(prompts)), prompts, engine.anatomy.head),
        "alone": one_by_one(engine, prompts),
    }
    truth = exact.logit - exact.logsumexp
    errors = {name: np.abs(values.logit - values.logsumexp - truth) for name, values in found.items()}
    assert errors["shared"].mean() < 1.2 * errors["alone"].mean()
    assert np.quantile(errors["shared"], 0.99) < 1.2 * np.quantile(errors["alone"], 0.99)


def test_block_by_block_the_demo_model_gives_the_same_numbers(source, loaded, tmp_path):
    options = {"languages": ("en", "th"), "limit": 4}
    whole = xprobe.run(out=tmp_path / "whole", **options)
    streamed = xprobe.run(out=tmp_path / "streamed", stream=True, **options)
    for name, wanted in read_signals(RunFolder.open(whole.path), whole.manifest)[1].items():
        found = read_signals(RunFolder.open(streamed.path), streamed.manifest)[1][name]
        assert np.allclose(found, wanted, rtol=1e-4, atol=1e-4), name
    assert parity(streamed) < 1e-3


def test_weights_are_plain_fp32_and_converted_once(source, loaded):
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    folder = gguf.convert(Path(source.location))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert gguf.convert(Path(source.location)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_conversion_that_fails_leaves_nothing_behind(source, empty_cache, monkeypatch):
    def failing(path, folder):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_convert", failing)
    with pytest.raises(ModelError, match=r"No space left on device.*XPROBE_CACHE"):
        gguf.convert(Path(source.location))
    assert list((empty_cache / "models").iterdir()) == []


def test_a_cut_off_gguf_file_is_named(source, empty_cache, tmp_path):
    path = tmp_path / "cut.gguf"
    with open(source.location, "rb") as whole:
        path.write_bytes(whole.read(100_000))
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        loading.load(loading.resolve(str(path)))
    assert list((empty_cache / "models").iterdir()) == []


def test_the_model_answers_when_asked(loaded):
    """The weights, the tokenizer and the chat template belong together: a question gets its answer."""
    message = [{"role": "user", "content": "What is the capital of France?"}]
    ids = loaded.tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = loaded.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(out[0])


def test_the_main_job_on_the_built_in_set(source, tmp_path, capsys):
    assert main(["run", "--languages", "en,zh", "--limit", "3", "--out", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parity_error"] < 1e-3
    found = result["settings"]["en-x"]
    layers = found["layers"]
    assert len(layers) == 31
    # the gold answer is far more ready at the end than anywhere in the first half
    assert layers[-1]["readiness"] > 0.6 > max(layer["readiness"] for layer in layers[:15])
    assert 15 < found["boundary"]["value"] < 30


@needs_xquad
def test_the_main_job_on_real_xquad(source, tmp_path, capsys):
    arguments = [
        "run",
        "--data",
        XQUAD,
        "--languages",
        "en,th",
        "--limit",
        "2",
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["counts"]["examples"] == 4
    assert result["counts"]["bad_records"] == {}
    assert result["parity_error"] < 1e-3


@needs_xquad
def test_every_prompt_of_xquad_has_verified_spans_in_both_settings(source, loaded):
    examples = load_data("xquad").examples(["en-x", "x-x"])[::11]
    prompts, skipped = build_prompts(examples, loaded.tokenizer, load_template("auto"), loaded.window)
    assert skipped == []
    assert len(prompts) == len(examples) > 1300


@pytest.mark.slow
@needs_xquad
def test_twenty_xquad_questions_in_four_languages(source, tmp_path):
    study = xprobe.run(data=str(XQUAD), languages=["en", "de", "zh", "th"], limit=20, out=tmp_path / "run")
    assert study.manifest.counts.examples == 80
    assert parity(study) < 1e-3
    assert study.stability["stability"].between(0, 1).all()
