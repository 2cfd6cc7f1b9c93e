"""A model spread over devices, main memory and disk gives the results of one device."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from support.families import save_tiny_model
from support.prompts import chosen, family_of_prompts, forced, readout, requests
from xprobe_cli.main import main

import xprobe
from xprobe.capture.engine import Engine
from xprobe.config import Execution
from xprobe.errors import ModelError, UsageError
from xprobe.models import loading
from xprobe.models.anatomy import inspect
from xprobe.models.norms import own_weights

PROMPTS = family_of_prompts()
SAMPLE = [PROMPTS[0], PROMPTS[2], PROMPTS[3], PROMPTS[-1]]
MODULES = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "model.rotary_emb", "lm_head"]
SMALL = {"languages": ("en", "th"), "limit": 4, "batch_tokens": 500, "probes": (), "bootstrap": 20}


def device_map(device: str, *modules: str, others: str | int = "cpu") -> dict[str, str | int]:
    """Puts the modules whose names end with one of ``modules`` on ``device``, and all others on ``others``."""
    return {name: device if name.endswith(modules) else others for name in MODULES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {family: save_tiny_model(base / family, family) for family in ("llama", "llama_tied", "mixtral")}


def open_engine(folder: Path, **options) -> Engine:
    dtype = options.pop("dtype", "auto")
    loaded = loading.load(loading.resolve(str(folder)), Execution(**options), dtype=dtype)
    return Engine(loaded.model, inspect(loaded.model), 200)


def offloaded(engine: Engine) -> set[str]:
    """Names of the modules whose weights are on the meta device between forward passes."""
    on_meta = [name for name, value in engine.model.named_parameters() if value.is_meta]
    return {module for module in MODULES if any(name.startswith(module + ".") for name in on_meta)}


@pytest.mark.parametrize("device", ["gpu", "tpu9", "cuda:99", "mps:7", "", "meta"])
def test_a_device_that_this_machine_lacks_is_refused_with_those_it_has(device: str) -> None:
    with pytest.raises(UsageError, match=rf"^device '{device}' cannot be used.*: this machine has cpu") as caught:
        loading.pick_device(device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", 99])
def test_a_device_map_with_a_device_that_this_machine_lacks_is_refused(device: str | int, folders) -> None:
    with pytest.raises(UsageError, match=r"cannot be used.*: this machine has cpu"):
        open_engine(folders["llama"], device_map={"model": "cpu", "lm_head": device})


MAPS = {
    "a block on disk": device_map("disk", "layers.2"),
    "first block on disk": device_map("disk", "layers.0"),
    "norm and head on disk": device_map("disk", "norm", "lm_head"),
    "all on disk": device_map("disk", ""),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral"])
@pytest.mark.parametrize("name", MAPS)
def test_offloading_changes_neither_rows_nor_lens_nor_parity(folders, family, name, dtype):
    plain = open_engine(folders[family], dtype=dtype, device="cpu")
    if family == "llama_tied" and name == "norm and head on disk":
        with pytest.raises(ModelError, match=r"lm_head.weight and model.embed_tokens.weight are the same weights"):
            open_engine(folders[family], dtype=dtype, device_map=MAPS[name])
        return
    spread = open_engine(folders[family], dtype=dtype, device_map=MAPS[name])
    assert offloaded(spread) == {module for module, device in MAPS[name].items() if device == "disk"} - {
        "model.rotary_emb"
    }
    assert spread.anatomy.names == plain.anatomy.names
    assert torch.equal(spread.anatomy.head.weight, plain.anatomy.head.weight)
    assert chosen(spread, SAMPLE) == chosen(plain, SAMPLE) == "tree"
    spread.check_parity(forced(PROMPTS[:3]))
    assert spread.parity_error < {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    rounding = {"float32": 1e-6, "bfloat16": 1e-3}[dtype]  # a mapped file has another alignment in memory
    for strategy in ("tree", "prefix", "plain"):
        plain.strategy = spread.strategy = strategy
        wanted, captured_rows = plain.capture(requests(PROMPTS)), spread.capture(requests(PROMPTS))
        assert torch.allclose(captured_rows["answer"], wanted["answer"], rtol=0, atol=rounding)
        assert torch.allclose(captured_rows["question"], wanted["question"], rtol=0, atol=rounding)
    values, expected = (
        readout(captured, PROMPTS, engine.anatomy.head)
        for engine, captured in ((spread, captured_rows), (plain, wanted))
    )
    assert abs(values.logsumexp - expected.logsumexp).max() < 10 * rounding
    assert abs(values.logit - expected.logit).max() < 10 * rounding


def test_weights_on_disk_are_read_whole(folders):
    plain = open_engine(folders["llama"], device="cpu")
    spread = open_engine(folders["llama"], device_map=MAPS["norm and head on disk"])
    head = spread.model.get_output_embeddings()
    assert head.weight.is_meta
    assert torch.equal(own_weights(head)["weight"], plain.model.get_output_embeddings().weight)
    assert head.weight.is_meta  # unchanged


def test_the_offload_folder_disappears_with_the_model(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine = open_engine(folders["mixtral"], device_map=MAPS["a block on disk"])
    assert [
        p.name for p in tmp_path.rglob("*") if "experts" in p.name
    ]  # transformers fuses the experts, so it must write them
    del engine
    import gc

    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_study_of_a_spread_model_equals_that_of_the_model_in_memory(folders, tmp_path):
    plain = xprobe.run(str(folders["llama"]), out=tmp_path / "plain", device="cpu", **SMALL)
    spread = xprobe.run(str(folders["llama"]), out=tmp_path / "spread", device_map=MAPS["a block on disk"], **SMALL)
    assert spread.manifest.stages["states"].executions[0].options.device_map["model.layers.2"] == "disk"
    assert spread.stability.equals(plain.stability)
    again = xprobe.run(
        str(folders["llama"]), out=tmp_path / "spread", resume=True, device_map=MAPS["a block on disk"], **SMALL
    )
    assert again.stability.equals(plain.stability)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu", "device_map": "auto"}, "contradict"),
        ({"device_map": "everywhere"}, "balanced_low_0"),
        ({"device_map": {}}, "each module"),
        ({"device_map": {"lm_head": None}}, "each module"),
        ({"device_map": "auto", "stream": True}, "choose one"),
    ],
)
def test_contradicting_options_are_refused_before_anything_is_loaded(options, message):
    with pytest.raises(UsageError, match=message):
        Execution(**options)


def test_the_command_line_accepts_a_device_map(folders, tmp_path, capsys):
    run = ["run", str(folders["llama"]), "--languages", "en", "--limit", "2", "--out", str(tmp_path / "run")]
    assert main([*run, "--device-map", "auto", "--device", "cpu"]) == 2
    assert "contradict" in capsys.readouterr().err
    assert main([*run, "--device-map", "sequential"]) == 0


def test_without_accelerate_the_message_shows_how_to_install_it(folders, tmp_path, capsys, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else original(name, *a)
    )
    run = ["run", str(folders["llama"]), "--languages", "en", "--limit", "2", "--out", str(tmp_path / "run")]
    assert main([*run, "--device-map", "auto"]) == 1
    assert "pip install accelerate" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [("layers.1", "layers.2"), ("embed_tokens", "layers.0"), ("norm", "lm_head")])
def test_on_a_gpu_modules_in_main_memory_change_nothing(folders, kept):
    plain = open_engine(folders["llama"], device="cuda", dtype="float32")
    spread = open_engine(folders["llama"], dtype="float32", device_map=device_map("cpu", *kept, others=0))
    assert offloaded(spread)
    assert spread.anatomy.head.weight.is_cuda
    assert chosen(spread, SAMPLE) == chosen(plain, SAMPLE)
    spread.check_parity(forced(PROMPTS[:3]))
    assert spread.parity_error < 1e-3
    assert torch.allclose(
        spread.capture(requests(PROMPTS))["answer"], plain.capture(requests(PROMPTS))["answer"], rtol=0, atol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_blocks_on_two_gpus_give_the_rows_of_one_gpu():
    from support.families import tiny_model

    model = tiny_model("llama").to("cuda:0")
    wanted = Engine(model, inspect(model), 200).capture(requests(PROMPTS))["answer"].cpu()
    from accelerate import dispatch_model

    devices = {name: int(name.endswith(("layers.1", "layers.3", "norm", "lm_head"))) for name in MODULES}
    spread = dispatch_model(tiny_model("llama"), devices)
    engine = Engine(spread, inspect(spread), 200)
    assert chosen(engine, SAMPLE) == "tree"
    for strategy in ("tree", "prefix", "plain"):
        engine.strategy = strategy
        assert torch.allclose(engine.capture(requests(PROMPTS))["answer"].cpu(), wanted, rtol=0, atol=1e-5)
