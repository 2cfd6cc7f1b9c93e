"""Every script in examples/ runs on a tiny model, and prints a usage line if its arguments are wrong."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

import xprobe
from xprobe.config import DEFAULT_MODEL
from xprobe.errors import XprobeError
from xprobe.models import loading

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LINES = 35  # an example fits on one screen

# script -> (kind of its argument, what it must print, arguments in its usage line)
SCRIPTS = {
    "run_study.py": ("model", "median retrieval onset: ", "[MODEL]"),
    "read_run_folder.py": ("run", "on builtin", "RUN_FOLDER"),
    "lens_of_one_prompt.py": ("model", "layer  4", "[MODEL]"),
    "capture_rows.py": ("model", "last: (5, 3, 32)", "[MODEL]"),
    "train_own_probe.py": ("run", "layer  4  R2", "RUN_FOLDER"),
    "paper_figure.py": ("run", "stability.pdf and figures/: stability.pdf, stability.png, ", "RUN_FOLDER"),
    "benchmark_kernels.py": ("vocabulary", "rows per second", "[VOCABULARY]"),
}


@pytest.fixture(scope="module")
def arguments(tiny, tmp_path_factory) -> dict[str, str]:
    """A tiny model, a run of it, and a small vocabulary, as the scripts' arguments."""
    out = tmp_path_factory.mktemp("examples") / "run"
    xprobe.run(tiny, languages=["en", "de"], limit=4, out=out, probes=(), bootstrap=20)
    return {"model": str(tiny), "run": str(out), "vocabulary": "500"}


def run_script(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch):
    """Gives the test session its own ``sys.argv`` back."""
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_every_script_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_its_result(name, arguments, tmp_path, monkeypatch, capsys):
    kind, expected, _ = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)  # run_study.py makes its run folder there
    run_script(name, arguments[kind])
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_called_with_wrong_arguments_prints_its_usage(name):
    required = not SCRIPTS[name][2].startswith("[")
    for wrong in [("one", "two"), *([()] if required else [])]:
        with pytest.raises(SystemExit) as stopped:
            run_script(name, *wrong)
        assert stopped.value.code == f"usage: python examples/{name} {SCRIPTS[name][2]}"


def test_the_settings_of_a_run_are_shown_apart(tiny, tmp_path, capsys):
    options = {"languages": ["en", "de"], "limit": 4, "probes": (), "bootstrap": 20}
    study = xprobe.run(tiny, setting=["en-x", "x-x"], out=tmp_path / "run", **options)
    run_script("read_run_folder.py", str(tmp_path / "run"))
    shown = capsys.readouterr().out
    layers = study.layers[(study.layers["signal"] == "readiness") & (study.layers["language"] == "de")]
    values = {setting: part["value"].round(2).tolist() for setting, part in layers.groupby("setting")}
    assert values["en-x"] != values["x-x"]
    readiness = study.layers[study.layers["signal"] == "readiness"]
    first_rows = readiness[readiness["layer"] == 0].pivot(index="setting", columns="language", values="value").round(2)
    assert not first_rows.loc["en-x"].equals(first_rows.loc["x-x"])
    for setting, values in first_rows.iterrows():
        assert [setting, "0", *map(str, values)] in [line.split() for line in shown.splitlines()]
    assert len(re.findall(r"^(?:en-x|x-x|) +(?:en|de) +4\.0 ", shown, re.MULTILINE)) == 4  # examples, by both


def test_a_layer_is_printed_as_a_whole_number(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_script("run_study.py", str(tiny))
    shown = capsys.readouterr().out
    (run_folder,) = (tmp_path / "runs").iterdir()
    onset = xprobe.load_study(run_folder)["en-x"].boundary["value"]
    assert onset == int(onset)
    assert f"median retrieval onset: layer {int(onset)}\n" in shown


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_says_how_to_call_it(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    title, line = text.splitlines()[1:3]
    assert line == "=" * len(title)  # the gallery shows the title
    assert f"``python examples/{name} {SCRIPTS[name][2]}``" in text.split('"""')[1]


def test_the_notebook_is_committed_without_outputs_and_runs(tmp_path):
    """Every cell runs, and studies, comparisons and prompts show themselves."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    try:
        loading.resolve(DEFAULT_MODEL)
    except XprobeError as error:
        pytest.skip(str(error))
    notebook = nbformat.read(EXAMPLES / "study_in_a_notebook.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [output.data for cell in cells for output in cell.outputs if "data" in output]
    assert sum("xprobe-output" in data.get("text/html", "") for data in shown) == 2
    assert sum("xprobe-lens" in data.get("text/html", "") for data in shown) == 1
    assert sum("image/png" in data for data in shown) == 2
    table = xprobe.compare([tmp_path / "runs" / "english-text", tmp_path / "runs" / "noisy"]).table
    assert table["readiness"].is_monotonic_decreasing  # noise on the weights makes a model worse
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "stability.pdf", "comparison.html"}
