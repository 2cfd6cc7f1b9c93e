"""Tables of a finished run: only those that the run wrote are read, all others are written again from the shards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.families import save_tiny_model
from support.runs import raw_manifest, steady, write_signed

import xprobe
from xprobe.errors import RunFolderError
from xprobe.probes.settings import ProbeSettings
from xprobe.runs.folder import EXAMPLES, LAYERS, PROBE_TABLE, SHARDS, RunFolder
from xprobe.stages import states
from xprobe.study import train_probes

OPTIONS: dict[str, Any] = {
    "setting": ("en-x", "x-x"), "languages": ("en", "de"), "limit": 6, "bootstrap": 20, "permutations": 20,
}  # fmt: skip
TABLES = (LAYERS, EXAMPLES, PROBE_TABLE)
OTHER = ProbeSettings(n_components=3, folds=2)
SOME = ("alignment", "language")  # trained with OTHER they change every table


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    xprobe.run(str(tiny), out=out, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def probed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run after `xprobe probe` trained two probes with other settings."""
    out = shutil.copytree(finished, tmp_path_factory.mktemp("probed") / "run")
    train_probes(out, SOME, OTHER)
    return out


@pytest.fixture(scope="module")
def of_another_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    xprobe.run(str(save_tiny_model(folder / "model", seed=1)), out=folder / "run", **OPTIONS)
    return folder / "run"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "open_runner", lambda *_: pytest.fail("the model was loaded"))


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


def manifest(out: Path) -> dict[str, Any]:
    """All entries but those of the time, and the checksum that covers them."""
    return steady(raw_manifest(out))


def resume(tiny: Path, out: Path) -> None:
    xprobe.run(str(tiny), out=out, resume=True, **OPTIONS)


def rewrite(path: Path, change: str, of_another_model: Path) -> None:
    """Makes a table that can be read, and is not the one that the run wrote."""
    if change == "of another run":
        shutil.copy(of_another_model / path.name, path)
        return
    if change == "gone":
        path.unlink()
        return
    if change == "half":
        path.write_bytes(path.read_bytes()[:100])
        return
    table = pd.read_parquet(path)
    if change == "other columns":
        table = pd.DataFrame({"a": [1, 2]})
    elif change == "reversed":
        table = table.iloc[::-1]
    else:
        number = table.select_dtypes("number").columns[0]
        table[number] = table[number] + 1
    table.to_parquet(path, index=False)


CHANGES = ["other columns", "reversed", "values", "of another run", "gone", "half"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_the_run_did_not_write_is_refused_and_written_again(
    name: str, change: str, out: Path, finished: Path, of_another_model: Path, tiny: Path, no_model: None
) -> None:
    rewrite(out / name, change, of_another_model)
    with pytest.raises(RunFolderError, match=rf"{name}.* `xprobe run --out {out} --resume` writes it") as caught:
        xprobe.load_study(out)
    assert "\n" not in str(caught.value)
    resume(tiny, out)
    assert tables(out) == tables(finished)
    assert manifest(out) == manifest(finished)


def test_tables_written_again_hold_the_probes_that_were_trained_with_other_settings(
    probed: Path, tmp_path: Path, tiny: Path, no_model: None
) -> None:
    out = shutil.copytree(probed, tmp_path / "run")
    (out / PROBE_TABLE).write_bytes(b"")
    resume(tiny, out)
    assert tables(out) == tables(probed)
    assert xprobe.load_study(out).manifest.stages["probes"].results["trained"]["language"] == OTHER.to_dict()


def test_a_run_that_has_to_be_computed_again_keeps_the_settings_of_its_probes(
    probed: Path, tmp_path: Path, tiny: Path
) -> None:
    out = shutil.copytree(probed, tmp_path / "run")
    next((out / SHARDS).iterdir()).write_bytes(b"")
    resume(tiny, out)
    assert tables(out) == tables(probed)
    assert manifest(out) == manifest(probed)


@pytest.mark.parametrize("name", ["layers.parquet", "all"])
def test_a_probe_trained_on_a_run_with_stale_tables_writes_them_all_again(
    name: str, probed: Path, finished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    for table in TABLES if name == "all" else [name]:
        pd.DataFrame({"a": [1]}).to_parquet(out / table)
    train_probes(out, SOME, OTHER)
    assert tables(out) == tables(probed)
    assert manifest(out) == manifest(probed)


def test_probes_trained_again_one_by_one_give_the_tables_of_the_run(out: Path, finished: Path) -> None:
    for name in ("correctness", "alignment", "language"):
        train_probes(out, (name,))
    assert tables(out) == tables(finished)
    assert manifest(out) == manifest(finished)


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_process_killed_while_it_stores_probes_leaves_a_run_that_can_be_repaired(
    renamed: int, out: Path, probed: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest has its name, and of the tables the first ``renamed``."""
    real, left = Path.replace, [1 + renamed]

    def killed(self: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            train_probes(out, SOME, OTHER)
    with pytest.raises(RunFolderError, match="is not the table that this run wrote"):
        xprobe.load_study(out)
    other_way = shutil.copytree(out, out.with_name("copy"))
    resume(tiny, out)
    train_probes(other_way, SOME, OTHER)
    assert tables(out) == tables(other_way) == tables(probed)


def test_a_full_disk_leaves_the_probes_as_they_were(out: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pd.DataFrame.to_parquet

    def full(self: pd.DataFrame, path: Path, **options: Any) -> None:
        if PROBE_TABLE in str(path):
            raise OSError(28, "No space left on device")
        real(self, path, **options)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        train_probes(out, SOME, OTHER)
    monkeypatch.undo()
    assert manifest(out) == manifest(finished)
    assert tables(out) == tables(finished)
    assert not list(out.glob(".*.part"))


def test_a_run_of_a_version_without_checksums_of_tables_gets_them(
    out: Path, finished: Path, tiny: Path, no_model: None
) -> None:
    folder = RunFolder(out)
    entries = folder.read_finished()
    for stage in entries.stages.values():
        stage.tables = {}
    folder.write_manifest(entries)
    with pytest.raises(RunFolderError, match=r"holds no checksum of layers.parquet.*--resume` writes the tables"):
        xprobe.load_study(out)
    resume(tiny, out)
    assert manifest(out) == manifest(finished)


@pytest.mark.parametrize("damage", ["flipped", "cut", "swapped", "of another run", "gone", "no journal"])
def test_no_probe_is_trained_on_a_shard_that_the_run_did_not_write(
    damage: str, out: Path, finished: Path, of_another_model: Path, tiny: Path
) -> None:
    first, *_, last = sorted((out / SHARDS).iterdir())
    content = first.read_bytes()
    changed = [first.name]
    if damage == "flipped":
        first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        first.write_bytes(content[:-1])
    elif damage == "swapped":
        first.write_bytes(last.read_bytes())
        last.write_bytes(content)
        changed.append(last.name)
    elif damage == "of another run":
        shutil.copy(of_another_model / SHARDS / first.name, first)
    elif damage == "gone":
        first.unlink()
    else:
        (out / "journal.jsonl").unlink()
    with pytest.raises(RunFolderError, match=rf"this run wrote: `xprobe run --out {out} --resume` computes") as caught:
        train_probes(out, ("language",))
    assert all(name in str(caught.value) for name in changed)
    assert tables(out) == tables(finished)
    resume(tiny, out)
    assert tables(out) == tables(finished)
    train_probes(out, ("language",))


@pytest.mark.parametrize(("entry", "value", "there"), [("n_blocks", 9, 4), ("width", 7, 32), ("vocab_size", 2, "")])
def test_a_manifest_that_does_not_fit_the_shards_is_named(entry: str, value: int, there: Any, out: Path) -> None:
    entries = raw_manifest(out)
    entries["model"][entry] = value
    write_signed(out, entries)
    with pytest.raises(RunFolderError, match=rf"entry model.{entry} is {value}, the shards hold {there}"):
        train_probes(out, ("language",))


def test_groups_in_another_order_than_the_examples_are_refused(out: Path) -> None:
    entries = raw_manifest(out)
    write_signed(out, {**entries, "groups": entries["groups"][::-1]})
    with pytest.raises(RunFolderError, match=r"entry groups does not fit examples.parquet"):
        train_probes(out, ("language",))
