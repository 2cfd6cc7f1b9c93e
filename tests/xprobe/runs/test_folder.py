"""A run folder holds whole files or none, and knows which of its shards can be trusted."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from xprobe.config import Execution, StudyConfig
from xprobe.errors import RunFolderError, UsageError
from xprobe.runs.folder import JOURNAL, LAYERS, MANIFEST, SHARDS, RunFolder
from xprobe.runs.manifest import FORMAT, ExecutionEntry, Manifest, StageEntry

GROUPS = ("en-x/en/a000p000", "en-x/en/a000p001", "x-x/de/a000p000")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def tensors(seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        "rank": generator.integers(0, 50_000, size=(5, 9)).astype(np.int32),
        "logit": generator.normal(size=(5, 9)).astype(np.float32),
        "offsets": torch.tensor([0, 2, 5]),
    }


def fill(folder: RunFolder) -> list[str]:
    """Writes one shard per group; returns their names."""
    for seed, group in enumerate(GROUPS):
        folder.write_shard(group, tensors(seed), {"examples": [{"question_id": f"q{seed}"}]})
    return [folder.shard_name(group) for group in GROUPS]


def everything(path: Path) -> list[str]:
    """Every file below ``path``, hidden ones included."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


# -- making and opening ---------------------------------------------------------------------------------------------


def test_create_makes_the_folder_with_its_parents(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a" / "b")
    assert folder.path == tmp_path / "a" / "b"
    assert (folder.path / SHARDS).is_dir()
    assert everything(tmp_path) == []


def test_create_takes_an_empty_folder(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path).path == tmp_path


def test_create_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"is not empty: choose another out \(--out\), or resume"):
        RunFolder.create(tmp_path)
    assert everything(tmp_path) == ["thesis.tex"]
    assert not (tmp_path / SHARDS).exists()


def test_create_refuses_a_run_unless_it_is_resumed(folder: RunFolder) -> None:
    folder.write_manifest(Manifest(study=StudyConfig(seed=5)))
    with pytest.raises(UsageError, match="is not empty"):
        RunFolder.create(folder.path)
    assert RunFolder.create(folder.path, resume=True).read_run().study.seed == 5


def test_resume_refuses_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=rf"holds no run to resume \(no {MANIFEST}\)"):
        RunFolder.create(tmp_path, resume=True)
    assert everything(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("exists", [False, True])
def test_resume_in_a_new_folder_begins_a_run(exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "run").mkdir()
    folder = RunFolder.create(tmp_path / "run", resume=True)
    assert (folder.path / SHARDS).is_dir()
    assert not folder.has_manifest()


@pytest.mark.parametrize("resume", [False, True])
def test_create_refuses_a_file(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(UsageError, match=r"is a file: out \(--out\) must be a folder"):
        RunFolder.create(tmp_path / "run", resume=resume)


def test_create_below_a_file_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match=re.escape(f"cannot write {tmp_path / 'file' / 'run'}")):
        RunFolder.create(tmp_path / "file" / "run")


def test_open_takes_only_a_folder_with_a_manifest(folder: RunFolder) -> None:
    with pytest.raises(UsageError, match=f"is not a run folder: it holds no {MANIFEST}"):
        RunFolder.open(folder.path)
    with pytest.raises(UsageError, match="is not a run folder"):
        RunFolder.open(folder.path / "nowhere")
    folder.write_manifest(Manifest())
    assert RunFolder.open(folder.path) == folder


# -- manifest -------------------------------------------------------------------------------------------------------


def test_a_manifest_comes_back_as_it_was_written(folder: RunFolder) -> None:
    entry = StageEntry([ExecutionEntry(Execution(device="cpu"), "cpu", {}, "a1", 3)], {"load": 1.25})
    manifest = Manifest(stages={"states": entry}, other={"note": "Köln 塔"})
    folder.write_manifest(manifest)
    assert folder.read_run() == manifest
    assert "Köln 塔" in (folder.path / MANIFEST).read_text(encoding="utf-8")
    assert not RunFolder(folder.path / "other").has_manifest()


@pytest.mark.parametrize("number", [0, FORMAT + 1])
def test_a_manifest_of_another_format_is_refused_with_both_numbers(number: Any, folder: RunFolder) -> None:
    (folder.path / MANIFEST).write_text(json.dumps({"format": number, "environment": {"xprobe": "0.0.9"}}))
    with pytest.raises(RunFolderError, match=rf"of run format {number}, this version of xprobe reads format {FORMAT}: "
                       "read it with xprobe 0.0.9, which wrote it, or start the run in a new folder"):  # fmt: skip
        folder.read_run()


def test_a_manifest_without_a_format_is_refused(folder: RunFolder) -> None:
    (folder.path / MANIFEST).write_text('{"status": "done"}')
    with pytest.raises(
        RunFolderError, match=r"entry format must be a whole number, is missing; the run cannot be used"
    ):
        folder.read_run()


@pytest.mark.parametrize("content", [b"", b'{"format": 2, "stud', b"[]", b"null", b"\xff\xfe", b"1"])
def test_a_broken_manifest_is_an_error_that_names_it(content: bytes, folder: RunFolder) -> None:
    (folder.path / MANIFEST).write_bytes(content)
    with pytest.raises(RunFolderError, match=re.escape(str(folder.path / MANIFEST))):
        folder.read_run()


# -- atomic writes --------------------------------------------------------------------------------------------------


class Unwritable:
    """Stands in for a data frame whose writing fails half-way."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def to_parquet(self, path: Path, index: bool) -> None:
        Path(path).write_bytes(b"PAR1 half a tab")
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), RunFolderError),
        (ValueError("bad column"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full disk", "error", "interrupt"],
)
def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(
    error: BaseException, raised: type[BaseException], folder: RunFolder
) -> None:
    old = pd.DataFrame({"layer": [0, 1], "value": [0.5, 0.75]})
    folder.write_table(LAYERS, old)
    before = everything(folder.path)
    with pytest.raises(raised):
        folder.write_table(LAYERS, Unwritable(error))
    assert everything(folder.path) == before == [LAYERS]
    pd.testing.assert_frame_equal(folder.read_table(LAYERS), old)


def test_a_full_disk_is_an_error_that_says_what_to_do(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=r"No space left on device; make room, or use a folder on another disk"):
        folder.write_table(LAYERS, Unwritable(OSError(28, "No space left on device")))


@pytest.mark.parametrize("step", ["write", "replace"])
def test_failed_writes_leave_no_temporary_file_and_no_journal_line(
    step: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_manifest(Manifest())
    (name,) = [fill(folder)[0]]
    before = {file: (folder.path / file).read_bytes() for file in everything(folder.path)}

    def fail_to_write(_: Any, path: Path, *__: Any) -> None:
        path.open("wb").write(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def fail(self: Path, *_: Any) -> None:
        if step == "write":
            self.open("wb").write(b"half")
        raise OSError(28, "No space left on device")

    if step == "write":
        monkeypatch.setattr("safetensors.torch.save_file", fail_to_write)
    monkeypatch.setattr(Path, "write_bytes" if step == "write" else step, fail)
    with pytest.raises(RunFolderError):
        folder.write_manifest(Manifest(status="done"))
    with pytest.raises(RunFolderError):
        folder.write_shard(GROUPS[0], tensors(9), {})
    with pytest.raises(RunFolderError):
        folder.write_shard("x-x/zh/new", tensors(9), {})
    monkeypatch.undo()
    assert {file: (folder.path / file).read_bytes() for file in everything(folder.path)} == before
    assert name in folder.finished_shards()
    assert folder.read_run().status == "running"


def test_complete_writes_leave_no_temporary_file(folder: RunFolder) -> None:
    folder.write_manifest(Manifest())
    names = fill(folder)
    folder.write_table(LAYERS, pd.DataFrame({"layer": [0]}))
    folder.write_bytes("report.html", b"<html>")
    assert everything(folder.path) == sorted(
        [MANIFEST, JOURNAL, LAYERS, "report.html", *(f"{SHARDS}/{n}" for n in names)]
    )


# -- shards ---------------------------------------------------------------------------------------------------------


def test_a_shard_comes_back_as_it_was_written(folder: RunFolder) -> None:
    written = {
        **tensors(),
        "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "short": torch.ones(2, dtype=torch.int16),
    }
    metadata = {"examples": [{"question_id": "q1", "language": "塔", "spans": {"question": [3, 9]}}], "note": None}
    folder.write_shard(GROUPS[0], written, metadata)
    arrays, found = folder.read_shard(folder.shard_name(GROUPS[0]))
    assert found == {"group": GROUPS[0], **metadata}
    assert set(arrays) == set(written)
    for name in ("rank", "logit"):
        np.testing.assert_array_equal(arrays[name], written[name])
        assert arrays[name].dtype == written[name].dtype
    np.testing.assert_array_equal(arrays["offsets"], [0, 2, 5])
    np.testing.assert_array_equal(arrays["half"], np.array([1.5, -2.25], np.float32))
    assert (arrays["half"].dtype, arrays["short"].dtype) == (np.float32, np.int16)


def test_only_the_arrays_asked_for_are_read(folder: RunFolder) -> None:
    folder.write_shard(GROUPS[0], tensors(), {})
    assert list(folder.read_shard(folder.shard_name(GROUPS[0]), ("rank",))[0]) == ["rank"]
    with pytest.raises(RunFolderError, match=r"cannot read .*--resume` computes it again"):
        folder.read_shard(folder.shard_name(GROUPS[0]), ("nothing",))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3).T,
        np.arange(12.0).reshape(3, 4)[:, ::2],
        np.arange(4.0)[::-1],
        torch.arange(6.0).reshape(2, 3).T,
    ],
    ids=["transposed", "strided", "reversed", "transposed tensor"],
)
def test_arrays_of_any_memory_layout_are_stored(array: Any, folder: RunFolder) -> None:
    folder.write_shard(GROUPS[0], {"a": array}, {})
    np.testing.assert_array_equal(folder.read_shard(folder.shard_name(GROUPS[0]))[0]["a"], np.asarray(array))


def test_groups_have_distinct_names_without_folders(folder: RunFolder) -> None:
    names = [folder.shard_name(group) for group in GROUPS]
    assert len(set(names)) == len(GROUPS)
    assert not any("/" in name for name in names)


def test_finished_shards_are_listed_in_the_order_written(folder: RunFolder) -> None:
    assert folder.finished_shards() == []
    assert fill(folder) == folder.finished_shards()


def test_the_journal_holds_the_checksum_of_every_shard(folder: RunFolder) -> None:
    names = fill(folder)
    entries = [json.loads(line) for line in (folder.path / JOURNAL).read_text().splitlines()]
    assert [entry["shard"] for entry in entries] == names
    for entry in entries:
        content = (folder.path / SHARDS / entry["shard"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "gone", "empty"])
def test_a_shard_whose_bytes_were_changed_is_not_finished(damage: str, folder: RunFolder) -> None:
    names = fill(folder)
    path = folder.path / SHARDS / names[1]
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        changed = {
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "cut": content[:-1],
            "longer": content + b"\0",
            "empty": b"",
        }
        path.write_bytes(changed[damage])
    assert folder.finished_shards() == [names[0], names[2]]


def test_a_shard_written_again_is_finished_again_and_listed_once(folder: RunFolder) -> None:
    names = fill(folder)
    (folder.path / SHARDS / names[1]).write_bytes(b"damaged")
    folder.write_shard(GROUPS[1], tensors(7), {})
    assert sorted(folder.finished_shards()) == sorted(names)
    np.testing.assert_array_equal(folder.read_shard(names[1])[0]["rank"], tensors(7)["rank"])


def test_a_shard_that_the_journal_does_not_know_is_not_finished(folder: RunFolder) -> None:
    names = fill(folder)
    (folder.path / SHARDS / "stray.safetensors").write_bytes((folder.path / SHARDS / names[0]).read_bytes())
    assert folder.finished_shards() == names


@pytest.mark.parametrize("keep", [1, 30, -2])
def test_a_shard_whose_journal_line_was_cut_is_not_finished(keep: int, folder: RunFolder) -> None:
    names = fill(folder)
    lines = (folder.path / JOURNAL).read_text().splitlines(keepends=True)
    (folder.path / JOURNAL).write_text("".join(lines[:2]) + lines[2].rstrip("\n")[:keep])
    assert folder.finished_shards() == names[:2]


def test_shards_written_after_a_cut_journal_line_are_finished(folder: RunFolder) -> None:
    names = fill(folder)
    journal = folder.path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])  # killed while writing the last line
    assert folder.finished_shards() == names[:2]
    folder.write_shard(GROUPS[2], tensors(2), {})
    assert folder.finished_shards() == names


@pytest.mark.parametrize(
    "line", ["", "[]", "3", "null", '"x"', "{}", '{"shard": "a"}', '{"shard": ["a"], "sha256": "b"}', "{"]
)
def test_journal_lines_without_a_shard_are_ignored(line: str, folder: RunFolder) -> None:
    names = fill(folder)
    lines = (folder.path / JOURNAL).read_text().splitlines()
    (folder.path / JOURNAL).write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    assert folder.finished_shards() == names


def test_broken_bytes_in_the_journal_leave_the_other_lines_valid(folder: RunFolder) -> None:
    names = fill(folder)
    lines = (folder.path / JOURNAL).read_bytes().splitlines()
    (folder.path / JOURNAL).write_bytes(b"\n".join([lines[0], b"\xff\x80\x00", *lines[1:]]) + b"\n")
    assert folder.finished_shards() == names


@pytest.mark.parametrize("content", [b"", b"not a shard", b"\xff" * 100])
def test_reading_a_broken_shard_is_an_error_that_names_it(content: bytes, folder: RunFolder) -> None:
    name = fill(folder)[0]
    (folder.path / SHARDS / name).write_bytes(content)
    with pytest.raises(RunFolderError, match=rf"cannot read .*{re.escape(name)}.*--resume"):
        folder.read_shard(name)


def test_reading_a_missing_shard_is_an_error_that_names_it(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=r"cannot read .*none\.safetensors"):
        folder.read_shard("none.safetensors")


# -- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_as_it_was_written(folder: RunFolder) -> None:
    frame = pd.DataFrame({"language": ["en", "th"], "value": [0.5, np.nan], "n": [3, 4], "phased": [True, False]})
    folder.write_table(LAYERS, frame)
    pd.testing.assert_frame_equal(folder.read_table(LAYERS), frame)


def test_a_missing_table_is_an_error_that_names_the_command_that_writes_it(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=rf"holds no {LAYERS}: .*--resume"):
        folder.read_table(LAYERS)


@pytest.mark.parametrize("content", [b"", b"PAR1 half a tab"])
def test_a_broken_table_is_an_error_that_names_it(content: bytes, folder: RunFolder) -> None:
    (folder.path / LAYERS).write_bytes(content)
    with pytest.raises(RunFolderError, match=re.escape(LAYERS)):
        folder.read_table(LAYERS)
