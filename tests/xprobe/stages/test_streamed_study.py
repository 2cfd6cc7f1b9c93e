"""A study made block by block gives what the study in memory gives, and reads the checkpoint once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.families import save_tiny_model
from support.runs import chosen_strategy, parity

import xprobe
from xprobe.capture import layerwise
from xprobe.errors import RunFolderError
from xprobe.models.streaming import streamed as streaming
from xprobe.runs.folder import RunFolder
from xprobe.stages.shards import read_signals

SMALL = {"batch_tokens": 500, "languages": ("en", "th", "zh"), "limit": 6, "probes": (), "bootstrap": 20}


def signals(study):
    return read_signals(RunFolder.open(study.path), study.manifest)[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "mixtral", "opt", "falcon"])
def test_a_streamed_study_equals_the_study_in_memory(family, tmp_path):
    model = save_tiny_model(tmp_path / "model", family)
    whole = xprobe.run(str(model), setting=("en-x", "x-x"), out=tmp_path / "whole", **SMALL)
    streamed = xprobe.run(str(model), setting=("en-x", "x-x"), out=tmp_path / "streamed", stream=True, **SMALL)
    ours, theirs = signals(streamed), signals(whole)
    for name in theirs:
        assert np.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4), name
    for shard in sorted((whole.path / "shards").iterdir()):
        mine, own = (RunFolder.open(s.path).read_shard(shard.name)[0] for s in (streamed, whole))
        assert np.allclose(mine["question_mean"], own["question_mean"], rtol=1e-4, atol=1e-4)
    assert parity(streamed) < 1e-3
    assert not list(streamed.path.glob(".rows-*"))


def test_every_byte_of_the_checkpoint_is_read_once(tiny, tmp_path, monkeypatch):
    opened = []
    real = streaming.open_streamed
    monkeypatch.setattr(streaming, "open_streamed", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    xprobe.run(str(tiny), out=tmp_path / "run", stream=True, **SMALL)
    (streamed,) = opened
    assert streamed.checkpoint.bytes_read == streamed.nbytes
    size = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    assert streamed.nbytes == pytest.approx(size, rel=0.05)  # the file has a header besides


def test_a_model_that_cannot_be_packed_is_streamed_plainly_with_a_warning(tmp_path):
    events = []
    model = save_tiny_model(tmp_path / "model", "bloom")
    study = xprobe.run(str(model), out=tmp_path / "run", stream=True, progress=events.append, **SMALL)
    assert any("cannot be run with prompts packed as a tree" in str(event) for event in events)
    assert chosen_strategy(study) == "plain"


def test_a_resumed_sweep_computes_what_is_missing(tiny, tmp_path):
    first = xprobe.run(str(tiny), out=tmp_path / "run", stream=True, **SMALL)
    shards = sorted((first.path / "shards").iterdir())
    before = {shard.name: shard.read_bytes() for shard in shards}
    shards[0].unlink()
    again = xprobe.run(str(tiny), out=tmp_path / "run", stream=True, resume=True, **SMALL)
    assert {shard.name: shard.read_bytes() for shard in (again.path / "shards").iterdir()} == before


def test_a_sweep_that_was_stopped_before_its_end_begins_again(tiny, tmp_path):
    """As SIGKILL leaves the folder in the middle of the sweep: parity is not known, rows lie about."""
    first = xprobe.run(str(tiny), out=tmp_path / "run", stream=True, **SMALL)
    folder = RunFolder.open(first.path)
    before = {shard.name: shard.read_bytes() for shard in (first.path / "shards").iterdir()}
    for path in [*(first.path / "shards").iterdir(), *first.path.glob("*.parquet"), first.path / "journal.jsonl"]:
        path.unlink()
    manifest = folder.read_run()
    manifest.status = "running"
    manifest.stages = {"states": manifest.stages["states"]}
    manifest.stages["states"].results["parity_error"] = None
    folder.write_manifest(manifest)
    (first.path / ".rows-left").write_bytes(bytes(100))
    again = xprobe.run(str(tiny), out=tmp_path / "run", stream=True, resume=True, **SMALL)
    assert {shard.name: shard.read_bytes() for shard in (again.path / "shards").iterdir()} == before
    assert parity(again) < 1e-3
    assert not list(again.path.glob(".rows-*"))


def test_a_full_disk_is_reported_before_the_sweep(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layerwise.os, "posix_fallocate", full)
    space = layerwise._MappedBuffers(5, 32, torch.float32, tmp_path)
    with pytest.raises(RunFolderError, match=r"cannot keep .* GB of hidden rows .*No space left"):
        space.reserve({"answer": 1000, "question": 10})
    assert list(tmp_path.iterdir()) == []
