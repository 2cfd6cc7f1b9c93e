"""`xprobe attribute` by hand: the tables, one example as a heat map and a figure, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from xprobe_cli.main import main

ARGUMENTS = ["--languages", "en,de", "--limit", "2", "--bootstrap", "20", "--probes", "none"]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("attribute") / "run"
    assert main(["run", str(tiny), "--setting", "en-x", "--setting", "x-x", *ARGUMENTS, "--out", str(out)]) == 0
    return out


def test_the_tables_show_shares_depths_and_what_is_conserved(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    capsys.readouterr()
    assert main(["attribute", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if " · " in line]
    assert [title.split(" · ")[1] for title in titles] == ["en-x", "x-x"]
    assert all("rule cp · of the logit of the gold answer" in title for title in titles)
    layers = [line for line in lines if line.split() and line.split()[0].isdigit()]
    assert len(layers) == 2 * 5
    assert {line.split()[-1] for line in layers} == {"1.000"}
    assert [line.split()[0] for line in lines if line[:3] in ("en ", "de ", "all")] == ["en", "de", "all"] * 2
    assert lines[-2:] == [f"files     {out}", f"next      xprobe report {out}"]
    assert max(map(len, lines)) <= 120
    assert main(["attribute", str(out), "--rule", "gradient", "--of", "log_probability", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["rule"], value["attributed"]) == ("gradient", "log_probability")
    assert len(value["settings"]["x-x"]["conservation"]["median"]) == 5


def test_one_example_is_shown_and_nothing_is_written(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    before = sorted(path.name for path in finished.iterdir())
    figure = tmp_path / "heat.png"
    capsys.readouterr()
    assert main(["attribute", str(finished), "--show", "en-x/de/p01q1", "--figure", str(figure)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("en-x/de/p01q1 · rule cp")
    assert "question " in said
    assert "conserved: 1.000 of the answer at layer 0, 1.000 at the last" in said
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["attribute", str(finished), "--show", "en-x/de/p01q1", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["example"] == "en-x/de/p01q1"
    assert len(value["tokens"][0]["relevance"]) == 5
    assert sorted(path.name for path in finished.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rule", "lrp"], 2, "'lrp' is not one of"),
        (["--limit", "0"], 2, "0 is not in the range x>=1"),
        (["--figure", "x.png"], 2, "--figure draws one example: name it with --show"),
        (["--show", "en-x/de/none"], 2, "has no example 'en-x/de/none'"),
        (["--show", "en-x/de/p01q1", "--figure", "heat.xyz"], 2, "name a file that ends in one of"),
        (["--stream"], 2, "a streamed model cannot be attributed"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    finished: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["attribute", str(finished), *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (finished / "relevance.jsonl").exists()
