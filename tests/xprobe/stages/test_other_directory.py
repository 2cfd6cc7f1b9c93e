"""A run whose files were named by relative paths, used from another working directory."""

from __future__ import annotations

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
