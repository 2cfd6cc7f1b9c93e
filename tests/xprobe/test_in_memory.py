"""Models and questions that the caller holds in memory: the same numbers as by name, nothing left behind."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from support.families import FAMILIES, tiny_tokenizer
from support.runs import parity

import xprobe
from xprobe.errors import ModelError, UsageError

FAST = {"languages": ("en", "de"), "limit": 3, "probes": (), "bootstrap": 20, "permutations": 20}


@pytest.fixture
def held(tiny):
    """(model, tokenizer) as other people's scripts hold them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)


def same_tables(one: xprobe.Study, other: xprobe.Study) -> bool:
    return one.layers.equals(other.layers) and one.examples.equals(other.examples)


def test_a_model_in_memory_gives_the_numbers_of_its_folder(tiny, held, tmp_path):
    model, tokenizer = held
    by_name = xprobe.run(tiny, out=tmp_path / "a", **FAST)  # a path, not a text
    given = xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "b", **FAST)
    assert same_tables(by_name, given)
    entry = given.manifest.model
    assert (entry.kind, entry.name) == ("memory", str(tiny))
    assert "configuration, tokenizer" in entry.identity


def test_the_model_is_left_as_it_was(held, tmp_path):
    model, tokenizer = held
    model.train()
    model.model.layers[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "run", **FAST)
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[1].training
    assert model.config._attn_implementation == attention
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_run_of_a_model_in_memory_is_resumed_only_with_the_same_model(held, tmp_path):
    model, tokenizer = held
    done = xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "run", **FAST)
    again = xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "run", resume=True, **FAST)
    assert same_tables(done, again)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0] += 1
    with pytest.raises(UsageError, match="other bytes"):
        xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "run", resume=True, **FAST)


def test_another_tokenizer_or_configuration_is_another_model(held):
    from xprobe.models.in_memory import fingerprint

    model, tokenizer = held
    before = fingerprint(model, tokenizer)
    assert fingerprint(model, tokenizer) == before
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    changed = {before, fingerprint(model, tokenizer), fingerprint(model, tiny_tokenizer("unigram"))}
    model.config.rms_norm_eps = 1e-3
    assert len(changed | {fingerprint(model, tokenizer)}) == 4


def test_the_command_line_says_that_such_a_run_belongs_to_a_script(held, tmp_path, capsys):
    from xprobe_cli.main import main

    model, tokenizer = held
    xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "run", **FAST)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert main(["run", "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "made with a model in memory" in capsys.readouterr().err


def test_records_in_memory_give_the_numbers_of_their_files(tiny, tmp_path):
    from xprobe.qa.parallel import load_data

    records = [
        {"id": r.id, "language": r.language, "context": r.context, "question": r.question,
         "answers": {"text": [r.answer], "answer_start": [r.answer_start]}}
        for by_id in load_data("builtin", ("en", "de")).records.values() for r in by_id.values()
    ]  # fmt: skip
    by_name = xprobe.run(tiny, out=tmp_path / "a", **FAST)
    listed = xprobe.run(tiny, data=records, out=tmp_path / "b", **FAST)
    framed = xprobe.run(tiny, data=pd.DataFrame(records), out=tmp_path / "c", **FAST)
    for study in (listed, framed):
        values = study.layers["value"].to_numpy()
        assert np.array_equal(values, by_name.layers["value"].to_numpy(), equal_nan=True)
    assert listed.manifest.data.name == "records in memory"
    again = xprobe.run(tiny, data=records, out=tmp_path / "b", resume=True, **FAST)
    assert same_tables(listed, again)
    with pytest.raises(UsageError, match="data"):
        xprobe.run(tiny, data=records[:-1], out=tmp_path / "b", resume=True, **FAST)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (3, "got int"),
        (None, "got NoneType"),
        (torch.nn.Linear(2, 2), "got Linear"),
        ({"a": 1}, "got dict"),
    ],
)
def test_an_object_that_is_no_model_is_refused_in_one_line(model, words):
    with pytest.raises(UsageError, match=words):
        xprobe.run(model)


def test_a_loaded_model_needs_its_tokenizer_and_no_options_of_loading(held, tmp_path):
    model, tokenizer = held
    with pytest.raises(UsageError, match="needs its tokenizer"):
        xprobe.run(model)
    with pytest.raises(UsageError, match="got str"):
        xprobe.run(model, tokenizer="gpt2")
    for option in ({"dtype": "float64"}, {"device": "cpu"}, {"stream": True}, {"device_map": "auto"}):
        with pytest.raises(UsageError, match="this one is in memory"):
            xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "run", **option, **FAST)
    with pytest.raises(UsageError, match="has its own"):
        xprobe.run("smollm2-135m", tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()


def test_models_whose_weights_are_no_plain_tensors_are_refused(held, tmp_path):
    model, tokenizer = held
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ModelError, match="is quantised"):
        xprobe.run(quantised, tokenizer=tokenizer, out=tmp_path / "run", **FAST)


def test_wrapped_models_are_refused_with_what_to_give(held):
    model, tokenizer = held
    with pytest.raises(UsageError, match=r"give the model itself, model.module"):
        xprobe.run(torch.nn.DataParallel(model), tokenizer=tokenizer)
    with pytest.raises(UsageError, match=r"give the model itself, model._orig_mod"):
        xprobe.run(torch.compile(model), tokenizer=tokenizer)


def test_arguments_of_other_types_are_named_before_anything_is_written(tiny, tmp_path):
    import numpy as np

    for name, value in {"device": torch.device("cpu"), "stream": "yes", "settings": "en-x", "data": None}.items():
        with pytest.raises(UsageError, match=name):
            xprobe.run(tiny, out=tmp_path / "run", **{name: value})
    assert not (tmp_path / "run").exists()
    study = xprobe.run(tiny, out=tmp_path / "run", **{**FAST, "limit": np.int64(2), "bootstrap": np.int32(20)})
    assert study.manifest.study.limit == 2


def test_models_without_a_head_are_refused(held, tmp_path):
    model, tokenizer = held
    with pytest.raises(ModelError, match="no output embedding"):
        xprobe.run(model.model, tokenizer=tokenizer, out=tmp_path / "run", **FAST)


def test_experts_in_fp64_are_put_back(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer("byte_bpe")
    kind, options = FAMILIES["qwen3_moe"]
    config = AutoConfig.for_model(kind, **{**options, "vocab_size": len(tokenizer), "max_position_embeddings": 4096})
    model = AutoModelForCausalLM.from_config(config).double().eval()
    before = model.config._experts_implementation
    study = xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "run", **FAST)
    assert parity(study) < 1e-6  # the readout keeps single precision
    assert model.config._experts_implementation == before


def test_hooks_of_the_caller_are_warned_of_and_are_part_of_the_identity(held, tmp_path):
    model, tokenizer = held

    def steer(module, args, output):
        return output

    handle = model.model.layers[1].register_forward_hook(steer)
    study = xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "run", **FAST)
    (warning,) = [text for text in study.manifest.warnings if "hooks" in text]
    assert "model.layers.1: " in warning
    assert "steer" in warning
    handle.remove()
    with pytest.raises(UsageError, match="cannot resume"):
        xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "run", resume=True, **FAST)
