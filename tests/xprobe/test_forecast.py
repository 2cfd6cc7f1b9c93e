"""A dry run plans what the run does, without weights."""

from __future__ import annotations

import json

import pytest
from support.families import save_tiny_model

import xprobe
from xprobe.config import Execution, StudyConfig, split_options
from xprobe.errors import XprobeError
from xprobe.forecast import forecast

SMALL = {"batch_tokens": 500, "languages": ("en", "th", "zh"), "limit": 6}


def of(model, **options):
    study, execution = split_options({**SMALL, **options})
    return forecast(StudyConfig(model=str(model), **study), Execution(**execution))


def test_a_forecast_plans_what_the_run_computes(tiny, tmp_path):
    found = of(tiny, settings=("en-x", "x-x"))
    study = xprobe.run(str(tiny), setting=("en-x", "x-x"), out=tmp_path / "run", **SMALL)
    plan = study.manifest.stages["states"].results["plan"]
    assert (found.strategy, found.tokens, found.tokens_run) == (plan["strategy"], plan["tokens"], plan["tokens_run"])
    assert found.examples == study.manifest.counts.examples
    assert [group.key for group in found.groups] == study.manifest.groups
    assert (found.n_blocks, found.width) == (study.manifest.model.n_blocks, study.manifest.model.width)
    shards = sum(file.stat().st_size for file in (study.path / "shards").iterdir())
    assert shards / 2 < found.disk["shards"] < shards


def test_weights_are_counted_and_not_read(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    (tmp_path / "copy").mkdir()
    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    found = of(tmp_path / "copy")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.memory["weights"] == 4 * found.parameters
    assert of(tmp_path / "copy", dtype="bfloat16").memory["weights"] == 2 * found.parameters


def test_block_by_block_takes_memory_for_two_blocks_and_disk_for_the_rows(tiny):
    whole, streamed = of(tiny), of(tiny, stream=True)
    assert streamed.memory["weights"] < whole.memory["weights"]
    assert streamed.memory["rows"] == 0
    assert streamed.disk["rows until the end"] > 0


def test_a_smaller_budget_means_more_passes_over_more_tokens(tiny):
    large, small = of(tiny, batch_tokens=4096), of(tiny, batch_tokens=100)
    assert large.passes < small.passes
    assert large.tokens == small.tokens
    assert large.tokens_run <= small.tokens_run
    assert small.memory["forward pass"] < large.memory["forward pass"]


def test_the_values_of_a_forecast_are_plain_json(tiny):
    value = json.loads(json.dumps(of(tiny).to_dict()))
    assert value["seconds"] > 0
    assert sum(group["examples"] for group in value["groups"]) == value["examples"]


def test_bad_input_is_refused_as_by_the_run(tiny, tmp_path):
    with pytest.raises(XprobeError, match="no model at"):
        of(tmp_path / "nothing")
    with pytest.raises(XprobeError, match="language"):
        of(tiny, languages=("xx",))


def test_blocks_are_found_in_nested_decoders_and_states_between_blocks_are_counted(tmp_path):
    found = of(save_tiny_model(tmp_path / "opt", "opt"), stream=True, settings=("en-x",))
    assert found.memory["weights"] < 4 * found.parameters
    assert found.memory["states between blocks"] == found.tokens_run * found.width * 4
    assert found.disk["states between blocks"] == 0
