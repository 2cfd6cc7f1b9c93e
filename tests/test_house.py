"""The house rules that a test can see: what imports what, what is loaded when, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "xprobe_kernels": ROOT / "kernels" / "xprobe_kernels",
    "xprobe": ROOT / "xprobe",
    "xprobe_cli": ROOT / "cli" / "xprobe_cli",
}
MAY_IMPORT = {
    "xprobe_kernels": {"xprobe_kernels"},
    "xprobe": {"xprobe_kernels", "xprobe"},
    "xprobe_cli": {"xprobe", "xprobe_cli"},
}
OURS = {*PACKAGES, "benchmarks", "tests", "support"}
SOURCES = [(name, path) for name, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, at whatever depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=lambda value: getattr(value, "name", value))
def test_packages_depend_in_one_direction(package, path):
    assert imported(path) & OURS <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", [path for name, path in SOURCES if name == "xprobe"], ids=lambda path: path.name)
def test_the_library_neither_prints_nor_exits(path):
    called = {
        node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Attribute) and node.func.attr == "exit")
    }
    assert "print" not in called
    assert "sys" not in imported(path) or "exit" not in called
    assert "signal" not in imported(path)  # what Ctrl-C does is the caller's


@pytest.mark.parametrize("path", [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts], ids=lambda path: path.name)
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("code", ["import xprobe", "import xprobe, xprobe_cli.main"])
def test_importing_loads_neither_torch_nor_transformers(code):
    loaded = run(
        f"{code}\nimport sys\nprint([m for m in ('torch', 'transformers', 'pandas', 'numpy') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom xprobe_cli.main import main\nassert main(['--help']) == 0\n"
        "print([m for m in ('torch', 'transformers', 'pandas', 'numpy') if m in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        out = run(code)
        seconds.append(time.perf_counter() - started)
        assert out.strip().endswith("[]")
    assert min(seconds) < 1.0  # 0.1 s on a quiet machine


def test_public_names_resolve_and_unknown_ones_say_what_there_is():
    import xprobe

    for name in xprobe.__all__:
        assert getattr(xprobe, name) is not None
    assert set(dir(xprobe)) == set(xprobe.__all__)
    with pytest.raises(AttributeError, match="load_study"):
        _ = xprobe.nonsense


def test_the_version_is_said_once():
    import tomllib

    import xprobe

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == xprobe.__version__
