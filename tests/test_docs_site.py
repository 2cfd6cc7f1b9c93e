"""The site that ``make docs`` builds: no warning, every page in a table of contents, every link leads somewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in sorted((ROOT / "docs").rglob("*.md"))]
PUBLIC = ("xprobe", "xprobe_kernels", "xprobe.probes")  # with ``__all__``

pytestmark = pytest.mark.slow


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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module, reason="the site needs pip install 'xprobe[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "sphinx", "--quiet", "-W", "--keep-going", "-b", "html", "-d", str(folder / "doctrees")]
    built = subprocess.run(
        [sys.executable, *command, str(ROOT / "docs"), str(folder / "html")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder / "html"


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
