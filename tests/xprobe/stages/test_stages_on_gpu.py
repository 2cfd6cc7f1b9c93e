"""Answers, relevance, patches and lenses on a real GPU: the figures of the CPU in fp32, usable ones in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.families import FAMILIES, random_ids, tiny_model
from transformers import GenerationConfig

import xprobe
from xprobe.attribution.settings import RULES
from xprobe.capture.engine import Engine
from xprobe.capture.requests import Each, Request
from xprobe.lenses.transport import from_maps
from xprobe.models.anatomy import inspect

pytestmark = pytest.mark.gpu

DEVICES = ("cpu", "cuda")
OPTIONS: dict[str, Any] = {
    "languages": ("en", "de"), "setting": ("en-x", "x-x"), "limit": 6, "probes": (), "bootstrap": 20,
    "permutations": 20,
}  # fmt: skip
GENERATED = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt2", "olmo2", "gpt_oss", "deepseek_v3"]
NEW = 9


@pytest.fixture(scope="module")
def studies(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, xprobe.Study]:
    folder = tmp_path_factory.mktemp("stages")
    return {
        device: xprobe.run(str(tiny), out=folder / device, device=device, dtype="float32", **OPTIONS)
        for device in DEVICES
    }


def assert_close(ours: pd.DataFrame, theirs: pd.DataFrame, slack: float, loose: tuple[str, ...] = ()) -> None:
    """Numbers within ``slack``, the rest equal. ``loose`` columns are not compared: a rounding may move them."""
    assert list(ours.columns) == list(theirs.columns)
    assert len(ours) == len(theirs) > 0
    for name in ours.columns.difference(list(loose)):
        if pd.api.types.is_float_dtype(ours[name]):
            np.testing.assert_allclose(ours[name], theirs[name], atol=slack, rtol=slack, err_msg=name)
        else:
            assert ours[name].tolist() == theirs[name].tolist(), name


def test_answers_are_those_of_the_cpu(studies: dict[str, xprobe.Study]) -> None:
    settings = xprobe.AnswerSettings(max_new_tokens=12)
    found = {device: xprobe.evaluate(study, settings).answers for device, study in studies.items()}
    assert_close(found["cuda"], found["cpu"], 1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_relevance_is_that_of_the_cpu(studies: dict[str, xprobe.Study], rule: str) -> None:
    settings = xprobe.RelevanceSettings(rule=rule)
    found = {device: xprobe.attribute(study, settings) for device, study in studies.items()}
    ours, theirs = (found[device].relevance for device in ("cuda", "cpu"))
    depths = tuple(name for name in ours.columns if name.startswith("mrd"))
    assert_close(ours, theirs, 2e-3, depths)
    assert (ours["mrd"].dropna() - theirs["mrd"].dropna()).abs().max() < 0.5
    by_layer = [found[device].table("relevance_by_layer.parquet") for device in ("cuda", "cpu")]
    assert_close(*by_layer, 1e-2, ("lo", "hi"))


def test_patches_are_those_of_the_cpu(studies: dict[str, xprobe.Study]) -> None:
    found = {device: xprobe.patch(study) for device, study in studies.items()}
    ours, theirs = (found[device].table("patching.parquet") for device in ("cuda", "cpu"))
    assert_close(ours, theirs, 2e-3)


def test_several_lenses_read_what_they_read_on_the_cpu(studies: dict[str, xprobe.Study], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = {block: torch.randn(32, 32, generator=generator).half() for block in range(3)}
    torch.save({"J": maps, "n_prompts": 1, "source_layers": [0, 1, 2], "d_model": 32}, tmp_path / "j.pt")
    settings = xprobe.LensesSettings(f"jacobian:{tmp_path / 'j.pt'}")
    found = {device: xprobe.read_lenses(study, settings) for device, study in studies.items()}
    tables = [found[device].table("lenses_by_layer.parquet") for device in ("cuda", "cpu")]
    smooth = ["log_probability", "entropy", "latent_english", "latent_own", "latent_share"]
    assert_close(*(table[table["signal"].isin(smooth)] for table in tables), 1e-3, ("lo", "hi"))
    for study in found.values():
        assert study.manifest.stages["lenses"].results["difference_from_run"]["log_probability"] < 1e-3


def test_every_stage_runs_in_16_bits(tiny: Path, tmp_path: Path) -> None:
    study = xprobe.run(str(tiny), out=tmp_path / "run", device="cuda", dtype="bfloat16", **OPTIONS)
    study = study.evaluate(xprobe.AnswerSettings(max_new_tokens=6)).attribute().patch()
    assert study.answers["log_probability"].le(0).all()
    assert np.isfinite(study.relevance["share"]).all()
    assert np.isfinite(study.table("patching.parquet")[["own", "other"]]).all().all()
    assert not any(entry.warnings for entry in study.manifest.stages.values()), study.manifest.stages


@pytest.mark.parametrize("family", [name for name in GENERATED if name in FAMILIES])
def test_generated_tokens_are_those_of_the_models_own_generate(family: str) -> None:
    model = tiny_model(family).to("cuda")
    model.generation_config.eos_token_id = None
    pages, questions = (random_ids(count, length, seed=length).tolist() for count, length in ((2, 20), (4, 9)))
    prompts = [[*page, *question[: 5 + i]] for page in pages for i, question in enumerate(questions)]
    engine = Engine(model, inspect(model), 4096)
    engine.choose_strategy([Request(tuple(ids), {"last": Each((len(ids) - 1,))}) for ids in prompts])
    found = engine.generate(prompts, NEW, ())
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, repetition_penalty=1.0, pad_token_id=0)
    wanted = [
        model.generate(torch.tensor([ids], device="cuda"), generation_config=config)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    assert [list(one.ids) for one in found] == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_transport_is_as_exact_as_its_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 70, 96, generator=generator).to(dtype)
    maps = {layer: torch.randn(96, 96, generator=generator) / 96**0.5 for layer in (1, 2, 3)}
    biases = {layer: torch.randn(96, generator=generator) for layer in maps}
    transport = from_maps("tuned", maps, biases, residual=True)
    exact = transport.apply(rows.double())
    found = transport.apply(rows.cuda())
    assert found.dtype == dtype
    error = (found.double().cpu() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("kind", ["regression", "jacobian"])
def test_a_fitted_lens_is_that_of_the_cpu(tiny: Path, tmp_path: Path, kind: str) -> None:
    texts = ["The river is long and slow.", "A second text of some words.", "Drei kurze Sätze.", "One more, at last."]
    fits = {
        device: xprobe.fit_lens(
            str(tiny), tmp_path / f"{device}.pt", xprobe.FitSettings(kind=kind, tokens=24), text=texts, device=device
        )
        for device in DEVICES
    }
    ours, theirs = (torch.load(fits[device].path, weights_only=True)["J"] for device in ("cuda", "cpu"))
    for layer, wanted in theirs.items():
        assert (ours[layer].float() - wanted.float()).norm() / wanted.float().norm() < 2e-2, layer
    lens = fits["cuda"].name
    read = {device: xprobe.lens_prompt(str(tiny), "The river", lens=lens, device=device).table for device in DEVICES}
    assert_close(read["cuda"], read["cpu"], 1e-3)
