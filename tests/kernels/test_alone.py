"""The kernels need torch and nothing else of this project, and their modules import each other in one direction."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import xprobe_kernels

KERNELS = Path(xprobe_kernels.__file__).parent.parent
SCRIPT = """
import sys, torch
from xprobe_kernels import Unembedding, available_backends, capture, lens
rows, out = torch.randn(2, 5, 8), torch.empty(2, 8)
capture(rows, torch.tensor([[0, 4, 5], [1, 0, 5]]), out)
head = Unembedding(torch.randn(100, 8), norm="layer", beta=torch.randn(8), softcap=30.0)
for backend in available_backends():
    readout = lens(out, head, torch.tensor([3, -1]), top_k=5, final_rows=torch.tensor([1, 1]), backend=backend)
    assert readout.backend == backend and readout.rank[1, 0] == 0
print(sorted(name for name in sys.modules if name.split(".")[0] in UNWANTED))
"""
UNWANTED = {"xprobe", "xprobe_cli", "transformers", "pandas", "sklearn"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the script prints with ``kernels`` as the only addition to the path, far from the repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("UNWANTED", repr(UNWANTED))],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment | {"PYTHONPATH": str(KERNELS)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_works_alone_and_pulls_in_nothing_of_the_project(printed) -> None:
    assert printed.strip() == "[]"


def imports_of(path: Path, package: str) -> set[str]:
    """Modules of ``package`` that a file imports anywhere, in functions too. A script names its neighbours alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names |= {alias.name for alias in node.names} if module == package else {module.removeprefix(f"{package}.")}
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix(f"{package}.") for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("package", "folder"),
    [
        ("xprobe_kernels", "kernels/xprobe_kernels"),
        ("xprobe_kernels.bench", "kernels/xprobe_kernels/bench"),
        ("benchmarks", "benchmarks"),
    ],
)
def test_no_module_imports_itself_through_others(package, folder) -> None:
    paths = {path.stem: path for path in (KERNELS.parent / folder).glob("*.py") if path.stem != "__init__"}
    assert paths
    graph = {name: imports_of(path, package) & paths.keys() for name, path in paths.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
