"""The walk-throughs of CONTRIBUTING.md work: a copy of the sources gets their code, and their tests run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
COPIED = ("xprobe", "kernels", "cli", "tests", "pyproject.toml")

# walk-through -> tests that must pass, beside those that it adds
MORE_TESTS = {
    "Add a probe": ("tests/xprobe/test_config.py", "tests/cli/test_probe.py"),
    "Add a stage": (),
    "Add a data reader": (),
    "Add a lens backend": ("tests/kernels/test_lens.py",),
    "Add a model family whose head is unusual": (),
}
# pytest -k, of the tests in all these files
CHOSEN = (
    "lengths or length_of_the_answer or everything_is_computed_by_default or same_files or json_without_nan or "
    "help_lists or tsv or exponential or (cpu-double and (norm or one))"
)


@dataclass(frozen=True)
class Block:
    """A block of code, and the file that the line before it names last."""

    path: str
    language: str
    text: str

    @property
    def is_test(self) -> bool:
        return self.path.startswith("tests/")


def walk_throughs() -> dict[str, list[Block]]:
    """The blocks of every walk-through, by its heading."""
    text = PAGE.read_text(encoding="utf-8").partition("\n## Walk-throughs\n")[2]
    sections = re.split(r"^### (.+)$", text, flags=re.MULTILINE)[1:]
    found = {}
    for heading, section in zip(sections[::2], sections[1::2], strict=True):
        blocks = []
        for before, language, code in re.findall(r"([^\n].*?)\n\n```(python|diff)\n(.*?)```", section, re.DOTALL):
            paths = re.findall(r"`([\w/]+\.py)`", before.rpartition("\n\n")[2])
            blocks.append(Block(paths[0], language, code))
        found[heading] = blocks
    return found


def apply(block: Block, root: Path) -> None:
    """Writes a new file, or makes the change that a diff shows. A change that is there already is left as it is.

    Raises
    ------
    AssertionError
        Another file of this name is there, or the lines to change do not stand exactly once in the old one. Then the
        page does not fit the sources any more: change its diff.
    """
    path = root / block.path
    if block.language == "python":
        assert not path.exists() or path.read_text(encoding="utf-8") == block.text, block.path
        path.write_text(block.text, encoding="utf-8")
        return
    lines = block.text.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    source = path.read_text(encoding="utf-8")
    if source.count(new) == 1 and (source.count(old) == 0 or old in new):
        return
    assert source.count(old) == 1, f"{PAGE.name}: change its diff of {block.path}, which does not hold once:\n{old}"
    path.write_text(source.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of packages and tests with the code of all walk-throughs."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for blocks in walk_throughs().values():
        for block in blocks:
            apply(block, folder)
    return folder


def files_to_run(heading: str) -> list[str]:
    """The test files that say whether a walk-through works."""
    return [block.path for block in walk_throughs()[heading] if block.is_test] + [*MORE_TESTS[heading]]


@pytest.fixture(scope="module")
def report(copy) -> str:
    """What pytest says of the tests of all walk-throughs in ``copy``, one line for each test."""
    paths = [str(copy / part) for part in (".", "kernels", "cli")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    files = [path for heading in MORE_TESTS for path in files_to_run(heading)]
    options = ["-q", "-rA", "--no-header", "-p", "no:cacheprovider", "-k", CHOSEN]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)
    return done.stdout + done.stderr


def test_every_walk_through_is_tested():
    assert set(walk_throughs()) == set(MORE_TESTS)


@pytest.mark.parametrize("heading", MORE_TESTS)
def test_a_walk_through_works(heading, report):
    assert files_to_run(heading)
    for path in files_to_run(heading):
        outcomes = re.findall(rf"^(PASSED|FAILED|ERROR) {re.escape(path)}", report, re.MULTILINE)
        assert set(outcomes) == {"PASSED"}, report


def test_files_pass_the_linter_afterwards(copy):
    pytest.importorskip("ruff")
    files = sorted({block.path for blocks in walk_throughs().values() for block in blocks})
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files], cwd=copy, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_files_and_links_that_the_page_names_exist():
    text = PAGE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    new = {block.path for blocks in walk_throughs().values() for block in blocks if block.language == "python"}
    for name in re.findall(r"`((?:xprobe|kernels|cli|tests|docs|benchmarks)/[\w/.-]*)`", text):
        assert name in new or (ROOT / name).exists(), name
