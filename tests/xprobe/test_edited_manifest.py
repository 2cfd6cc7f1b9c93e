"""A manifest that somebody changed: readers are warned, and nothing makes the change look like xprobe's own."""

from __future__ import annotations

import warnings

import pytest

import xprobe
from xprobe.errors import RunFolderError
from xprobe.runs.folder import MANIFEST, RunFolder
from xprobe.study import train_probes

SMALL = {"batch_tokens": 500, "languages": ("en", "th"), "limit": 6, "bootstrap": 20, "probes": ()}


@pytest.fixture
def edited(tiny, tmp_path):
    out = tmp_path / "a run"
    study = xprobe.run(str(tiny), out=out, **SMALL)
    text = (out / MANIFEST).read_text(encoding="utf-8")
    name = f'"name": "{study.manifest.model.name}"'
    assert name in text
    (out / MANIFEST).write_text(text.replace(name, '"name": "Qwen/Qwen2.5-7B"'), encoding="utf-8")
    return out


def test_a_reader_is_warned(edited) -> None:
    with pytest.warns(UserWarning, match=r"manifest.json was changed after xprobe wrote it"):
        xprobe.load_study(edited)


def test_training_probes_is_refused_and_names_a_command_that_can_be_pasted(edited) -> None:
    before = (edited / MANIFEST).read_bytes()
    with pytest.raises(RunFolderError, match=r"was changed after .* `xprobe run --out '.*/a run' --resume`"):
        train_probes(edited, "language")
    assert (edited / MANIFEST).read_bytes() == before


def test_resuming_writes_what_is_true(edited, tiny) -> None:
    study = xprobe.run(str(tiny), out=edited, resume=True, **SMALL)
    assert study.manifest.model.name != "Qwen/Qwen2.5-7B"
    assert RunFolder(edited).manifest_is_untouched()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xprobe.load_study(edited)
