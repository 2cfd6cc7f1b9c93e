"""Runs under another lens: every layer is read through its map, the last as it is, and the file is part of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import xprobe
from xprobe.errors import ModelError, UsageError
from xprobe.models.anatomy import inspect, watch_states
from xprobe.qa.prompts import build_prompts
from xprobe.runs.folder import RunFolder
from xprobe.stages.questions import read_questions
from xprobe.stages.shards import read_signals

OPTIONS: dict[str, Any] = {"languages": ("en", "de"), "limit": 4, "bootstrap": 20, "permutations": 20, "probes": ()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("runs") / "model")


def lens_file(path: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    maps = {block: torch.randn(32, 32, generator=generator).half() for block in range(3)}
    torch.save({"J": maps, "n_prompts": 1, "source_layers": [0, 1, 2], "d_model": 32}, path)
    return path


def test_every_layer_is_read_through_its_map(model: Path, tmp_path: Path) -> None:
    file = lens_file(tmp_path / "j.pt")
    study = xprobe.run(str(model), lens=f"jacobian:{file}", out=tmp_path / "run", **OPTIONS)
    plain = xprobe.run(str(model), out=tmp_path / "plain", **OPTIONS)
    assert (study.lens, plain.lens, study.to_dict()["lens"]) == (f"jacobian:{file}", "logit", f"jacobian:{file}")
    held, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    questions = read_questions(study.manifest.study)
    prompts, _ = build_prompts(questions.examples, tokenizer, questions.template, None)
    by_key = {(p.example.language, p.example.question_id): p for p in prompts}
    maps = torch.load(file, weights_only=True)["J"]
    frame, signals = read_signals(RunFolder(study.path), study.manifest)
    blocks = inspect(held).blocks
    for place in (0, len(frame) - 1):
        prompt = by_key[frame["language"].iloc[place], frame["question_id"].iloc[place]]
        states: list[torch.Tensor] = []
        with torch.inference_mode():
            with watch_states(blocks, lambda layer, hidden, to=states: to.append(hidden[0])):
                held(torch.tensor([prompt.ids[:-1]]))
            for layer, hidden in enumerate(states):
                rows = hidden[list(prompt.answer_positions)]
                if layer - 1 in maps:
                    rows = rows @ maps[layer - 1].float().T
                values = held.lm_head(held.model.norm(rows)).double().log_softmax(-1)
                wanted = values[range(len(prompt.targets)), list(prompt.targets)].mean()
                assert signals["log_probability"][place, layer] == pytest.approx(float(wanted), abs=1e-3)
    own, other = (one["en-x"].signals.loc["readiness", "all"]["value"].to_numpy() for one in (study, plain))
    assert own[[0, -1]] == pytest.approx(other[[0, -1]])  # neither the embeddings nor the last layer have a map
    assert not np.allclose(own[1:-1], other[1:-1])


def test_the_bytes_of_the_lens_identify_a_run(model: Path, tmp_path: Path) -> None:
    file = lens_file(tmp_path / "j.pt")
    options = {**OPTIONS, "lens": f"jacobian:{file}", "out": tmp_path / "run"}
    first = xprobe.run(str(model), **options)
    again = xprobe.run(str(model), resume=True, **options)
    assert again.layers.equals(first.layers)
    with pytest.raises(UsageError, match=r"lens was 'jacobian:.*' and is now 'logit'"):
        xprobe.run(str(model), resume=True, **{**options, "lens": "logit"})
    lens_file(file, seed=1)
    with pytest.raises(UsageError, match="the file of the lens has other bytes"):
        xprobe.run(str(model), resume=True, **options)
    xprobe.patch(first)  # stages that do not read with the lens are not concerned


def test_a_lens_of_another_model_and_a_missing_one_are_refused(model: Path, tmp_path: Path) -> None:
    torch.save({"J": {0: torch.eye(8)}, "n_prompts": 1, "source_layers": [0], "d_model": 8}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match="has width 8, the model has width 32: it is of another model"):
        xprobe.run(str(model), lens=f"jacobian:{tmp_path / 'other.pt'}", out=tmp_path / "run", **OPTIONS)
    for lens, message in (("jacobian:none.pt", "there is no file none.pt"), ("focus", "unknown lens 'focus'")):
        with pytest.raises(UsageError, match=message):
            xprobe.run(str(model), lens=lens, out=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_what_a_file_lacks_is_a_warning_of_the_run(model: Path, tmp_path: Path) -> None:
    torch.save({"J": {1: torch.eye(32)}, "n_prompts": 1, "source_layers": [1], "d_model": 32}, tmp_path / "few.pt")
    study = xprobe.run(str(model), lens=f"jacobian:{tmp_path / 'few.pt'}", out=tmp_path / "run", **OPTIONS)
    assert any("has no map for 2 of the layers 1 to 3" in warning for warning in study.manifest.warnings)


def test_lens_prompt_and_run_read_alike(model: Path, tmp_path: Path) -> None:
    file = lens_file(tmp_path / "j.pt")
    tokenizer = AutoTokenizer.from_pretrained(model)
    held = AutoModelForCausalLM.from_pretrained(model).eval()
    prompt = "who built the old tower"
    found = xprobe.lens_prompt(str(model), prompt, lens=f"jacobian:{file}", answer="boats", top=3)
    maps = torch.load(file, weights_only=True)["J"]
    target = tokenizer("boats", add_special_tokens=False)["input_ids"][0]
    states: list[torch.Tensor] = []
    with torch.inference_mode(), watch_states(inspect(held).blocks, lambda layer, hidden: states.append(hidden[0, -1])):
        held(torch.tensor([tokenizer(prompt)["input_ids"]]))
    for layer, state in enumerate(states):
        row = state @ maps[layer - 1].float().T if layer - 1 in maps else state
        chances = held.lm_head(held.model.norm(row)).softmax(-1)
        assert found.answer_probability is not None
        assert found.answer_rank is not None
        assert found.answer_probability[layer, 0] == pytest.approx(float(chances[target]), rel=1e-3)
        assert found.answer_rank[layer, 0] == int((chances > chances[target]).sum()) + 1
        assert found.top[layer][0][0][1] == pytest.approx(float(chances.max()), rel=1e-3)
