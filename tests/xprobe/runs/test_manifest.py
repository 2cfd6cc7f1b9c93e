"""A manifest is written and read without loss, also one that another version began; other formats are refused."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from xprobe_cli.main import main

import xprobe
from xprobe.config import Execution, StudyConfig
from xprobe.errors import RunFolderError
from xprobe.runs.folder import JOURNAL, MANIFEST, RunFolder
from xprobe.runs.identity import execution_key
from xprobe.runs.manifest import FORMAT, Counts, DataEntry, ExecutionEntry, Manifest, ModelEntry, StageEntry
from xprobe.study import train_probes

GPU = Execution(device="cuda:0", batch_tokens=8192)
SPREAD = Execution(device_map={"model.layers.0": 0, "lm_head": "disk"})
STATES = StageEntry(
    [
        ExecutionEntry(GPU, "cuda:0", {"xprobe": "0.2.0"}, "a1", 3, "tree", ["a smaller batch"]),
        ExecutionEntry(SPREAD, "cuda:0", {"xprobe": "0.2.1"}, "b2", 2),
    ],
    {"load": 1.5, "forward": 12.25},
    ["a smaller batch"],
    {},
    {"plan": {"strategy": "tree", "waves": 2}, "parity_error": 1e-5},
)
PHASES = StageEntry(
    [ExecutionEntry(Execution(device="cpu"), "cpu", {"xprobe": "0.2.1"})],
    {"phases": 0.5},
    ["few paragraphs"],
    {"layers.parquet": "a" * 64},
    {"settings": {"en-x": {"n": 4}}},
)
FULL = Manifest(
    status="done",
    created="2026-11-26T12:00:00+00:00",
    directory="/home/user",
    places={"template": "/home/user/wording.toml"},
    study=StudyConfig(seed=3, languages=("en", "de"), settings=("x-x",)),
    model=ModelEntry(
        "m", "hub", "/m", "f" * 64, "tensors", "llama", 6, 48, 260, "bfloat16", 512, {"head": "lm_head"}, "e" * 64,
        0.5, 30.0,
    ),
    data=DataEntry("xquad", ["xquad.en.json"], "d" * 64, "e" * 64, "f" * 40),
    template_sha256="c" * 64,
    lens_sha256="d" * 64,
    selection={"limit": 4, "rule": 1},
    prompt={"template": "auto", "chat": True},
    counts=Counts(8, 20, 2, 3, {"too long": 1}, {"no answer": 2}),
    left_out={"records": ["xquad.en.json: q1"], "examples": []},
    groups=["x-x/en/p0", "x-x/de/p0"],
    total_seconds=20.75,
    stages={"states": STATES, "phases": PHASES},
    other={"wavelets": {"n": [1, 2]}},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def through_json(manifest: Manifest) -> Manifest:
    return Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())))


def raw(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / MANIFEST).read_text())


# -- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", [Manifest(), FULL], ids=["empty", "full"])
def test_a_manifest_comes_back_from_json(manifest: Manifest) -> None:
    again = through_json(manifest)
    assert again == manifest
    assert again.to_dict() == json.loads(json.dumps(manifest.to_dict()))


@pytest.mark.parametrize(
    ("full", "same"),
    [
        (FULL, {"format", "study_as_read"}),
        (FULL.model, set()),
        (FULL.data, set()),
        (FULL.counts, set()),
        (STATES, {"tables"}),
        (PHASES, set()),
        (STATES.executions[0], set()),
    ],
    ids=["manifest", "model", "data", "counts", "states", "phases", "execution"],
)
def test_every_entry_of_the_full_example_differs_from_its_default(full: Any, same: set[str]) -> None:
    """Else an entry that is lost on the way would come back as its default, and nobody would see it."""
    default = type(full)()
    assert {f.name for f in fields(full) if getattr(full, f.name) == getattr(default, f.name)} == same


def test_entries_are_read_as_objects_of_their_classes() -> None:
    read = through_json(FULL)
    assert read.model.softcap == 30.0
    assert read.study.languages == ("en", "de")
    first, second = read.stages["states"].executions
    assert (first.options, first.shards) == (GPU, 3)
    assert (second.options.device_map, second.shards) == ({"model.layers.0": 0, "lm_head": "disk"}, 2)


def test_warnings_and_seconds_are_those_of_all_stages_in_order() -> None:
    assert FULL.warnings == ["a smaller batch", "few paragraphs"]
    assert FULL.seconds == {"load": 1.5, "forward": 12.25, "phases": 0.5}


def test_manifests_share_no_entries() -> None:
    one, other = Manifest(), Manifest()
    one.groups.append("en-x/en/p0")
    one.stages["states"] = StageEntry()
    one.stages["states"].warnings.append("a smaller batch")
    one.model.modules["head"] = "lm_head"
    assert other == Manifest.from_dict({})
    assert StageEntry().warnings == []


# -- executions -----------------------------------------------------------------------------------------------------


def test_an_execution_is_named_after_its_options_its_device_and_its_versions() -> None:
    options = Execution().to_dict()
    name = execution_key(options, "cpu", {"xprobe": "0.2.0"})
    assert name == execution_key(Execution().to_dict(), "cpu", {"xprobe": "0.2.0"})
    others = [
        execution_key(Execution(batch_tokens=100).to_dict(), "cpu", {"xprobe": "0.2.0"}),
        execution_key(options, "cuda:0", {"xprobe": "0.2.0"}),
        execution_key(options, "cpu", {"xprobe": "0.2.1"}),
    ]
    assert len({name, *others}) == 4


def test_the_folder_counts_the_shards_of_each_execution(folder: RunFolder) -> None:
    groups = [f"en-x/en/p{number}" for number in range(5)]
    folder.write_manifest(Manifest(groups=groups))
    for group, execution in zip(groups[:4], ("a", "a", "b", "a"), strict=True):
        folder.write_shard(group, {"a": np.zeros(2)}, {}, execution)
    assert folder.shards_by_execution(groups) == {"a": 3, "b": 1}
    folder.write_shard(groups[0], {"a": np.ones(2)}, {}, "b")  # computed again: it is of the last one that wrote it
    assert folder.shards_by_execution(groups) == {"a": 2, "b": 2}
    assert folder.shards_by_execution(groups[3:]) == {"a": 1}


def test_a_journal_line_without_an_execution_is_counted_for_no_execution(folder: RunFolder) -> None:
    folder.write_manifest(Manifest())
    folder.write_shard("en-x/en/p0", {"a": np.zeros(2)}, {})
    line = json.loads((folder.path / JOURNAL).read_text())
    del line["execution"]
    (folder.path / JOURNAL).write_text(json.dumps(line) + "\n")
    assert folder.shards_by_execution(["en-x/en/p0"]) == {}
    assert folder.holds(["en-x/en/p0"])


# -- entries of another version -------------------------------------------------------------------------------------


def test_unknown_entries_are_kept_but_not_the_checksum(folder: RunFolder) -> None:
    folder.write_manifest(FULL)
    read = folder.read_run()
    assert read.other == {"wavelets": {"n": [1, 2]}}
    folder.write_manifest(replace(read, status="running"))
    assert raw(folder)["wavelets"] == {"n": [1, 2]}
    assert folder.manifest_is_untouched()


@pytest.mark.parametrize(
    "place",
    [("model",), ("data",), ("counts",), ("stages", "states"), ("stages", "states", "executions", 0)],
    ids=lambda place: str(place[-1]),
)
def test_unknown_entries_inside_known_ones_are_ignored(place: tuple[Any, ...]) -> None:
    values = json.loads(json.dumps(FULL.to_dict()))
    holder = values
    for key in place:
        holder = holder[key]
    holder["colour"] = "red"
    assert Manifest.from_dict(values) == FULL


def test_an_unknown_option_of_an_execution_is_ignored() -> None:
    values = json.loads(json.dumps(FULL.to_dict()))
    values["stages"]["states"]["executions"][1]["options"] |= {"warp": 9}
    assert Manifest.from_dict(values).stages["states"].executions[1].options == SPREAD


@pytest.mark.parametrize(
    "change",
    [
        lambda study: study.update(wavelets=3),
        lambda study: study.pop("strict"),
        lambda study: study.update(signals=None),
        lambda study: study.update(languages=["en", "en"]),
    ],
    ids=["unknown option", "option not known then", "default not filled in", "repeat not dropped"],
)
def test_a_study_of_another_version_is_written_as_it_was_read_and_its_shards_stay_its_own(
    change: Any, folder: RunFolder
) -> None:
    folder.write_manifest(Manifest())
    values = raw(folder)
    change(values["study"])
    (folder.path / MANIFEST).write_text(json.dumps(values))
    name = folder.shard_name("en-x/en/p0")
    RunFolder(folder.path).write_shard("en-x/en/p0", {"a": np.zeros(2)}, {})
    again = RunFolder(folder.path)
    again.write_manifest(again.read_run())
    assert raw(folder)["study"] == values["study"]
    assert again.finished_shards() == [name]


def test_changes_of_a_study_that_was_read_are_written(folder: RunFolder) -> None:
    values = json.loads(json.dumps(FULL.to_dict()))
    values["study"] |= {"wavelets": 3}
    read = Manifest.from_dict(values)
    read.study = replace(read.study, seed=0, languages=None)
    assert read.to_dict()["study"] == {**values["study"], "seed": 0, "languages": None}


# -- other formats --------------------------------------------------------------------------------------------------

FORMAT_1 = {
    "format": 1, "status": "done", "config": {"model": "m", "seed": 0}, "model": {"name": "m", "n_blocks": 6},
    "environment": {"xprobe": "0.1.0", "torch": "2.8.0"}, "timings": {"total": 3.5}, "results": {}, "sha256": "0" * 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "use",
    [
        xprobe.load_study,
        train_probes,
        lambda out: RunFolder(out).read_run(),
        lambda out: RunFolder(out).read_finished(),
        lambda out: RunFolder(out).is_finished(),
    ],
    ids=["load_study", "train_probes", "read_run", "read_finished", "is_finished"],
)
def test_a_run_of_format_1_is_refused_with_the_version_that_wrote_it(use: Any, folder: RunFolder) -> None:
    (folder.path / MANIFEST).write_text(json.dumps(FORMAT_1))
    words = (
        f"{folder.path / MANIFEST} is of run format 1, this version of xprobe reads format {FORMAT}: "
        "read it with xprobe 0.1.0, which wrote it, or start the run in a new folder"
    )
    with pytest.raises(RunFolderError, match=f"^{re.escape(words)}$"):
        use(folder.path)


@pytest.mark.parametrize("command", ["probe", "resume"])
def test_commands_refuse_a_run_of_format_1_in_one_line_and_leave_it_alone(
    command: str, folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps(FORMAT_1)
    (folder.path / MANIFEST).write_text(text)
    out = str(folder.path)
    assert main(["probe", out] if command == "probe" else ["run", "--out", out, "--resume"]) == 1
    err = capsys.readouterr().err
    assert "read it with xprobe 0.1.0" in err
    assert err.count("\n") == 1
    assert (folder.path / MANIFEST).read_text() == text


@pytest.mark.parametrize("environment", [None, [], {}, {"xprobe": None}, {"xprobe": 1}], ids=str)
def test_a_manifest_without_its_version_is_refused_without_naming_one(environment: Any, folder: RunFolder) -> None:
    (folder.path / MANIFEST).write_text(json.dumps({**FORMAT_1, "environment": environment}))
    with pytest.raises(RunFolderError, match="read it with the version that wrote it, or start"):
        folder.read_run()
