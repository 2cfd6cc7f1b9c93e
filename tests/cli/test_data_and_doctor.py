"""`xprobe data` and `xprobe doctor`."""

from __future__ import annotations

import gzip
import json
import re
import tomllib
from pathlib import Path

import pytest
from support.families import write_set
from xprobe_cli import data
from xprobe_cli.main import main

from xprobe import doctor


@pytest.fixture
def damaged(tmp_path):
    """A set of two languages: one answer moved, one id missing in German."""
    items = [("A b c.", "What?", "b"), ("D e f.", "Which?", "e"), ("G h i.", "Who?", "h")]
    folder = write_set(tmp_path / "set", {"en": items, "de": items[:2]})
    path = folder / "toy.en.json"
    document = json.loads(path.read_text())
    document["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 4
    path.write_text(json.dumps(document))
    return folder


def test_list_names_the_sets_and_what_they_hold(capsys, empty_cache, monkeypatch):
    monkeypatch.delenv("XPROBE_XQUAD_DIR", raising=False)
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert "builtin   36 questions on 12 paragraphs in en ar de el es hi ro ru th tr vi zh" in out
    assert "xprobe data fetch xquad" in out


def test_list_as_json(capsys):
    assert main(["data", "list", "--json"]) == 0
    sets = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["sets"]}
    assert len(sets["builtin"]["languages"]) == 12


def test_check_of_the_built_in_set_finds_nothing(capsys):
    assert main(["data", "check", "builtin"]) == 0
    assert "0 problems" in capsys.readouterr().out


def test_check_lists_every_problem_with_file_and_id(capsys, damaged):
    assert main(["data", "check", str(damaged)]) == 1
    out = capsys.readouterr().out
    assert "toy.en.json: id q0: answer is not at answer_start ('b' is not at 4; its text is at 2)" in out
    assert "toy.de.json: id q2: id is missing in a parallel file" in out
    assert out.count("id q0") == 1  # left out of the English file, but not reported as missing from it as well
    assert "en  2 usable questions" in out


def test_check_as_json_and_strict(capsys, damaged):
    assert main(["data", "check", str(damaged), "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["questions"] == {"en": 2, "de": 2}
    assert {problem["reason"] for problem in value["problems"]} == {
        "answer is not at answer_start", "id is missing in a parallel file",
    }  # fmt: skip
    assert main(["data", "check", str(damaged), "--strict"]) == 1
    assert "toy.en.json" in capsys.readouterr().err


def test_check_reads_lines_and_compressed_files(capsys, tmp_path):
    record = {"id": "q0", "context": "A b c.", "question": "What?", "answers": {"text": ["b"], "answer_start": [2]}}
    bad = {**record, "id": "q1", "answers": {"text": ["b"], "answer_start": [0]}}
    (tmp_path / "toy.en.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps(bad)}\n{{\n")
    (tmp_path / "toy.de.json.gz").write_bytes(gzip.compress(json.dumps([record]).encode()))
    assert main(["data", "check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "toy.en.jsonl: line 2, id q1: answer is not at answer_start ('b' is not at 0; its text is at 2)" in out
    assert "toy.en.jsonl: line 3: not valid JSON" in out
    assert "en  1 usable question\nde  1 usable question\n2 problems" in out
    assert main(["data", "check", str(tmp_path / "toy.de.json.gz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == {"de": 1}


def test_help_names_the_layouts(capsys):
    for arguments in (["run", "--help"], ["data", "check", "--help"]):
        assert main(arguments) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "NAME.<lang>.jsonl, optionally with .gz" in out
        assert "flat records" in out
    assert main(["data", "list"]) == 0
    assert "flat records" in capsys.readouterr().out


def test_a_fetch_without_connection_names_the_alternatives(capsys, empty_cache):
    assert main(["data", "fetch", "xquad", "--languages", "en", "--url", "http://127.0.0.1:9"]) == 1
    err = capsys.readouterr().err
    assert "http://127.0.0.1:9/xquad.en.json" in err
    assert "--url" in err
    assert main(["data", "fetch", "xquad", "--languages", "fr"]) == 2


def test_doctor_says_what_works(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "The main job runs here" in out
    for name in ("torch", "transformers", "lens: cpu", "data: builtin", "cache"):
        assert f"ok      {name}" in out


def test_doctor_says_what_each_missing_package_would_add(capsys, monkeypatch):
    versions = doctor.versions
    monkeypatch.setattr(doctor, "versions", lambda names: {**versions(names), "matplotlib": None})
    assert main(["doctor"]) == 0
    assert "matplotlib            not installed; adds figures: pip install 'xprobe[plot]'" in capsys.readouterr().out


def test_doctor_fails_when_the_main_job_cannot_run(capsys, monkeypatch):
    versions = doctor.versions
    monkeypatch.setattr(doctor, "versions", lambda names: {**versions(names), "pyarrow": None})
    assert main(["doctor", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["works"] is False
    assert next(check for check in value["checks"] if check["name"] == "pyarrow")["needed"]


def test_doctor_reports_a_second_owner_of_the_kernels_files(capsys, monkeypatch):
    versions = doctor.versions
    monkeypatch.setattr(doctor, "versions", lambda names: {**versions(names), "xprobe-kernels": "0.1.9"})
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert (
        "-       xprobe_kernels        xprobe-kernels 0.1.9 is installed beside xprobe and owns the same files" in out
    )
    assert "pip uninstall xprobe-kernels, then pip install --force-reinstall --no-deps xprobe" in out


def test_doctor_says_how_to_get_the_kernels_files_back(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert main(["doctor"]) == 1
    assert "MISSING xprobe_kernels" in (out := capsys.readouterr().out)
    assert "files are missing: pip install --force-reinstall --no-deps xprobe" in out


def test_doctor_knows_every_required_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.match(r"[\w-]+", entry)[0] for entry in project["dependencies"]}
    assert required - {"click"} == {name for name, (needed, *_) in doctor.PIECES.items() if needed}


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    def load(*arguments, **options):
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")

    monkeypatch.setattr(data, "load_data", load)
    assert main(["data", "check", "builtin"]) == 1
    assert "error: the package pyarrow is missing: `xprobe doctor` says how to install it" in capsys.readouterr().err


def test_files_with_other_names_and_codes_with_subtags(tmp_path, capsys):
    folder = write_set(tmp_path / "set", {"en": [("A b c.", "What?", "b")], "zh-Hans-CN": [("A b c.", "What?", "b")]})
    (folder / "notes.json").write_text("{}")
    (folder / "toy.DE.json").write_text("{}")
    assert main(["data", "check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "zh-Hans-CN  1 usable question\n" in out
    assert "toy.DE.json: file: name is not toy.<language>.json" in out
    assert "notes.json" not in out


def test_a_language_cannot_be_called_all(tmp_path, capsys):
    folder = write_set(tmp_path / "set", {"en": [("A b c.", "What?", "b")], "all": [("A b c.", "What?", "b")]})
    assert main(["data", "check", str(folder)]) == 2
    assert "'all'" in capsys.readouterr().err


def test_ids_cannot_write_to_the_terminal(tmp_path, capsys):
    folder = write_set(tmp_path / "set", {"en": [("A b c.", "What?", "b"), ("D e f.", "Which?", "e")]})
    path = folder / "toy.en.json"
    path.write_text(
        path.read_text().replace('"q0"', '"a\\nb\\u001b[31mred"').replace('"answer_start": 2', '"answer_start": 1', 1)
    )
    assert main(["data", "check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "a\\nb\\x1b[31mred" in out


def test_an_empty_cache_folder_still_says_how_to_fetch(empty_cache, capsys, monkeypatch):
    monkeypatch.delenv("XPROBE_XQUAD_DIR", raising=False)
    (empty_cache / "data" / "xquad").mkdir(parents=True)
    assert main(["data", "check", "xquad"]) == 2
    assert "xprobe data fetch xquad" in capsys.readouterr().err
