"""`xprobe evaluate` by hand: the table, `--json`, another normaliser, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from xprobe_cli.main import main

ARGUMENTS = ["--languages", "en,th", "--limit", "4", "--bootstrap", "20", "--probes", "none"]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "run"
    assert main(["run", str(tiny), "--setting", "en-x", "--setting", "x-x", *ARGUMENTS, "--out", str(out)]) == 0
    return out


def test_the_table_names_the_normaliser_and_every_language(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    capsys.readouterr()
    assert main(["evaluate", str(out), "--max-new-tokens", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[1] for line in lines if " · " in line] == ["en-x", "x-x"]
    assert all("normaliser xprobe · correct from F1 0.5" in line for line in lines if " · " in line)
    assert [line.split()[0] for line in lines if line[:3] in ("en ", "th ", "all")] == ["en", "th", "all"] * 2
    assert lines[-2:] == [f"files     {out}", f"next      xprobe report {out}"]
    assert max(map(len, lines)) <= 140
    assert main(["evaluate", str(out), "--max-new-tokens", "5", "--norm", "squad", "--threshold", "1", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["normaliser"] == "squad"
    assert value["threshold"] == 1
    assert set(value["settings"]["x-x"]["languages"]) == {"en", "th"}
    assert value["run_dir"] == str(out)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--norm", "bleu"], 2, "'bleu' is not one of"),
        (["--norm", "mlqa"], 2, "'mlqa' is defined for"),
        (["--threshold", "0"], 2, "0 is not in the range 0<x<=1"),
        (["--stream"], 2, "a streamed model cannot generate answers"),
        (["--device", "cuda:77"], 2, "cuda:77"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    finished: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(finished), *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (finished / "answers.jsonl").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
