"""Tables of a run in other formats."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from xprobe_cli.main import main

import xprobe
from xprobe.errors import RunFolderError, UsageError
from xprobe.report.export import export, latex_table
from xprobe.report.parts import Cell, Table


@pytest.fixture(scope="module")
def study(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> xprobe.Study:
    out = tmp_path_factory.mktemp("export") / "run"
    options: dict[str, Any] = {"languages": ("en", "de"), "limit": 8, "bootstrap": 30, "permutations": 20}
    return xprobe.run(str(tiny), out=out, **options).evaluate(xprobe.AnswerSettings(max_new_tokens=3))


@pytest.mark.parametrize("file_format", ["csv", "parquet"])
def test_every_table_is_written_with_the_same_values(study: xprobe.Study, tmp_path: Path, file_format: str) -> None:
    files = export(study, tmp_path / "new" / "folder", file_format)
    tables = [name for entry in study.manifest.stages.values() for name in entry.tables]
    assert [path.stem for path in files] == [Path(name).stem for name in tables]
    assert sorted(path.name for path in files[0].parent.iterdir()) == sorted(path.name for path in files)
    for path, name in zip(files, tables, strict=True):
        found = pd.read_csv(path, keep_default_na=False) if file_format == "csv" else pd.read_parquet(path)
        wanted = study.table(name)
        assert list(found.columns) == list(wanted.columns)
        assert len(found) == len(wanted) > 0
    layers = pd.read_csv(tmp_path / "new/folder/layers.csv") if file_format == "csv" else pd.read_parquet(files[0])
    pd.testing.assert_series_equal(layers["value"], study.layers["value"], rtol=1e-12)


def test_latex_tables_hold_the_cells_of_the_page(study: xprobe.Study, tmp_path: Path) -> None:
    files = export(study, tmp_path, "latex")
    text = (tmp_path / "en-x-languages-side-by-side.tex").read_text(encoding="utf-8")
    assert tmp_path / "en-x-scores.tex" in files
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [row.split(" & ")[0] for row in rows] == ["language", "en", "de"]
    columns = re.search(r"begin{tabular}{([lr]+)}", text)
    assert columns is not None
    assert {row.count(" & ") + 1 for row in rows} == {len(columns.group(1))}


def has_latex() -> bool:
    """Whether pdflatex and the package booktabs are there."""
    if shutil.which("pdflatex") is None or shutil.which("kpsewhich") is None:
        return False
    return subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not has_latex(), reason="no LaTeX with booktabs on this machine")
def test_latex_accepts_hostile_texts(tmp_path: Path) -> None:
    rows = [[Cell(r"50% \x_{1} $&#~^<>[a]"), Cell("–")], [Cell("[b]"), Cell("1 [0, 2]")]]
    table = latex_table(Table("T", ["a_b", "c%"], rows, [False, True]))
    document = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{table}\\end{{document}}"
    (tmp_path / "t.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=batchmode", "t.tex"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0


def test_what_cannot_be_exported_is_refused(study: xprobe.Study, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown format 'xlsx'; known: csv, parquet, latex"):
        export(study, tmp_path, "xlsx")
    with pytest.raises(UsageError, match="is the folder of a run"):
        export(study, study.path, "parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        export(study, tmp_path / "file", "csv")
    copy = shutil.copytree(study.path, tmp_path / "run")
    (copy / "answers.parquet").unlink()
    with pytest.raises(RunFolderError, match=r"answers\.parquet"):
        export(xprobe.load_study(copy), tmp_path / "out", "csv")
    assert not (tmp_path / "out").exists()


def test_other_runs_and_sweeps_are_not_written_into(study: xprobe.Study, tmp_path: Path) -> None:
    for name, what in (("manifest.json", "run"), ("plan.json", "sweep")):
        (tmp_path / what).mkdir()
        (tmp_path / what / name).write_text("{}")
        with pytest.raises(UsageError, match=f"is the folder of a {what}, whose files must not change"):
            export(study, tmp_path / what, "parquet")
        assert [file.name for file in (tmp_path / what).iterdir()] == [name]


def test_the_command_names_its_files(study: xprobe.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(study.path), "--out", str(tmp_path / "a")]) == 0
    assert str(tmp_path / "a" / "layers.csv") in capsys.readouterr().out.splitlines()
    assert main(["export", str(study.path), "--format", "latex", "--out", str(tmp_path / "b"), "--json"]) == 0
    assert all(Path(name).is_file() for name in json.loads(capsys.readouterr().out)["files"])


def test_a_mistyped_command_is_named_with_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprot", "x"]) == 2
    assert "No such command 'exprot'. Did you mean export?" in capsys.readouterr().err
    assert main(["nothing-like-it"]) == 2
    assert "No such command 'nothing-like-it'." in capsys.readouterr().err
