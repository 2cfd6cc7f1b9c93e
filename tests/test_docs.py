"""What README and docs show is run: Python as it stands, commands with the smallest data that makes them quick."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from xprobe_cli.main import COMMANDS, group, main

from xprobe.config import DEFAULT_MODEL
from xprobe.errors import XprobeError
from xprobe.models import loading

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """(page and number, text) of every fenced block of a language."""
    found = []
    for page in PAGES:
        fenced = re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        found += [(f"{page.name}-{number}", text) for number, text in enumerate(fenced, 1)]
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
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known | elsewhere


def test_links_to_files_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_functions_that_the_method_names_exist():
    from importlib import import_module

    names = re.findall(r"`(xprobe(?:_kernels)?(?:\.\w+)+)`", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"))
    assert len(names) > 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name
