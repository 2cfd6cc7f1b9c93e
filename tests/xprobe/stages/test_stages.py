"""Stages beside the three that every run has: what they enter, and what becomes of it."""

from __future__ import annotations

import pandas as pd
import pytest

import xprobe
from xprobe.config import Execution
from xprobe.errors import RunFolderError, UsageError
from xprobe.events import CallerNotify
from xprobe.runs.folder import RunFolder
from xprobe.runs.manifest import Manifest, StageEntry
from xprobe.stages.run import Run
from xprobe.study import train_probes
from xprobe.timing import Stopwatch

SMALL = {"batch_tokens": 500, "languages": ("en", "th"), "limit": 6, "bootstrap": 20, "probes": ()}


@pytest.mark.parametrize("damage", ["edited", "gone"])
def test_a_table_of_any_stage_is_checked_when_it_is_read(damage, tiny, tmp_path):
    out = tmp_path / "run"
    xprobe.run(str(tiny), out=out, **SMALL)
    folder = RunFolder(out)
    manifest = folder.read_finished()
    digest = folder.write_table("lengths.parquet", pd.DataFrame({"language": ["en"], "correlation": [0.5]}))
    manifest.stages["lengths"] = StageEntry(tables={"lengths.parquet": digest})
    folder.write_manifest(manifest)
    assert xprobe.load_study(out).table("lengths.parquet")["correlation"].tolist() == [0.5]
    if damage == "edited":
        folder.write_table("lengths.parquet", pd.DataFrame({"language": ["en"], "correlation": [0.9]}))
    else:
        (out / "lengths.parquet").unlink()
    message = {"edited": "is not the table that the stage 'lengths' of this run", "gone": "is not there"}[damage]
    with pytest.raises(RunFolderError, match=f"lengths.parquet {message}"):
        xprobe.load_study(out).table("lengths.parquet")
    with pytest.raises(UsageError, match=r"no stage of this run wrote 'other.parquet'; there are: layers.parquet"):
        xprobe.load_study(out).table("other.parquet")
    train_probes(out, "language")  # a table of another stage stops nothing
    seen: list = []
    study = xprobe.run(str(tiny), out=out, resume=True, progress=seen.append, **{**SMALL, "probes": ()})
    assert "lengths" not in study.manifest.stages
    assert not (out / "lengths.parquet").exists()
    (note,) = [event for event in seen if "'lengths'" in str(event)]
    assert note.important
    assert str(note) == "the stage 'lengths' has lost a table, or one was changed: compute it again"


def test_what_later_stages_made_of_lost_shards_goes_with_them(tiny, tmp_path):
    out, seen = tmp_path / "run", []
    xprobe.run(str(tiny), out=out, **SMALL)
    folder = RunFolder(out)
    manifest = folder.read_finished()
    digest = folder.write_table("lengths.parquet", pd.DataFrame({"language": ["en"], "correlation": [0.5]}))
    manifest.stages["lengths"] = StageEntry(tables={"lengths.parquet": digest})
    folder.write_manifest(manifest)
    next((out / "shards").iterdir()).unlink()
    study = xprobe.run(str(tiny), out=out, resume=True, progress=seen.append, **SMALL)
    assert "lengths" not in study.manifest.stages
    assert not (out / "lengths.parquet").exists()
    assert any("the stage 'lengths' was computed from shards that are gone" in str(event) for event in seen)


def test_a_stage_enters_itself_only_if_the_run_has_what_it_needs(tmp_path):
    run = Run(RunFolder(tmp_path), Manifest(), Execution(), CallerNotify(None))
    with pytest.raises(UsageError, match=r"unknown stage 'no-such-stage': enter it in xprobe.stages.STAGES"):
        run.entry("no-such-stage", Stopwatch())
    with pytest.raises(UsageError, match=r"the stage 'probes' needs the stage 'states', which .* lacks"):
        run.entry("probes", Stopwatch())


def test_a_stage_cannot_enter_the_table_of_another_stage(tiny, tmp_path):
    out = tmp_path / "run"
    xprobe.run(str(tiny), out=out, **SMALL)
    run = Run(RunFolder(out), RunFolder(out).read_finished(), Execution(), CallerNotify(None))
    with pytest.raises(UsageError, match=r"'probes' cannot enter layers.parquet: it is a table of the stage 'phases'"):
        run.entry("probes", Stopwatch(), tables={"layers.parquet": "0"})
    run.entry("phases", Stopwatch(), tables={"layers.parquet": "0"})  # its own
