"""Writes the tables of a run in other formats: CSV, Parquet, LaTeX for papers, and a data set repository."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from xprobe.arguments import MARKERS, folder_path
from xprobe.errors import UsageError
from xprobe.report.content import groups
from xprobe.report.hub import CARD, dataset_card, tables
from xprobe.report.parts import Cell, Table

if TYPE_CHECKING:
    from xprobe.results import Study

# format -> what is written
FORMATS: dict[str, str] = {
    "csv": "every table of the run as NAME.csv, UTF-8",
    "parquet": "every table of the run as NAME.parquet",
    "latex": "the tables of the page as NAME.tex, for the package booktabs",
    "hub": "a data set repository of the Hugging Face Hub: every table, and a card",
}
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}",
    "[": "{[}", "]": "{]}",
}  # fmt: skip


def export(study: Study, folder: str | Path, file_format: str, *, license: str | None = None) -> list[Path]:
    """Writes the tables of a run into a folder, which is made if it is not there. Files of the same name are replaced.

    Parameters
    ----------
    study : Study
    folder : path
    file_format : str
        One of ``FORMATS``.
    license : str, optional
        Of the format ``hub``: the identifier that the card names (``cc-by-4.0``).

    Returns
    -------
    list of Path
        The files that were written.

    Raises
    ------
    UsageError
        An unknown format, a license that is no identifier or for another format, or a folder that cannot be written.
    RunFolderError
        A table of the run is missing or was changed.
    """
    if file_format not in FORMATS:
        raise UsageError(f"unknown format {file_format!r}; known: {', '.join(FORMATS)}")
    if license is not None and file_format != "hub":
        raise UsageError(f"license is for the format hub, not for {file_format}: leave it out")
    folder = folder_path("folder", folder)
    for name, what in MARKERS.items():
        if (folder / name).is_file() or folder.resolve() == study.path.resolve():
            raise UsageError(f"{folder} is the folder of a {what}, whose files must not change: name another folder")
    if file_format == "hub":
        files = dict(_repository(study, license))
    else:
        files = dict(_latex(study) if file_format == "latex" else _tables(study, file_format))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in files.items():
            part = folder / f".{name}.part"
            write(part)
            part.replace(folder / name)
    except OSError as error:
        raise UsageError(f"the tables cannot be written to {folder}: {error.strerror or error}") from error
    return [folder / name for name in files]


def _tables(study: Study, file_format: str) -> Iterator[tuple[str, Callable[[Path], object]]]:
    for entry in study.manifest.stages.values():
        for name in entry.tables:
            frame = study.table(name)
            if file_format == "parquet":
                yield name, partial(frame.to_parquet, index=False)
            else:
                yield f"{Path(name).stem}.csv", partial(frame.to_csv, index=False)


def _repository(study: Study, license: str | None) -> Iterator[tuple[str, Callable[[Path], object]]]:
    yield CARD, partial(Path.write_text, data=dataset_card(study, license), encoding="utf-8")
    for name, frame in tables(study).items():
        yield f"{name}.parquet", partial(frame.to_parquet, index=False)


def _latex(study: Study) -> Iterator[tuple[str, Callable[[Path], object]]]:
    for group in groups(study):
        for section in group.sections:
            for table in section.tables:
                name = "-".join(re.findall(r"[a-z0-9]+", f"{group.name} {table.title}".lower()))
                yield f"{name}.tex", partial(Path.write_text, data=latex_table(table), encoding="utf-8")


def latex_table(table: Table) -> str:
    """A ``tabular`` with the rules of booktabs; numbers to the right.

    Examples
    --------
    >>> table = Table("Scores", ["language", "F1"], [[Cell("zh_CN"), Cell("0.5 [0.4, 0.6]")]], [False, True])
    >>> print(latex_table(table))
    % Scores
    \\begin{tabular}{lr}
    \\toprule
    language & F1 \\\\
    \\midrule
    zh\\_CN & 0.5 {[}0.4, 0.6{]} \\\\
    \\bottomrule
    \\end{tabular}
    <BLANKLINE>
    """
    numbers = table.numbers or [False] * len(table.heads)
    lines = [
        f"% {table.title}",
        r"\begin{tabular}{" + "".join("r" if one else "l" for one in numbers) + "}",
        r"\toprule",
        _row([Cell(head) for head in table.heads]),
        r"\midrule",
        *(_row(list(row)) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: list[Cell]) -> str:
    return " & ".join(escaped(cell.text) for cell in cells) + r" \\"


def escaped(text: str) -> str:
    """A text as LaTeX prints it.

    Examples
    --------
    >>> escaped("100 % of a_b"), escaped("–")
    ('100 \\\\% of a\\\\_b', '--')
    """
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
