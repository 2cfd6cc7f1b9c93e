"""Every script in examples/ runs, on a tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import xprobe

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LINES = 30  # an example fits on one screen

# script -> (what its argument is, what it must print)
SCRIPTS = {
    "run_study.py": ("model", "the answer comes into sight at layer"),
    "read_run_folder.py": ("run", "on builtin"),
    "lens_of_one_prompt.py": ("model", "layer  4"),
    "capture_rows.py": ("model", "last: (5, 3, 32)"),
    "train_own_probe.py": ("run", "layer  4  R2"),
    "benchmark_kernels.py": ("vocabulary", "rows per second"),
}


@pytest.fixture(scope="module")
def arguments(tiny, tmp_path_factory) -> dict[str, str]:
    """A tiny model, a run of it, and a small vocabulary, as the scripts' arguments."""
    out = tmp_path_factory.mktemp("examples") / "run"
    xprobe.run(tiny, languages=["en", "de"], limit=4, out=out, probes=(), bootstrap=20)
    return {"model": str(tiny), "run": str(out), "vocabulary": "500"}


def test_every_script_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_what_it_promises(name, arguments, tmp_path, monkeypatch, capsys):
    kind, expected = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)  # run_study.py makes its run folder there
    monkeypatch.setattr(sys, "argv", [name, arguments[kind]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_says_how_to_call_it(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    assert f"python examples/{name}" in text.splitlines()[0]
