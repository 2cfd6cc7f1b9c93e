"""README and docs: their Python runs, their commands parse, the names in them exist. Examples in docstrings run."""

from __future__ import annotations

import doctest
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors import safe_open
from xprobe_cli.main import COMMANDS, group, main

from xprobe.config import DEFAULT_MODEL, Execution
from xprobe.errors import XprobeError
from xprobe.models import loading
from xprobe.runs.manifest import ExecutionEntry, StageEntry

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "kernels" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
]
SOURCES = {"xprobe": ROOT, "xprobe_cli": ROOT / "cli"}  # tests/kernels runs the examples of the kernels
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules_with_examples() -> Iterator[str]:
    """Names of the modules whose docstrings show examples."""
    for package, folder in SOURCES.items():
        for path in sorted((folder / package).rglob("*.py")):
            if ">>>" in path.read_text(encoding="utf-8"):
                yield ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")


def blocks(language: str) -> list[tuple[str, str]]:
    """(page and number, text) of every fenced block of a language."""
    found = []
    for page in PAGES:
        fenced = re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        name = page.relative_to(ROOT).as_posix().removeprefix("docs/")
        found += [(f"{name}-{number}", text) for number, text in enumerate(fenced, 1)]
    return found


def commands() -> list[str]:
    """Every `xprobe ...` line in a shell block, without its comment."""
    lines = [line.split("#")[0].strip() for _, text in blocks("sh") for line in text.splitlines()]
    return sorted({line for line in lines if line.startswith("xprobe ")})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a short run of the demo model in runs/demo, where the pages' snippets can be run."""
    try:
        loading.resolve(DEFAULT_MODEL)
    except XprobeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("docs")
    assert main(["run", "--limit", "2", "--languages", "en,de", "--out", str(folder / "runs" / "demo")]) == 0
    return folder


@pytest.mark.parametrize("text", [text for _, text in blocks("python")], ids=[name for name, _ in blocks("python")])
def test_python_snippets_run(text, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    exec(compile(text, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("line", commands())
def test_shown_commands_parse(line):
    words = shlex.split(line)[1:]
    command, context = group, None
    while words and hasattr(command, "get_command") and not words[0].startswith("-"):
        command = command.get_command(context, words.pop(0))
        assert command is not None, line
    command.make_context("xprobe", words)


def test_the_readme_begins_with_the_two_commands():
    shown = blocks("sh")[0]
    assert shown[0] == "README.md-1"
    assert [line.split("#")[0].strip() for line in shown[1].splitlines()] == ["make demo", "make test"]


def test_every_command_and_option_that_pages_name_exists():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    known = {"--help", "--version"}
    for name in COMMANDS:
        command = group.get_command(None, name)
        for each in [command, *getattr(command, "commands", {}).values()]:
            known |= {option for parameter in each.params for option in (*parameter.opts, *parameter.secondary_opts)}
    # pip, pytest, torchrun, scripts
    elsewhere = {
        "--nproc-per-node",
        "--limit-gib",
        "--minutes",
        "--torch-products",
        "--layers",
        "--questions",
        "--memory",
        "--rounds",
        "--no-deps",
        "--benchmark-only",
        "--json",
        "--steps",
        "--commit",
        "--compare",
        "--noise",
        "--price",
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known | elsewhere


def test_links_to_files_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("module", list(modules_with_examples()))
def test_examples_in_docstrings_run(module: str) -> None:
    result = doctest.testmod(import_module(module), optionflags=FLAGS)
    assert result.failed == 0
    assert result.attempted > 0


def resolve(name: str) -> Any:
    """What a dotted name stands for.

    Raises
    ------
    ModuleNotFoundError, AttributeError
        It stands for nothing.
    """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            module = import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if count == 1 or not ".".join(parts[:count]).startswith(str(error.name)):
                raise
            continue
        return reduce(getattr, parts[count:], module)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_library_exist(page: Path) -> None:
    for name in re.findall(r"`(xprobe(?:_kernels|_cli)?(?:\.\w+)+)", page.read_text(encoding="utf-8")):
        resolve(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_the_repository_exist(page: Path) -> None:
    folders = "xprobe|kernels|cli|benchmarks|tests|docs"
    paths = re.findall(rf"`((?:{folders})/[\w./-]+)", page.read_text(encoding="utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def names_of_the_run_folder(run: Path) -> dict[str, set[str]]:
    """Entries of a manifest, columns of the tables, and tensors of the shards."""
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    stages = manifest["stages"]
    names = {
        "manifest": set(manifest),
        **{entry: set(manifest[entry]) for entry in ("model", "data", "selection", "prompt", "counts", "left_out")},
        "stages": {*stages, *(field.name for kind in (StageEntry, ExecutionEntry) for field in fields(kind))},
        "options": {field.name for field in fields(Execution)},
        "seconds": {step for stage in stages.values() for step in stage["seconds"]},
        "results": {name for stage in stages.values() for name in stage["results"]},
        "plan": set(stages["states"]["results"]["plan"]),
        "settings": {name for setting in stages["phases"]["results"]["settings"].values() for name in setting},
        "files": {path.name for path in run.iterdir()},
    }
    for table in run.glob("*.parquet"):
        names[table.name] = {name for name in pd.read_parquet(table).columns if not name.endswith("_last")}
    with safe_open(next((run / "shards").glob("*.safetensors")), framework="numpy") as shard:
        names["shard"] = set(shard.keys())
    return names


def test_the_page_on_the_run_folder_names_everything_in_it(workplace: Path) -> None:
    page = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    words = set(re.findall(r"check of sharing|[\w.]+", page))
    for where, names in names_of_the_run_folder(workplace / "runs" / "demo").items():
        assert names - words == set(), where
