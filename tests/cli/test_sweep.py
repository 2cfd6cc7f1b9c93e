"""`xprobe sweep` and `xprobe compare` on a sweep: what is printed, and how a sweep ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.families import save_tiny_model
from support.sweeps import process_of, wait_for, write_toml
from xprobe_cli.main import main
from xprobe_cli.sweep_view import View, _table

from xprobe.sweeps.folder import Status

STATUSES = [
    Status("one", "running", "forward and lens", 3, 12, seconds=7.0),
    Status("two", "failed", "loading", errors={"states": "no [such] model"}, seconds=1.0),
    Status("three"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "one")
    save_tiny_model(folder / "two", "qwen3")
    return folder


def test_without_a_terminal_changes_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with View() as view:
        view([Status("one", stage="forecast"), Status("two")])
        view(STATUSES)
        view(STATUSES)
    assert capsys.readouterr().err.splitlines() == [
        "xprobe: one: forecast",
        "xprobe: one: running",
        "xprobe: two: failed after 0:01; states: no [such] model",
    ]


def test_as_json_every_change_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    with View(as_json=True) as view:
        view(STATUSES)
        view([*STATUSES[:2], Status("three", "running")])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["event"], line["name"], line["state"]) for line in lines] == [
        ("model", "one", "running"), ("model", "two", "failed"), ("model", "three", "waiting"),
        ("model", "three", "running"),
    ]  # fmt: skip
    assert (lines[0]["done"], lines[0]["total"], lines[1]["errors"]) == (3, 12, {"states": "no [such] model"})


@pytest.mark.parametrize("rows", [10, 2])
def test_the_live_table_shows_all_runs_or_those_at_work(rows: int) -> None:
    console = pytest.importorskip("rich.console").Console(width=100, record=True)
    console.print(_table(STATUSES, rows, 100))
    text = console.export_text()
    assert "3/12" in text
    assert "no [such] model" in text
    assert ("three" in text) == (rows == 10)
    assert "1 running, 1 failed, 1 waiting" in text
    long = Status("four", "failed", errors={"states": "words " * 60})
    console.print(_table([*STATUSES, long], 10, 100))
    assert {line.split()[0] for line in console.export_text().splitlines()} >= {"model", "one", "two", "three", "four"}


def test_bad_usage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_toml(tmp_path / "a.toml", [{"model": "org/one"}])
    for options, words in (
        (["--workers", "none"], "'none' is neither a number of at least 1 nor auto"),
        (["--dry-run", "--no-forecast"], "leave out --no-forecast"),
        (["--engine", "here", "--address", "auto"], "address is of a Ray cluster"),
        (["--only", "two"], "holds no sweep"),
    ):
        assert main(["sweep", str(file), *options]) == 2
        assert words in capsys.readouterr().err
    assert main(["sweep", str(tmp_path / "none.toml")]) == 2
    assert "none.toml is no file" in capsys.readouterr().err


def test_the_forecast_is_a_table_and_runs_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [{"model": "one"}, {"model": "two", "memory": "2 MB"}, {"model": "gone"}]
    file = write_toml(models / "a.toml", entries, stages=["answers", "patching"])
    assert main(["sweep", str(file), "--out", str(tmp_path / "sweep"), "--dry-run"]) == 1
    out = capsys.readouterr().out
    assert "\none    0.1 M" in out
    assert "refused" in out
    assert re.search(r"\n +states 0:\d\d, answers 0:\d\d, patching 0:\d\d; at the speed of this machine", out)
    assert "note      gone: unknown model 'gone'" in out
    assert list((tmp_path / "sweep" / "runs").iterdir()) == []
    assert main(["sweep", str(file), "--out", str(tmp_path / "sweep"), "--dry-run", "--json"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["event"], list(last["forecasts"]), list(last["refused"])) == ("forecast", ["one", "two"], ["two"])
    write_toml(models / "a.toml", [{"model": "one"}])
    assert main(["sweep", str(file), "--out", str(tmp_path / "good"), "--dry-run"]) == 0


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep of two models that run and one that does not, with what it printed."""
    out = tmp_path_factory.mktemp("finished") / "sweep"
    file = write_toml(models / "b.toml", [{"model": "one"}, {"model": "two", "base": "one"}, {"model": "gone"}])
    command = [sys.executable, "-m", "xprobe_cli", "sweep", str(file), "--out", str(out), "--workers", "auto", "--json"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    return {"out": out, "ended": ended, "lines": [json.loads(line) for line in ended.stdout.splitlines()]}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.mark.slow
def test_the_last_line_of_json_is_the_summary(finished: dict[str, Any]) -> None:
    *events, summary = finished["lines"]
    assert finished["ended"].returncode == 1  # one model failed
    assert {event["event"] for event in events} == {"model"}
    assert summary["event"] == "summary"
    assert {model["name"]: model["state"] for model in summary["models"]} == {
        "one": "done", "two": "done", "gone": "failed"
    }  # fmt: skip
    assert summary["comparison"]["left_out"] == {"gone": "it has no run"}


@pytest.mark.slow
def test_compare_shows_the_claims_of_a_sweep(finished: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    out = str(finished["out"])
    assert main(["compare", out, "--out", f"{out}.html"]) == 0
    text = capsys.readouterr().out
    for words in ("claim 4: more pre-training alone does not help", "note: gone is left out: it has no run", "page   "):
        assert words in text
    assert Path(f"{out}.html").is_file()
    assert main(["compare", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["claim"] for row in found["claims"]] == [1, 1, 2, 2, 2, 3, 3, 4]
    assert main(["compare", out, out]) == 2
    assert "a sweep is compared alone" in capsys.readouterr().err
    assert main(["sweep", out]) == 1
    text = capsys.readouterr().out
    assert "error: gone, forecast: unknown model 'gone'" in text
    assert f"next      xprobe compare {out}" in text


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_runs_at_safe_points(number: int, code: int, models: Path, tmp_path: Path) -> None:
    study = {"settings": ["en-x", "x-x"], "limit": 24, "bootstrap": 20, "probes": []}  # it takes many times the wait
    entries = [{"model": "one", "batch_tokens": 1}, {"model": "two", "batch_tokens": 1}, {"model": "one", "name": "3"}]
    file, out = write_toml(models / f"{code}.toml", entries, study), tmp_path / "sweep"
    command = [sys.executable, "-m", "xprobe_cli", "sweep", str(file), "--out", str(out), "--workers", "2",
               "--no-forecast"]  # fmt: skip
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: all(list(out.glob(f"runs/{name}/shards/*.safetensors")) for name in ("one", "two")))
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert errors.splitlines()[-1] == ("xprobe: interrupted: the runs keep what was computed; the same command goes on")
    assert {name: process_of(out.resolve(), name) for name in ("one", "two")} == {"one": None, "two": None}
    states = {path.stem: json.loads(path.read_text())["state"] for path in out.glob("status/*.json")}
    assert states == {"one": "stopped", "two": "stopped", "3": "stopped"}
    for name in ("one", "two"):
        assert json.loads((out / "runs" / name / "manifest.json").read_text())["status"] == "running"
