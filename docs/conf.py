"""Sphinx: the site is made from the pages of this folder and from docstrings. ``make docs`` builds it in build/docs."""

from __future__ import annotations

import re
import sys
from inspect import getdoc
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.ext.napoleon import NumpyDocstring
from sphinx.util.inspect import object_description

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "cli")]

import xprobe  # noqa: E402
from xprobe.probes import ACCURACY  # noqa: E402

project = "xprobe"
author = "The xprobe developers"
project_copyright = f"{author}, Apache-2.0"
version = release = xprobe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["images"]

myst_heading_anchors = 4  # [x](method.md#probes) works here as it does on GitHub

autosummary_generate = False  # the pages in reference/ list the names themselves
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = False
napoleon_use_param = False  # a word in "callable (examples)" is no link
napoleon_use_rtype = False
add_module_names = False
toc_object_entries_show_parents = "hide"

smartquotes = False  # text stays as it is written: --resume is an option

html_theme = "furo"
html_title = f"xprobe {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False

# files outside this folder -> the pages here that show them
SHOWN = {
    "](../CONTRIBUTING.md": "](reference/contributing.md",
    "](CONTRIBUTING.md": "](docs/reference/contributing.md",
}


def link_to_pages(text: str) -> str:
    """The text of a page; a link to a file outside docs/ leads to the page that shows the file."""
    for target, page in SHOWN.items():
        text = text.replace(target, page)
    return text


def setup(app: Any) -> None:
    """Registers what changes sources, included files, pages that are read, docstrings and signatures."""

    def on_source(_app: Any, _name: str, content: list[str]) -> None:
        content[0] = link_to_pages(content[0])

    def on_include(_app: Any, _path: Path, _name: str, content: list[str]) -> None:
        content[0] = link_to_pages(content[0])

    def on_read(_app: Any, doctree: nodes.document) -> None:
        """Dashes between a parameter and its description."""
        for text in list(doctree.findall(nodes.Text)):
            if " -- " in text and isinstance(text.parent, nodes.paragraph):
                text.parent.replace(text, nodes.Text(text.replace(" -- ", " – ")))

    def on_docstring(app: Any, what: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
        """Links pages. Takes "One row per layer: phase, ..." of a property as text, where Napoleon sees a type."""
        if what == "property":
            text = NumpyDocstring(getdoc(member) or "", app.config, app, "method", name, member, options)
            lines[:] = [*str(text).splitlines(), ""]
        lines[:] = [re.sub(r"(?<![`/])\bdocs/([\w-]+)\.md\b(?!`)", r":doc:`docs/\1.md </\1>`", line) for line in lines]

    def on_signature(
        _app: Any, _what: str, _name: str, _member: Any, _options: Any, arguments: str | None, result: str | None
    ) -> tuple[str | None, str | None]:
        """The name of a default value that has no readable text."""
        return arguments and arguments.replace(object_description(ACCURACY), "ACCURACY"), result

    app.connect("autodoc-process-signature", on_signature)
    app.connect("autodoc-process-docstring", on_docstring, priority=600)  # after napoleon
    app.connect("doctree-read", on_read)
    app.connect("source-read", on_source)
    app.connect("include-read", on_include)
