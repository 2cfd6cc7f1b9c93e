"""The site that ``make docs`` builds: no warning, every page in a table of contents, every link leads somewhere.

The examples and the notebook are in it as text, which takes seconds. A slow test builds the site with their results.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest
from xprobe_cli.main import COMMANDS, group

from xprobe.config import DEFAULT_MODEL
from xprobe.errors import XprobeError
from xprobe.models import loading

ROOT = Path(__file__).parents[1]
PAGES = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [path for path in sorted((ROOT / "examples").iterdir()) if path.suffix in (".py", ".ipynb")]
SOURCES = ("xprobe", "kernels", "cli", "examples")
INCLUDED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
AS_TEXT = ("-D", "plot_gallery=0", "-D", "nb_execution_mode=off")
PUBLIC = ("xprobe", "xprobe_kernels", "xprobe.probes")  # with ``__all__``


class Page(HTMLParser):
    """Ids and links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values[name] or "" for name in ("id", "name") if name in values}
        self.links += [values[name] or "" for name in ("href", "src") if name in values]


def build(folder: Path, *options: str) -> Path:
    """Builds the site from a copy of the pages, beside links to the sources: the gallery is written among the pages."""
    for module in ("sphinx", "myst_nb", "sphinx_gallery", "sphinx_click", "furo"):
        pytest.importorskip(module, reason="the site needs pip install 'xprobe[docs]'")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("gallery"))
    for name in SOURCES:
        (folder / name).symlink_to(ROOT / name)
    for name in INCLUDED:
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "sphinx", "--quiet", "-W", "--keep-going", "-b", "html", *options, "docs", "html"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    built = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site, with the examples as text."""
    return build(tmp_path_factory.mktemp("site"), *AS_TEXT)


class Text(HTMLParser):
    """The text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_data(self, data: str) -> None:
        self.found += data


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def public_names() -> Iterator[str]:
    """Names as the reference shows them: an error under ``xprobe.errors``, any other where users import it from."""
    yield from ("xprobe.events.Stage", "xprobe.events.Step", "xprobe.events.Note")
    errors = {name for name, value in vars(import_module("xprobe.errors")).items() if isinstance(value, type)}
    yield from (f"xprobe.errors.{name}" for name in errors)
    for module in PUBLIC:
        yield from (
            f"{module}.{name}" for name in import_module(module).__all__ if name not in {"__version__", *errors}
        )


def test_every_page_is_in_a_table_of_contents(site: Path, pages: dict[Path, Page]) -> None:
    listed = {unquote(urlsplit(link).path) for link in pages[site / "index.html"].links}
    assert {page.as_posix() for page in PAGES} - {"index.html"} - listed == set()


def test_every_example_is_in_the_gallery_or_a_page(site: Path, pages: dict[Path, Page]) -> None:
    links = {*pages[site / "gallery" / "index.html"].links, *pages[site / "index.html"].links}
    for path in EXAMPLES:
        assert (site / "gallery" / f"{path.stem}.html").is_file()
        assert [link for link in links if unquote(link).split("#")[0].endswith(f"{path.stem}.html")], path.name


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name."""
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        yield name, command
        yield from ((f"{name} {inner}", each) for inner, each in getattr(command, "commands", {}).items())


def test_the_page_of_commands_has_every_option_with_its_help(site: Path, pages: dict[Path, Page]) -> None:
    text, ids = plain(Text(site / "commands.html").found), pages[site / "commands.html"].ids
    for name, command in commands():
        assert plain((command.help or "").split("\n\n")[0]) in text, name
        for option in (one for one in command.params if isinstance(one, click.Option) and not one.hidden):
            assert f"cmdoption-xprobe-{name.replace(' ', '-')}-{option.opts[0].lstrip('-')}" in ids
            assert plain(option.help or "") in text, (name, option.opts)


def plain(text: str) -> str:
    """A help text without the marks of code, and with single blanks."""
    return " ".join(text.replace("`", "").split())


def test_every_internal_link_and_anchor_resolves(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_every_public_name_is_in_the_reference(pages: dict[Path, Page]) -> None:
    described = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "reference"))
    assert set(public_names()) - described == set()


def test_no_script_of_the_folder_is_in_the_site(site: Path) -> None:
    assert list(site.rglob("make_*")) == list(site.rglob("conf*")) == []


def test_the_text_of_a_property_is_no_type(site: Path) -> None:
    assert "<p>One row per layer: phase" in (site / "reference" / "xprobe.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_gallery_shows_what_the_examples_print(tmp_path: Path) -> None:
    """All scripts and the notebook run while the site is built. They write nothing among the sources."""
    try:
        loading.resolve(DEFAULT_MODEL)
    except XprobeError as error:
        pytest.skip(str(error))
    before = {path for path in (ROOT / "examples").rglob("*") if "__pycache__" not in path.parts}
    gallery = build(tmp_path) / "gallery"
    for name, printed in {"run_study": "median retrieval onset: layer", "capture_rows": "strategy:"}.items():
        assert printed in Text(gallery / f"{name}.html").found
    assert "rank of ' Paris'" in Text(gallery / "lens_of_one_prompt.html").found
    assert any("sphx_glr_paper_figure" in link for link in Page(gallery / "paper_figure.html").links)
    notebook = (gallery / "study_in_a_notebook.html").read_text(encoding="utf-8")
    assert notebook.count('class="xprobe-output"') == 2
    assert notebook.count('class="xprobe-lens"') == 1
    assert {path for path in (ROOT / "examples").rglob("*") if "__pycache__" not in path.parts} == before
