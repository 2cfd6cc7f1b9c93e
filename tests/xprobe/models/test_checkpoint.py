"""Checkpoints on disk: their tensors are read exactly, and damaged checkpoints are refused with the cause."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import tiny_model

from xprobe.errors import ModelError
from xprobe.models.checkpoint import INDEX, Checkpoint
from xprobe.models.streaming.streamed import open_streamed, sweep

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model("llama").save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of a sharded checkpoint that a test may damage."""
    return shutil.copytree(original, tmp_path / "model")


def test_tensors_are_read_as_they_were_saved(tmp_path):
    wanted = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    wanted |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    save_file(wanted, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint) == set(wanted)
    assert checkpoint.nbytes == sum(value.nbytes for value in wanted.values())
    for name, value in wanted.items():
        stored = checkpoint[name]
        assert (stored.shape, stored.dtype, stored.nbytes) == (value.shape, value.dtype, value.nbytes)
        assert torch.equal(stored[...], value)
        assert stored[...].dtype == value.dtype
    assert checkpoint.bytes_read == 2 * checkpoint.nbytes
    assert checkpoint.read("scalar", torch.float16).dtype == torch.float16


def test_all_shards_are_read_as_one_checkpoint(original):
    checkpoint = Checkpoint(original)
    files = list(original.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        for name, value in load_file(file).items():
            assert torch.equal(checkpoint.read(name), value)
    assert checkpoint.bytes_read == checkpoint.nbytes


def test_the_error_names_an_unknown_tensor(original):
    with pytest.raises(ModelError, match="no tensor 'nonsense'"):
        Checkpoint(original).read("nonsense")


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def cut(folder: Path) -> None:
    file = shard(folder)
    file.write_bytes(file.read_bytes()[:-100])


def pointer(folder: Path) -> None:
    shard(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


def garbled(folder: Path) -> None:
    raw = bytearray(shard(folder).read_bytes())
    raw[8:40] = b"\xff" * 32
    shard(folder).write_bytes(raw)


def float8(folder: Path) -> None:
    file = shard(folder)
    named = load_file(file)
    name = next(iter(named))
    save_file({**named, name: named[name].to(torch.float8_e4m3fn)}, file)


def without_a_tensor(folder: Path) -> None:
    file = shard(folder)
    named = load_file(file)
    del named[next(iter(named))]
    save_file(named, file)


def shortened_index(folder: Path) -> None:
    index = folder / INDEX
    listed = json.loads(index.read_text())
    dropped = shard(folder).name
    listed["weight_map"] = {name: file for name, file in listed["weight_map"].items() if file != dropped}
    index.write_text(json.dumps(listed))


def index_names_a_file_outside(folder: Path) -> None:
    index = folder / INDEX
    index.write_text(index.read_text().replace(shard(folder).name, "../" + shard(folder).name))


def only(name: str):
    def damage(folder: Path) -> None:
        for file in folder.glob("model*"):
            file.unlink()
        (folder / name).write_bytes(b"x")

    return damage


def configured(**changes):
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


DAMAGES = {
    "cut off": (cut, r"is damaged or cut off \(it ends before the end of tensor"),
    "git-lfs pointer": (pointer, "pointer file of git-lfs"),
    "garbled header": (garbled, "is damaged or cut off"),
    "empty file": (lambda folder: shard(folder).write_bytes(b""), "header does not fit"),
    "missing shard": (lambda folder: shard(folder).unlink(), "lacks 1 of the .* shards that its index names"),
    "missing tensor in a shard": (without_a_tensor, "names 1 tensors that its files do not hold"),
    "missing tensors": (shortened_index, r"lacks \d+ tensors of LlamaForCausalLM"),
    "index that is no index": (lambda folder: (folder / INDEX).write_text("{}"), "index.json is damaged"),
    "index that names a file outside": (index_names_a_file_outside, "names files outside the folder"),
    "float8": (float8, "F8_E4M3, which is a quantised format"),
    "gguf only": (only("model.gguf"), r"holds only GGUF files \(model.gguf\)"),
    "pickles only": (only("pytorch_model.bin"), r"holds only pickled weights \(pytorch_model.bin\)"),
    "no weights": (only("model.txt"), "holds no weights"),
    "another shape": (configured(intermediate_size=64), r"has shape \[32, 48\], its config.json asks for \[32, 64\]"),
    "more layers": (configured(num_hidden_layers=5), "lacks 9 tensors"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "bitsandbytes": (configured(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
                     r"quantised checkpoint \(bitsandbytes\)"),
    "gptq": (configured(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised checkpoint \(gptq\)"),
    "mxfp4": (configured(quantization_config={"quant_method": "mxfp4"}), r"quantised checkpoint \(mxfp4\)"),
    "encoder": (configured(architectures=["BertForMaskedLM"]), "not a causal decoder"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_unsuitable_checkpoint_is_refused_with_the_cause(damage, folder):
    change, cause = DAMAGES[damage]
    change(folder)
    with pytest.raises(ModelError, match=cause):
        sweep(open_streamed(folder, device="cpu"), [])


def test_a_file_that_is_cut_off_after_opening_is_refused(folder):
    checkpoint = Checkpoint(folder)
    cut(folder)
    with pytest.raises(ModelError, match="ends inside tensor"):
        [checkpoint.read(name) for name in checkpoint]


def test_gguf_models_and_unknown_hub_names_are_refused(tmp_path, monkeypatch):
    from huggingface_hub import constants

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model\.gguf"):
        open_streamed(tmp_path / "model.gguf")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="unknown model 'nobody/nothing'"):
        open_streamed("nobody/nothing")


def test_a_model_in_the_cache_of_the_hub_is_opened(original, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    shutil.copytree(original, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert open_streamed("someone/tiny", device="cpu").anatomy.n_layers == 5
