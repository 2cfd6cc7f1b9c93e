"""A manifest that was edited by hand: nothing shows it, and no command gives it a valid checksum."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import raw_manifest
from xprobe_cli.main import main

import xprobe
from xprobe.errors import RunFolderError, UsageError
from xprobe.runs.folder import JOURNAL, MANIFEST, RunFolder
from xprobe.study import train_probes

OPTIONS: dict[str, Any] = {
    "languages": ("en", "de"), "limit": 6, "bootstrap": 20, "permutations": 20, "probes": ("language",),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    xprobe.run(str(tiny), out=out, **OPTIONS)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def edit(out: Path, place: str, value: Any) -> None:
    """Sets one entry, or removes it if ``value`` is None; the checksum stays."""
    manifest = raw_manifest(out)
    holder: Any = manifest
    *path, last = (int(key) if key.isdigit() else key for key in place.split("."))
    for key in path:
        holder = holder[key]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    (out / MANIFEST).write_text(json.dumps(manifest))


def files(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


EDITS = [
    ("model.name", "Qwen/Qwen2.5-7B"),
    ("model.dtype", "float64"),
    ("study.limit", 500),
    ("counts.examples", 9999),
    ("created", "2020-01-01T00:00:00+00:00"),
    ("stages.states.executions.0.device", "cuda:7"),
    ("note", "added"),
    ("sha256", None),
]


@pytest.mark.parametrize(("place", "value"), EDITS, ids=[place for place, _ in EDITS])
@pytest.mark.parametrize("use", [xprobe.load_study, train_probes], ids=["load_study", "train_probes"])
def test_a_finished_run_with_an_edited_manifest_is_refused_and_left_alone(
    use: Callable[[Path], Any], place: str, value: Any, out: Path
) -> None:
    edit(out, place, value)
    before = files(out)
    words = (
        f"{out / MANIFEST} was changed after xprobe wrote it. Put the old manifest back; or `xprobe run --out {out} "
    )
    with pytest.raises(RunFolderError, match=re.escape(words)):
        use(out)
    assert files(out) == before


def test_a_manifest_whose_old_values_are_put_back_is_read_again(out: Path) -> None:
    edit(out, "counts.examples", 9999)
    edit(out, "counts.examples", 12)
    assert xprobe.load_study(out).manifest.counts.examples == 12


@pytest.mark.parametrize(
    ("place", "value"),
    [edit for edit in EDITS if edit[0] not in ("model.dtype", "study.limit")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resuming_writes_the_true_entries_again(place: str, value: Any, out: Path, tiny: Path, finished: Path) -> None:
    edit(out, place, value)
    assert main(["run", "--out", str(out), "--resume"]) == 0
    ours, theirs = xprobe.load_study(out).manifest, xprobe.load_study(finished).manifest
    for entry in ("model", "study", "data", "counts", "groups", "other"):
        assert getattr(ours, entry) == getattr(theirs, entry), entry
    assert ours.stages["states"].executions == theirs.stages["states"].executions
    assert ours.created != "2020-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (
            "study.limit",
            500,
            "they are of another study, model or data. Put the old manifest back, or start the run in a",
        ),
        (
            "model.dtype",
            "float64",
            "entry model.dtype is 'float64', the shards hold float32. Put the old manifest back",
        ),
    ],
)
def test_an_edit_of_what_identifies_the_run_cannot_be_resumed(
    place: str, value: Any, words: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(out, place, value)
    before = files(out)
    assert main(["run", "--out", str(out), "--resume"]) == 1
    assert words in capsys.readouterr().err
    assert files(out) == before


def test_what_is_written_about_a_lost_seed_agrees(out: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(out, "study.seed", None)
    words = (
        "entry study.seed must be a whole number, is missing; the run cannot be used: put the old manifest back, or st"
    )
    for use in (xprobe.load_study, train_probes):
        with pytest.raises(RunFolderError, match=re.escape(words)):
            use(out)
    assert main(["probe", str(out)]) == 1
    assert words in capsys.readouterr().err
    with pytest.raises(UsageError, match="seed is now 0 and is missing in the manifest"):
        xprobe.run(str(tiny), out=out, resume=True, **OPTIONS)


def test_an_edited_execution_is_dropped_and_a_warning_counts_its_shards(out: Path, tiny: Path) -> None:
    edit(out, "stages.states.executions.0.device", "cuda:7")
    study = xprobe.run(str(tiny), out=out, resume=True, batch_tokens=111, **OPTIONS)
    states, n = study.manifest.stages["states"], len(study.manifest.groups)
    assert [(one.device, one.options.batch_tokens, one.shards) for one in states.executions] == [("cpu", 111, 0)]
    assert states.warnings == [f"the manifest does not say which execution wrote {n} of {n} shards"]


@pytest.mark.parametrize("value", ["another", 7, None], ids=str)
def test_shards_whose_journal_line_names_no_execution_of_the_manifest_are_counted_in_a_warning(
    value: Any, out: Path, tiny: Path
) -> None:
    lines = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    lines[0]["execution"] = value
    (out / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    edit(out, "total_seconds", 1)
    study = xprobe.run(str(tiny), out=out, resume=True, **OPTIONS)
    states = study.manifest.stages["states"]
    assert [one.shards for one in states.executions] == [len(lines) - 1]
    assert states.warnings == [f"the manifest does not say which execution wrote 1 of {len(lines)} shards"]


def test_settings_of_probes_that_were_edited_are_trained_again(out: Path, tiny: Path) -> None:
    edit(out, "stages.probes.results.trained.language.folds", 2)
    xprobe.run(str(tiny), out=out, resume=True, **OPTIONS)
    study = xprobe.load_study(out)
    assert study.manifest.stages["probes"].results["trained"]["language"]["folds"] == 2
    assert set(study.probes["folds"]) == {2}
    assert RunFolder(out).manifest_is_untouched()
