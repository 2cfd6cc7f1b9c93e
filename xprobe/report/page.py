"""The page of a run: one HTML file that opens from the disk and takes nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.arguments import check_replaceable, folder_path
from xprobe.errors import UsageError
from xprobe.report.content import about, groups
from xprobe.report.parts import Group
from xprobe.report.places import shown_name

if TYPE_CHECKING:
    from xprobe.results import Study

LIBRARIES = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")  # in this order


def page(study: Study) -> str:
    """The page of a finished run, as HTML. Texts of data and model are escaped.

    Parameters
    ----------
    study : Study

    Returns
    -------
    str
        A whole document.
    """
    manifest = study.manifest
    return render(shown_name(manifest.model.name), about(study), groups(study), len(manifest.warnings))


def write_page(study: Study, path: str | Path) -> Path:
    """Writes ``page`` into a file, all of it or nothing.

    Raises
    ------
    UsageError
        The file cannot be written, or is one that a run or a sweep needs.
    """
    return write_html(page(study), path)


def render(heading: str, text: str, parts: Sequence[Group], warnings: int = 0) -> str:
    """A document with these groups of sections. ``warnings``: how many the section "run-warnings" lists."""
    from markupsafe import Markup

    figures = {figure.name: figure.chart for group in parts for section in group.sections for figure in section.figures}
    return template("page.html.j2").render(
        title=heading,
        heading=heading,
        about=text,
        warnings=warnings,
        groups=parts,
        charts=Markup(_json(figures)),
        libraries=[Markup(_text("assets", name)) for name in LIBRARIES],
        style=Markup(_text("templates", "page.css")),
        script=Markup(_text("templates", "page.js")),
    )


def write_html(html: str, path: str | Path) -> Path:
    """Writes a document into a file, all of it or nothing; errors as ``write_page``."""
    path = folder_path("path", path)
    part = path.with_name(f".{path.name}.part")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name the file, for example {path / 'report.html'}")
    check_replaceable(path)
    try:
        part.write_text(html, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UsageError(f"the page cannot be written to {path}: {error.strerror or error}") from error
    return path


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _text(folder: str, name: str) -> str:
    return resources.files("xprobe.report").joinpath(folder, name).read_text(encoding="utf-8")


@cache
def template(name: str) -> Any:
    """A template of the folder ``templates``, which escapes what it is given."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_text("templates", name))
