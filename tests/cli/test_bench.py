"""`xprobe bench`."""

from __future__ import annotations

import json

import pytest
from xprobe_cli import kernel_bench
from xprobe_cli.main import main

from xprobe.errors import UsageError

SMALL = ["bench", "--shape", "smollm2-135m", "--rows", "few", "--rounds", "1", "--quick", "--backend", "cpu-eager"]


@pytest.fixture
def measured(monkeypatch):
    """What the command asks to be measured; nothing is."""
    asked = []

    def measure(say, *, figure, **settings):
        asked.append(settings)
        if say is not None:
            say("the table")
        return {"lens": []}

    monkeypatch.setattr("xprobe_cli.bench.measure", measure)
    return asked


def test_help_names_the_options(capsys):
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    options = ("--kernel", "--shape", "--rows", "--rounds", "--json", "--figure", "--backend", "--quick", "--rivals")
    assert all(option in out for option in options)


def test_a_quick_run_prints_the_table_and_writes_json_and_figure(capsys, tmp_path):
    target, figure = tmp_path / "bench.json", tmp_path / "roofline.png"
    assert main([*SMALL, "--json", str(target), "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "SmolLM2-135M, few rows" in out
    assert "CUT" in out
    assert "x naive" in out
    (part,) = json.loads(target.read_text())["lens"]
    assert {entry["status"] for entry in part["variants"]} == {"ok", "skipped"}
    assert figure.stat().st_size > 10_000


def test_json_without_a_file_is_all_that_stdout_gets(capsys, measured):
    assert main(["bench", "--json", "--quick"]) == 0
    assert json.loads(capsys.readouterr().out) == {"lens": []}
    assert measured[0]["quick"] is True


def test_options_arrive(capsys, measured):
    line = (
        "bench --kernel all --shape all --rows few --rounds 7 --dtype float32 --backend a --backend b"
        " --threads 2 --kl --rivals"
    )
    assert main(line.split()) == 0
    assert measured == [{
        "kernel": "all", "shape": "all", "rows": "few", "rounds": 7, "dtype": "float32", "backends": ("a", "b"),
        "device": "auto", "threads": 2, "quick": False, "kl": True, "rivals": True,
    }]  # fmt: skip
    assert capsys.readouterr().out == "the table\n"


def test_a_figure_of_nothing_fails_after_the_json_is_safe(capsys, measured, tmp_path):
    target = tmp_path / "bench.json"
    assert main(["bench", "--json", str(target), "--figure", str(tmp_path / "x.png")]) == 1
    assert "nothing was measured" in capsys.readouterr().err
    assert json.loads(target.read_text()) == {"lens": []}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernel", "run"], "not available yet"),
        (["--kernel", "nope"], "kernel must be one of"),
        (["--shape", "nope"], "shape must be one of smollm2-135m"),
        (["--backend", "nope"], "backend must be one of"),
        (["--rounds", "0"], "--rounds"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--figure", "x.txt"], "figure must end in"),
        (["--figure", "/nowhere/x.png"], "not a folder"),
        (["--json", "/nowhere/x.json"], "not a folder"),
        (["--kernel", "capture", "--figure", "x.png"], "figure shows the lens"),
        (["--rivals", "--figure", "x.png"], "figure shows the lens"),
        (["--rivals", "--kl"], "leave out kernel and kl"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, arguments, words):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_wrong_settings_are_usage_errors_of_xprobe():
    with pytest.raises(UsageError, match="not available yet"):
        kernel_bench.measure(kernel="run")
