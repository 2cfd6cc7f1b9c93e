"""What --resume believes, what it computes again, and what it refuses, naming it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.families import save_tiny_model, write_set
from support.runs import contents, raw_manifest

import xprobe
from xprobe.config import Execution
from xprobe.errors import RunFolderError, UsageError, XprobeError
from xprobe.runs.folder import JOURNAL, MANIFEST, SHARDS, RunFolder

OPTIONS: dict[str, Any] = {
    "setting": ("en-x", "x-x"), "languages": ("en", "de"), "limit": 6, "bootstrap": 20, "permutations": 20,
    "probes": (),  # test_run_tables.py has those of runs with probes
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    xprobe.run(str(tiny), out=out, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def run_of_another_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    xprobe.run(str(save_tiny_model(folder / "model", seed=1)), out=folder / "run", **OPTIONS)
    return folder / "run"


@pytest.fixture(params=["running", "done"])
def out(request: pytest.FixtureRequest, finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, as it was left when it was finished or just before."""
    shutil.copytree(finished, tmp_path / "run")
    edit(tmp_path / "run", status=request.param)
    return tmp_path / "run"


def edit(out: Path, **entries: Any) -> None:
    """Changes entries of the manifest as xprobe would."""
    folder = RunFolder(out)
    folder.write_manifest(replace(folder.read_run(), **entries))


def scribble(out: Path, manifest: Any) -> None:
    """Changes the manifest as somebody else would."""
    (out / MANIFEST).write_text(json.dumps(manifest))


def files(out: Path) -> dict[str, Any]:
    return contents(out)


def shards(out: Path) -> list[Path]:
    return sorted((out / SHARDS).iterdir())


def resume(tiny: Path, out: Path, **changes: Any) -> list[str]:
    """Goes on with a run; the names of the shards that were computed."""
    before = {path.name: path.stat().st_ino for path in shards(out)}
    xprobe.run(str(changes.pop("model", tiny)), out=out, resume=True, **{**OPTIONS, **changes})
    return [path.name for path in shards(out) if path.stat().st_ino != before.get(path.name)]


def refuse(tiny: Path, out: Path, why: str, error: type[XprobeError] = UsageError, **changes: Any) -> None:
    """A refusal says why, and touches nothing."""
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    with pytest.raises(error, match=why):
        resume(tiny, out, **changes)
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in out.rglob("*") if path.is_file()} == before


# -- shards and journal ---------------------------------------------------------------------------------------------


def test_a_complete_run_computes_nothing(out: Path, tiny: Path, finished: Path) -> None:
    assert resume(tiny, out) == []
    assert files(out) == files(finished)


@pytest.mark.parametrize("damage", ["edited", "cut", "gone", "swapped", "of another run", "a folder's link"])
def test_only_a_shard_that_is_not_what_was_written_is_computed_again(
    damage: str, out: Path, tiny: Path, finished: Path, run_of_another_model: Path
) -> None:
    shard, other = shards(out)[2:4]
    content = shard.read_bytes()
    if damage == "edited":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        shard.write_bytes(content[:-1])
    elif damage == "swapped":
        shard.write_bytes(other.read_bytes())
    elif damage == "of another run":
        shutil.copy(run_of_another_model / SHARDS / shard.name, shard)
    else:
        shard.unlink()
        if damage == "a folder's link":
            shard.symlink_to(out)
    assert resume(tiny, out) == [shard.name]
    assert files(out) == files(finished)


def test_without_a_journal_all_shards_are_computed_again(out: Path, tiny: Path, finished: Path) -> None:
    (out / JOURNAL).unlink()
    assert resume(tiny, out) == [path.name for path in shards(out)]
    assert files(out) == files(finished)


@pytest.mark.parametrize(
    "extra",
    [
        b'{"shard": 3, "sha256": "x"}\n', b'{"shard": "../manifest.json", "sha256": null}\n', b"[" * 100_000 + b"\n",
        b'{"shard": "' + b"x" * 5000 + b'", "sha256": "0"}\n', b"\xff\x00\n", b'{"shard": "en-x', None,
    ],
    ids=["no name", "no checksum", "deep", "long name", "no text", "cut off", "every line twice"],
)  # fmt: skip
def test_journal_lines_that_are_broken_or_repeated_change_nothing(
    extra: bytes | None, out: Path, tiny: Path, finished: Path
) -> None:
    journal = out / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + (whole if extra is None else extra))
    assert resume(tiny, out) == []
    assert files(out) == files(finished)


def test_shards_and_journal_of_another_run_are_computed_again(
    out: Path, tiny: Path, finished: Path, run_of_another_model: Path
) -> None:
    names = [path.name for path in shards(out)]
    for name in names[:2]:
        shutil.copy(run_of_another_model / SHARDS / name, out / SHARDS / name)
    with (out / JOURNAL).open("ab") as journal:
        journal.write((run_of_another_model / JOURNAL).read_bytes())
    assert resume(tiny, out) == names[:2]
    assert files(out) == files(finished)


def test_temporary_files_of_a_killed_run_are_removed(out: Path, tiny: Path, finished: Path) -> None:
    for name in (".manifest.json.part", f"{SHARDS}/.gone.safetensors.part", ".lock"):
        (out / name).write_bytes(b"half")
    resume(tiny, out)
    assert files(out) == files(finished)


# -- what the run is made of ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"limit": 5}, "limit was 6 and is now 5"),
        ({"limit": None}, "limit was 6 and is now None"),
        ({"languages": ("de", "en")}, r"languages was \['en', 'de'\] and is now \['de', 'en'\]"),
        ({"languages": ("en",)}, r"languages was \['en', 'de'\] and is now \['en'\]"),
        ({"setting": "en-x"}, r"settings was \['en-x', 'x-x'\] and is now \['en-x'\]"),
        ({"seed": 1, "bootstrap": 21}, "seed was 0 and is now 1; bootstrap was 20 and is now 21"),
        ({"permutations": 21}, "permutations was 20"),
        ({"store_rows": False}, r"signals was .*; store_rows was True and is now False"),
        ({"dtype": "float64"}, "dtype was 'auto' and is now 'float64'"),
        ({"template": "plain"}, "template was 'auto' and is now 'plain'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_another_configuration_is_refused_with_every_difference(
    changes: dict[str, Any], why: str, out: Path, tiny: Path
) -> None:
    refuse(tiny, out, rf"cannot resume {out}: {why}.*\. Choose another out \(--out\)", **changes)


def test_the_size_of_a_batch_may_change(out: Path, tiny: Path) -> None:
    assert resume(tiny, out, batch_tokens=1024) == []


def test_a_model_whose_bytes_changed_is_refused_and_one_that_was_moved_is_not(
    out: Path, tiny: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert resume(tiny, out, model=moved) == []
    weights = moved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuse(tiny, out, r"model .*other bytes", model=moved)


@pytest.mark.parametrize("change", ["answer", "language added"])
def test_data_whose_bytes_changed_is_refused_and_data_that_was_moved_is_not(
    change: str, tiny: Path, tmp_path: Path
) -> None:
    texts = {"en": [("A b c.", "What?", "b"), ("D e f.", "Which?", "e")]}
    data, out = write_set(tmp_path / "data", texts), tmp_path / "run"
    xprobe.run(str(tiny), data=str(data), out=out)
    moved = shutil.move(data, tmp_path / "moved")
    xprobe.run(str(tiny), data=str(moved), out=out, resume=True)
    if change == "answer":
        write_set(Path(moved), {"en": [("A b c.", "What?", "c"), *texts["en"][1:]]})
    else:
        write_set(Path(moved), {"de": texts["en"]})
    with pytest.raises(UsageError, match=r"data .*other bytes"):
        xprobe.run(str(tiny), data=str(moved), out=out, resume=True)


def test_an_option_that_only_one_version_knows_is_a_difference(out: Path, tiny: Path) -> None:
    manifest = raw_manifest(out)
    study = manifest["study"]
    scribble(out, {**manifest, "study": {**study, "wavelets": 3}})
    refuse(tiny, out, "wavelets was 3, which this version of xprobe does not know")
    scribble(out, {**manifest, "study": {name: value for name, value in study.items() if name != "seed"}})
    refuse(tiny, out, "seed is now 0 and is missing in the manifest")


def test_a_run_resumed_on_another_device_keeps_its_dtype(tiny: Path, tmp_path: Path) -> None:
    """As on a GPU, where ``auto`` is the checkpoint's bfloat16: the other half on a CPU is bfloat16, too."""
    out = tmp_path / "run"
    begun = xprobe.run(str(tiny), out=out, **{**OPTIONS, "dtype": "bfloat16"})
    manifest = RunFolder(out).read_run()
    manifest.study, manifest.status = replace(manifest.study, dtype="auto"), "running"
    part = manifest.stages["states"].executions[0]
    part.device, part.options = "cuda:1", Execution(device="cuda:1")
    folder = RunFolder(out)
    journal = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    folder.write_manifest(manifest)
    key = RunFolder(out)._run_key
    (out / JOURNAL).write_text("".join(json.dumps({**line, "run": key}) + "\n" for line in journal))
    shards(out)[0].unlink()
    again = xprobe.run(str(tiny), out=out, resume=True, jobs=1, **OPTIONS)
    assert again.manifest.model.dtype == "bfloat16"
    assert again.layers.equals(begun.layers)
    first, second = again.manifest.stages["states"].executions
    assert (first.device, first.options.device, first.shards) == ("cuda:1", "cuda:1", len(shards(out)) - 1)
    assert (second.device, second.options.jobs, second.shards) == ("cpu", 1, 1)


def test_a_run_begun_in_memory_can_be_resumed_block_by_block(out: Path, tiny: Path, finished: Path) -> None:
    shards(out)[0].unlink()
    assert resume(tiny, out, stream=True) == [shards(out)[0].name]
    parts = RunFolder(out).read_finished().stages["states"].executions
    assert [(part.options.stream, part.shards) for part in parts] == [(False, len(shards(out)) - 1), (True, 1)]
    ours, theirs = (xprobe.load_study(path).layers for path in (out, finished))
    merged = ours.merge(theirs, on=["setting", "layer", "language", "signal"])
    assert len(merged) == len(theirs)
    assert (merged["value_x"] - merged["value_y"]).abs().max() < 1e-3


# -- the manifest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"format": 2, "stud', b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": 2}'])
def test_a_damaged_manifest_is_refused_and_named(content: bytes, out: Path, tiny: Path) -> None:
    (out / MANIFEST).write_bytes(content)
    refuse(tiny, out, rf"{out / MANIFEST}.*start it in a new folder", RunFolderError)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_run_of_another_format_is_refused_with_its_number(number: Any, out: Path, tiny: Path) -> None:
    scribble(out, {**raw_manifest(out), "format": number})
    refuse(tiny, out, f"is of run format {number}, this version of xprobe reads format 2", RunFolderError)


@pytest.mark.parametrize(("value", "shown"), [("2", '"2"'), (True, "true"), (2.0, "2.0"), (None, "null")])
def test_a_format_that_is_no_number_is_a_damaged_entry(value: Any, shown: str, out: Path, tiny: Path) -> None:
    scribble(out, {**raw_manifest(out), "format": value})
    refuse(tiny, out, f"entry format must be a whole number, is {shown}; the run cannot be used", RunFolderError)


def test_groups_removed_from_a_manifest_are_restored(out: Path, tiny: Path, finished: Path) -> None:
    manifest = raw_manifest(out)
    scribble(out, {**manifest, "groups": manifest["groups"][:-1]})
    assert resume(tiny, out) == []
    assert files(out) == files(finished)


def entries(manifest: dict[str, Any]) -> list[tuple[str, ...]]:
    """Where every entry and every entry's entry is."""
    inner = [(name, key) for name, value in manifest.items() if isinstance(value, dict) for key in value]
    return [(name,) for name in manifest] + inner


def spoil(manifest: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    holder = manifest if len(place) == 1 else manifest[place[0]]
    if value is KeyError:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value


MORE = [pytest.param(value, marks=pytest.mark.slow) for value in (None, 5, "x", [5])]


@pytest.mark.parametrize("value", [KeyError, {"x": 5}, *MORE], ids=str)
def test_any_wrong_entry_is_refused_or_written_again(value: Any, tiny: Path, finished: Path, tmp_path: Path) -> None:
    out, right = tmp_path / "run", files(finished)
    shutil.copytree(finished, out)
    original = (out / MANIFEST).read_text()
    came_out = 0
    for place in entries(json.loads(original)):
        manifest = json.loads(original)
        spoil(manifest, place, value)
        scribble(out, manifest)
        try:
            assert resume(tiny, out) == [], place
        except (UsageError, RunFolderError):
            continue
        came_out += 1
        found = files(out)
        allowed = {"study", "model", "data"} & {place[0]}  # names of model and data may be others
        assert {n: v for n, v in found.items() if n != MANIFEST} == {n: v for n, v in right.items() if n != MANIFEST}
        assert {n: v for n, v in found[MANIFEST].items() if n not in allowed} == {
            n: v for n, v in right[MANIFEST].items() if n not in allowed
        }, place
    assert came_out > 10


@pytest.mark.parametrize("name", ["merges.txt", "special.tiktoken", "modeling_own.py"])
def test_every_file_that_tokens_or_code_come_from_is_part_of_the_model(name: str, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / name).write_text("one")
    out = tmp_path / "run"
    xprobe.run(str(folder), languages=("en",), limit=1, out=out)
    (folder / name).write_text("two")
    with pytest.raises(UsageError, match=r"model .*other bytes"):
        xprobe.run(str(folder), languages=("en",), limit=1, out=out, resume=True)
