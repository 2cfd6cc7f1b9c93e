"""`xprobe patch` by hand: tables, JSON, figure, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.planted_causes import causes_model, causes_set
from xprobe_cli.main import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patch")
    model, data = causes_model(folder / "model", 2, 4), causes_set(folder / "data")
    arguments = ["--data", str(data), "--setting", "en-x", "--setting", "x-x", "--template", "plain"]
    arguments += ["--bootstrap", "20", "--probes", "none"]
    assert main(["run", str(model), *arguments, "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_the_tables_show_effects_and_boundaries(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    capsys.readouterr()
    assert main(["patch", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[1] for line in lines if " · " in line] == ["en-x", "x-x"]
    layers = [line.split() for line in lines if line.split() and line.split()[0].isdigit()]
    assert len(layers) == 2 * 6
    assert [row[1] for row in layers[:6]] == ["0.00"] * 4 + ["1.00"] * 2
    rows = {line.split()[0]: line for line in lines if line[:3] in ("en ", "de ", "all", "cro") and " of " in line}
    assert "2 [2, 2]" in rows["de"]
    assert "4 [4, 4]" in rows["de"]
    assert set(rows) == {"en", "de", "all", "cross"}
    place = next(i for i, line in enumerate(lines) if line.startswith("answer held from, by language (rows)"))
    assert [line.split() for line in lines[place + 1 : place + 4]] == [["en", "de"], ["en", "–", "4"], ["de", "4", "–"]]
    assert lines[-2:] == [f"files     {out}", f"next      xprobe report {out}"]
    assert max(len(line) for line in lines if " · " not in line) <= 120


def test_json_holds_settings_and_boundaries(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    capsys.readouterr()
    assert main(["patch", str(out), "--pairs", "1", "--cross", "0", "--controls", "0", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["pairs"], value["cross"], value["controls"], value["limit"]) == (1, 0, 0, None)
    assert value["settings"]["en-x"]["same"]["answer_boundary"]["value"] == 4
    assert set(value["settings"]["en-x"]) == {"same"}


def test_the_figure_is_drawn(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = shutil.copytree(finished, tmp_path / "run")
    assert main(["patch", str(out), "--figure", str(tmp_path / "causes.png")]) == 0
    assert (tmp_path / "causes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--pairs", "0"], 2, "0 is not in the range x>=1"),
        (["--limit", "1"], 2, "1 is not in the range x>=2"),
        (["--cross", "-1"], 2, "-1 is not in the range x>=0"),
        (["--stream"], 2, "a streamed model cannot be patched"),
        (["--figure", "causes.xyz"], 2, "name a file that ends in one of"),
        (["--figure", "/no/such/folder/causes.png"], 2, "there is no folder /no/such/folder"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    finished: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["patch", str(finished), *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (finished / "patching.jsonl").exists()
