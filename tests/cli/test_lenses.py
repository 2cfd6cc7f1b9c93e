"""`xprobe lenses` by hand: tables, JSON, figure, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.planted_latent import WIDTH, latent_model, latent_set, latent_template
from xprobe_cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the planted model, and a lens of it that changes nothing."""
    folder = tmp_path_factory.mktemp("lenses")
    model, data = latent_model(folder / "model", english=3, own=6), latent_set(folder / "data")
    arguments = [
        "--data",
        str(data),
        "--setting",
        "en-x",
        "--setting",
        "x-x",
        "--template",
        str(latent_template(folder)),
    ]
    arguments += ["--bootstrap", "20", "--probes", "none", "--languages", "en,ru,zh"]
    assert main(["run", str(model), *arguments, "--out", str(folder / "run")]) == 0
    maps = {block: torch.eye(WIDTH) for block in range(7)}
    torch.save({"J": maps, "n_prompts": 1, "source_layers": list(maps), "d_model": WIDTH}, folder / "same.pt")
    return folder


def test_the_tables_show_the_lenses_side_by_side(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(place / "run", tmp_path / "run")
    capsys.readouterr()
    assert main(["lenses", str(out), "--lens", f"jacobian:{place / 'same.pt'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line.startswith(str(place))]
    assert [title.split(" · ")[1:] for title in titles] == [
        ["en-x", "24 examples", "phases under 2 lenses"],
        ["x-x", "24 examples", "phases under 2 lenses"],
    ]
    rows = [line.split() for line in lines if line.startswith(("logit", "jacobian"))]
    assert [row[0] for row in rows] == ["logit", "jacobian:same.pt"] * 6
    first, second = rows[6:8]  # phases of x-x: English answers come at layer 3, the others at 6
    assert first[1:5] == ["(run)", "6.0", "[6.0,", "6.0]"]
    assert second[1:4] == first[2:5]
    assert (first[-1], second[-3:]) == ("–", ["0.0", "[0.0,", "0.0]"])
    depths = rows[9]  # of x-x: readiness, script, its share and the share of the own language at layers 2, 4 and 6
    assert depths[2:4] == ["none", "100%"]
    assert depths[6:8] == ["latin", "100%"]
    assert depths[4] == "0.50"
    assert float(depths[8]) < 0.5 < float(depths[12])
    assert rows[11][1:] == ["3.0", "6.0", "6.0"]
    assert lines[-3].startswith("check     the run's lens, read again: readiness differs by at most 0,")
    assert lines[-2:] == [f"files     {out}", f"next      xprobe report {out}"]
    assert max(len(line) for line in lines if " · " not in line) <= 120


def test_json_holds_every_lens(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(place / "run", tmp_path / "run")
    lens = f"jacobian:{place / 'same.pt'}"
    capsys.readouterr()
    assert main(["lenses", str(out), "--lens", lens, "--limit", "4", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["own"], list(value["lenses"]), value["limit"]) == ("logit", ["logit", lens], 4)
    assert value["depth_layers"] == {"25": 2, "50": 4, "75": 6}
    found = value["settings"]["x-x"][lens]
    assert (found["n"], found["boundary"]["value"], found["onset_shift"]["value"]) == (12, 6, 0)
    assert found["depths"]["50"]["script"] == "latin"
    assert found["languages"]["ru"]["depths"]["75"]["script"] == "cyrillic"


def test_the_lens_of_the_run_can_be_read_alone(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(place / "run", tmp_path / "run")
    capsys.readouterr()
    assert main(["lenses", str(out)]) == 0
    assert "phases under one lens" in capsys.readouterr().out


def test_the_figure_is_drawn(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = shutil.copytree(place / "run", tmp_path / "run")
    assert main(["lenses", str(out), "--figure", str(tmp_path / "lenses.png")]) == 0
    assert (tmp_path / "lenses.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--lens", "focus"], 2, "unknown lens 'focus'"),
        (["--lens", "jacobian"], 2, "needs a file: jacobian:FILE"),
        (["--lens", "jacobian:no-such.pt"], 2, "there is no file no-such.pt"),
        (["--limit", "0"], 2, "0 is not in the range x>=1"),
        (["--figure", "lenses.xyz"], 2, "name a file that ends in one of"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    place: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["lenses", str(place / "run"), *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (place / "run" / "lenses.jsonl").exists()
