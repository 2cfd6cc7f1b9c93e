"""Sphinx: the site is made from the pages of this folder, from docstrings, from the commands, and from examples/.

``make docs`` builds it in build/docs, and runs the examples; ``-D plot_gallery=0 -D nb_execution_mode=off`` leaves them
as text.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from inspect import getdoc
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.ext.napoleon import NumpyDocstring
from sphinx.util.inspect import object_description

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command does: examples are quicker on a busy machine
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "cli")]

import xprobe  # noqa: E402
from xprobe.probes import ACCURACY  # noqa: E402

project = "xprobe"
author = "The xprobe developers"
project_copyright = f"{author}, Apache-2.0"
version = release = xprobe.__version__

extensions = [
    "myst_nb",  # Markdown and notebooks
    "sphinx_gallery.gen_gallery",
    "sphinx_click",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["images", "gallery/*.py", "gallery/*.zip"]

# the gallery: scripts run in a copy of examples/, so that the files that they write do not lie among the sources
SCRIPTS = ROOT / "build" / "examples"
RUN = "runs/demo"  # there; for the scripts that read a run
SETTINGS: dict[str, Any] = {"languages": ["en", "de", "th", "ar"], "limit": 8, "probes": ()}


def arguments(_conf: dict[str, Any], script: dict[str, Any]) -> list[str]:
    """The command line of a script of the gallery."""
    script_file = Path(script["src_file"])
    if script_file.name == "benchmark_kernels.py":
        return ["8000"]  # a small vocabulary: the reference in fp64 is slow
    return [RUN] if "RUN_FOLDER" in script_file.read_text(encoding="utf-8") else []


sphinx_gallery_conf = {
    "examples_dirs": str(SCRIPTS),
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "copyfile_regex": r".*\.ipynb",  # the notebook becomes a page
    "notebook_extensions": set(),
    "reset_argv": arguments,
    "within_subsection_order": "ExampleTitleSortKey",
    "remove_config_comments": True,
    "download_all_examples": False,
    "default_thumb_file": str(ROOT / "docs" / "images" / "demo.png"),
    "show_memory": False,
    "write_computation_times": False,
    "show_signature": False,
    "abort_on_example_error": True,
    "nested_sections": False,
    "backreferences_dir": None,
}
nb_execution_mode = "force"
nb_execution_in_temp = True  # its run folders, too
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"
nb_merge_streams = True

suppress_warnings = ["config.cache"]  # a function among the settings of the gallery

linkcheck_ignore = [r"https://doi\.org/"]  # publishers refuse robots
linkcheck_timeout = 20
linkcheck_retries = 2

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
    "](../../CONTRIBUTING.md": "](../reference/contributing.md",
    "](../CONTRIBUTING.md": "](reference/contributing.md",
    "](CONTRIBUTING.md": "](docs/reference/contributing.md",
}


def link_to_pages(text: str) -> str:
    """The text of a page; a link to a file outside docs/ leads to the page that shows the file."""
    for target, page in SHOWN.items():
        text = text.replace(target, page)
    text = re.sub(r"\]\(((?:\.\./)*)\.\./examples/(\w+)\.py\)", r"](\1gallery/\2.rst)", text)
    return re.sub(r"\]\(((?:\.\./)*)\.\./examples/(\w+)\.ipynb\)", r"](\1gallery/\2.ipynb)", text)


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

    def on_help(_app: Any, _context: Any, lines: list[str]) -> None:
        """Code in a help text, and its tables, which sphinx-click gives as lines that begin with a bar."""
        shown: list[str] = []
        for line in lines:
            if line.startswith("| "):
                if not shown or not shown[-1].startswith("   "):
                    shown += ["", ".. code-block:: text", ""]
                shown.append(f"   {line.removeprefix('| ')}")
            else:
                shown.append(re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line))
        lines[:] = shown

    def on_start(app: Any) -> None:
        """Copies the examples, and makes the run that some of them read."""
        shutil.copytree(ROOT / "examples", SCRIPTS, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        if app.builder.format == "html" and int(app.config.plot_gallery):
            xprobe.run("smollm2-135m", out=SCRIPTS / RUN, resume=True, **SETTINGS)

    app.connect("builder-inited", on_start, priority=100)  # before the gallery
    for part in ("description", "options"):
        app.connect(f"sphinx-click-process-{part}", on_help)
    app.connect("autodoc-process-signature", on_signature)
    app.connect("autodoc-process-docstring", on_docstring, priority=600)  # after napoleon
    app.connect("doctree-read", on_read)
    app.connect("source-read", on_source)
    app.connect("include-read", on_include)
