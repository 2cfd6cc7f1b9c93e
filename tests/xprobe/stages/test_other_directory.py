"""A run whose files were named by relative paths, used from another working directory."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import save_tiny_model, write_set
from xprobe_cli.main import main

import xprobe
from xprobe import AnswerSettings, LensesSettings
from xprobe.config import StudyConfig
from xprobe.errors import UsageError, XprobeError
from xprobe.qa import templates
from xprobe.runs.folder import RunFolder
from xprobe.runs.manifest import Manifest
from xprobe.runs.places import study_here

QUESTIONS = [("Anna lives in Rome. Bert lives in Oslo.", "Where does Anna live?", "Rome"),
             ("Anna lives in Rome. Bert lives in Oslo.", "Where does Bert live?", "Oslo")]  # fmt: skip
NAMED: dict[str, Any] = {"data": "questions", "template": "wording.toml", "lens": "jacobian:maps/lens.pt"}
SMALL: dict[str, Any] = {"bootstrap": 20, "permutations": 20, "probes": ()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which the run begins: model, questions, template and lens lie in it."""
    folder = tmp_path / "here"
    save_tiny_model(folder / "model")
    write_set(folder / "questions", {"en": QUESTIONS, "de": QUESTIONS})
    shutil.copyfile(Path(templates.__file__).parent / "templates" / "default.toml", folder / "wording.toml")
    (folder / "maps").mkdir()
    maps = {block: torch.eye(32).half() for block in range(3)}
    torch.save({"J": maps, "n_prompts": 1, "source_layers": list(maps), "d_model": 32}, folder / "maps" / "lens.pt")
    monkeypatch.chdir(folder)
    xprobe.run("model", out="run", setting=("en-x", "x-x"), **NAMED, **SMALL)
    return folder


@pytest.fixture
def elsewhere(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return here / "run"


def test_later_stages_find_model_data_template_and_lens(elsewhere: Path) -> None:
    assert len(xprobe.evaluate(elsewhere, AnswerSettings(max_new_tokens=2)).answers) == 8
    study = xprobe.read_lenses(elsewhere, LensesSettings(("logit",)))
    assert set(study.lenses["lens"]) == {"jacobian:maps/lens.pt", "logit"}


def test_a_run_is_resumed_whose_names_stay(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted((elsewhere / "shards").iterdir())[-1]
    kept, before = shard.read_bytes(), RunFolder.open(elsewhere).read_run()
    shard.unlink()
    assert main(["run", "--out", str(elsewhere), "--resume"]) == 0
    assert shard.read_bytes() == kept
    after = RunFolder.open(elsewhere).read_run()
    assert (after.study.template, after.study.lens) == (before.study.template, before.study.lens)
    assert Path(after.study.model).is_absolute()
    assert Path(after.study.data).is_absolute()
    assert after.directory == before.directory == str(elsewhere.parent)
    xprobe.evaluate(elsewhere, AnswerSettings(max_new_tokens=2))


def test_a_lens_that_read_before_stays_from_any_directory(here: Path, elsewhere: Path) -> None:
    maps = torch.load(here / "maps" / "lens.pt")
    torch.save({**maps, "J": {block: 2 * one for block, one in maps["J"].items()}}, here / "maps" / "two.pt")
    torch.save(
        {**maps, "J": {block: 3 * one for block, one in maps["J"].items()}}, elsewhere.parent.parent / "three.pt"
    )
    with pytest.MonkeyPatch.context() as moved:
        moved.chdir(here)
        xprobe.read_lenses("run", LensesSettings(("jacobian:maps/two.pt",)))
    study = xprobe.read_lenses(elsewhere, LensesSettings(("jacobian:../three.pt",)))
    own = "jacobian:maps/lens.pt"
    assert list(dict.fromkeys(study.lenses["lens"])) == [own, "jacobian:maps/two.pt", "jacobian:../three.pt"]
    again = xprobe.read_lenses(elsewhere, LensesSettings((f"jacobian:{here / 'maps' / 'two.pt'}",)))  # under this name
    assert set(again.lenses["lens"]) == {own, f"jacobian:{here / 'maps' / 'two.pt'}", "jacobian:../three.pt"}
    with pytest.raises(UsageError, match="are the same lens: leave out one"):
        xprobe.read_lenses(elsewhere, LensesSettings((f"jacobian:{here / 'maps' / 'lens.pt'}",)))


def test_a_finished_run_learns_where_its_files_lie_now(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, settings = elsewhere.parent, AnswerSettings(max_new_tokens=2)
    for name in ("model", "questions", "wording.toml", "maps"):
        (old / name).rename(old / f"new-{name}")
    with pytest.raises(
        UsageError, match=r"no model lies at .*: `xprobe run MODEL --out .*run --resume` tells it where"
    ):
        xprobe.evaluate(elsewhere, settings)
    places = [str(old / "new-model"), "--data", str(old / "new-questions"), "--template", str(old / "new-wording.toml")]
    lens = f"jacobian:{old / 'new-maps' / 'lens.pt'}"
    before = {file.name: file.read_bytes() for file in elsewhere.glob("*.parquet")}
    assert main(["run", *places, "--lens", lens, "--out", str(elsewhere), "--resume"]) == 0
    assert {file.name: file.read_bytes() for file in elsewhere.glob("*.parquet")} == before
    assert len(xprobe.evaluate(elsewhere, settings).answers) == 8
    assert set(xprobe.read_lenses(elsewhere, LensesSettings(("logit",))).lenses["lens"]) == {NAMED["lens"], "logit"}


def test_the_place_that_was_named_last_counts_before_the_old_one(elsewhere: Path) -> None:
    old, settings = elsewhere.parent, AnswerSettings(max_new_tokens=2)
    shutil.copytree(old / "model", old / "kept")
    save_tiny_model(old / "model", seed=1)  # trained further, in its place
    with pytest.raises(UsageError, match="other bytes"):
        xprobe.evaluate(elsewhere, settings)
    assert main(["run", str(old / "kept"), "--out", str(elsewhere), "--resume"]) == 0
    assert len(xprobe.evaluate(elsewhere, settings).answers) == 8


def test_shards_are_read_with_the_lens_that_was_checked(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = elsewhere.parent
    shard = sorted((elsewhere / "shards").iterdir())[-1]
    before = shard.read_bytes()
    shard.unlink()
    lens = old / "maps" / "lens.pt"
    shutil.copyfile(lens, old / "kept.pt")
    maps = torch.load(lens)
    torch.save({**maps, "J": {block: 2 * one for block, one in maps["J"].items()}}, lens)
    assert main(["run", "--out", str(elsewhere), "--resume"]) == 2
    assert main(["run", "--out", str(elsewhere), "--resume", "--lens", f"jacobian:{old / 'kept.pt'}"]) == 0
    assert shard.read_bytes() == before


def test_a_run_whose_manifest_was_edited_keeps_its_directory(elsewhere: Path) -> None:
    manifest = elsewhere / "manifest.json"
    manifest.write_text(re.sub(r'"total_seconds": [\d.]+', '"total_seconds": 7.0', manifest.read_text()))
    sorted((elsewhere / "shards").iterdir())[-1].unlink()
    assert main(["run", "--out", str(elsewhere), "--resume"]) == 0
    assert RunFolder.open(elsewhere).read_run().directory == str(elsewhere.parent)
    xprobe.evaluate(elsewhere, AnswerSettings(max_new_tokens=2))


def test_other_files_of_these_names_are_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies here under the name counts, and its bytes are compared."""
    write_set(Path("questions"), {"en": QUESTIONS[:1], "de": QUESTIONS[:1]})
    with pytest.raises(UsageError, match="data 'questions' has other bytes than it had"):
        xprobe.evaluate(elsewhere, AnswerSettings(max_new_tokens=2))
    shutil.rmtree("questions")
    Path("wording.toml").write_text((elsewhere.parent / "wording.toml").read_text().replace("Question:", "Q:"))
    with pytest.raises(UsageError, match="the wording of the template has changed"):
        xprobe.evaluate(elsewhere, AnswerSettings(max_new_tokens=2))


@pytest.mark.parametrize("gone", ["questions", "wording.toml"])
def test_a_file_that_is_gone_is_named(elsewhere: Path, gone: str) -> None:
    (elsewhere.parent / gone).rename(elsewhere.parent / "moved")
    with pytest.raises(XprobeError, match=gone):
        xprobe.evaluate(elsewhere, AnswerSettings(max_new_tokens=2))


def test_runs_of_earlier_versions_have_no_directory() -> None:
    study = StudyConfig("model", data="questions")
    assert study_here(Manifest(study=study)) == study
