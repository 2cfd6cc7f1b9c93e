"""`xprobe oracle` by hand: the forecast, the table, `--json`, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from xprobe_cli.main import main

ARGUMENTS = ["--languages", "en,de", "--limit", "2", "--bootstrap", "20", "--probes", "none"]


@pytest.fixture(scope="module")
def evaluated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("oracle") / "run"
    assert main(["run", str(tiny), "--setting", "en-x", "--setting", "x-x", *ARGUMENTS, "--out", str(out)]) == 0
    assert main(["evaluate", str(out), "--max-new-tokens", "3"]) == 0
    return out


def test_the_forecast_says_what_it_takes_and_writes_nothing(
    evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in evaluated.iterdir())
    capsys.readouterr()
    assert main(["oracle", str(evaluated), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("8 answers, about ")
    assert "times those of the states" in said
    assert main(["oracle", str(evaluated), "--dry-run", "--limit", "1", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["examples"] == 4
    assert value["tokens"] > 0
    assert sorted(path.name for path in evaluated.iterdir()) == before


def test_the_table_names_the_definition_and_every_language(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(evaluated, tmp_path / "run")
    capsys.readouterr()
    assert main(["oracle", str(out), "--limit", "1"]) == 0
    found = capsys.readouterr()
    lines = found.out.splitlines()
    assert "the oracle: 4 answers, about" in found.err
    titles = [line for line in lines if " · " in line]
    assert [title.split(" · ")[1] for title in titles] == ["en-x", "x-x"]
    assert all("oracle definition 1 · removal delete · normaliser xprobe" in title for title in titles)
    assert [line.split()[0] for line in lines if line[:3] in ("en ", "de ", "all")] == ["en", "de", "all"] * 2
    assert lines[-2:] == [f"files     {out}", f"next      xprobe report {out}"]
    assert max(map(len, lines)) <= 150
    assert main(["oracle", str(out), "--limit", "1", "--norm", "squad", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["normaliser"] == "squad"
    assert value["limit"] == 1
    assert value["settings"]["x-x"]["languages"]["de"]["own"]["f1"]["value"] is not None


def test_without_controls_and_spans_the_table_shows_dashes(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(evaluated, tmp_path / "run")
    capsys.readouterr()
    assert main(["oracle", str(out), "--sentences", "--no-control"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all"))
    assert "–" in row


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--removal", "mask"], 2, "'mask' is not one of"),
        (["--limit", "0"], 2, "0 is not in the range x>=1"),
        (["--stream"], 2, "a streamed model cannot be searched for evidence"),
        (["--device", "cuda:77"], 2, "cuda:77"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    evaluated: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["oracle", str(evaluated), *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (evaluated / "oracle.jsonl").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["oracle", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
