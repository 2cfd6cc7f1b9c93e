"""`xprobe probe` trains on a stored run without its model, keeps other probes, and refuses bad input in one line."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
from xprobe_cli.main import main

import xprobe
from xprobe.config import BUILT_IN_PROBES, DEFAULT_PROBES
from xprobe.runs.lock import FolderLock

SMALL = ["--languages", "en,de,th", "--limit", "9", "--bootstrap", "20"]


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    """A run of a model that is gone."""
    folder = tmp_path_factory.mktemp("probe")
    shutil.copytree(tiny, folder / "model")
    out = folder / "run"
    assert main(["run", str(folder / "model"), *SMALL, "--out", str(out)]) == 0
    shutil.rmtree(folder / "model")
    return out


@pytest.fixture
def run(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def test_training_again_gives_the_same_files(run, capsys):
    before = {path.name: path.read_bytes() for path in run.glob("*.parquet")}
    assert main(["probe", str(run)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    after = {path.name: path.read_bytes() for path in run.glob("*.parquet")}
    assert after == before
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line[:5].strip().isdigit()] == ["0", "1", "2", "3", "4"]
    summaries = [line for line in lines if "selectivity" in line or "cannot be trained" in line]
    assert len(summaries) == 2 * len(DEFAULT_PROBES)  # one for each state
    assert sum("correctness" in line and "cannot be trained" in line for line in lines) == 2  # it is never right
    assert lines[-2:] == [f"files     {run}", f"next      xprobe report {run}"]


def test_one_probe_is_trained_and_the_others_stay(run, capsys):
    before = xprobe.load_study(run)
    assert main(["probe", str(run), "--probe", "language", "--components", "3", "--folds", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["probes"]
    after = xprobe.load_study(run)
    assert len(rows) == len(before.probes) == len(after.probes)
    for name in ("alignment", "correctness"):
        pd.testing.assert_frame_equal(after["en-x"].probes.loc[name], before["en-x"].probes.loc[name])
    assert set(after["en-x"].probes.loc["language"]["folds"]) == {2}
    assert set(before["en-x"].probes.loc["language"]["folds"]) == {3}
    pd.testing.assert_frame_equal(after.layers, before.layers)
    trained, was = (study.manifest.stages["probes"].results["trained"] for study in (after, before))
    assert trained["language"]["n_components"] == 3
    assert trained["alignment"] == was["alignment"]


def test_a_run_without_probes_can_get_them_later(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", str(tiny), *SMALL, "--signals", "readiness", "--probes", "none", "--out", str(out)]) == 0
    study = xprobe.load_study(out)
    assert study.probes.empty
    assert "encoding" not in study.stability
    assert main(["probe", str(out), "--probe", "alignment"]) == 0
    study = xprobe.load_study(out)
    assert set(study.probes["probe"]) == {"alignment"}
    assert study.stability["encoding_probed"].notna().all()
    assert "encoding_probed_last" in study.examples
    capsys.readouterr()
    assert (
        main(["run", str(tiny), *SMALL, "--signals", "readiness", "--probes", "none", "--out", str(out), "--resume"])
        == 0
    )


def test_bad_input_gets_one_clear_line(run, tiny, tmp_path, capsys):
    without = tmp_path / "without"
    assert main(["run", str(tiny), *SMALL, "--no-rows", "--out", str(without)]) == 0
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    next((broken / "shards").iterdir()).write_bytes(b"nothing")
    capsys.readouterr()
    for arguments, code, word in (
        ([str(tmp_path / "nowhere")], 2, "not a run folder"),
        ([str(tmp_path)], 2, "not a run folder"),
        ([str(without)], 2, "--no-rows"),
        ([str(broken)], 1, "--resume"),
        ([str(run), "--probe", "syntax"], 2, "syntax"),
        ([str(run), "--folds", "1"], 2, "--folds"),
        ([str(run), "--alpha", "0"], 2, "--alpha"),
        ([str(run), "--jobs", "0"], 2, "jobs"),
        ([str(run), "--device", "foo"], 2, "foo"),
        ([str(run), "--device", "cpu:0"], 2, "SCIPY_ARRAY_API"),
        ([str(run), "--c", "inf"], 2, "C must be a finite number"),
        ([str(run), "--alpha", "inf"], 2, "alpha must be a finite number"),
        ([str(run), "--seed", "99999999999"], 2, "--seed"),
    ):
        assert main(["probe", *arguments]) == code, arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        assert word in err, (arguments, err)
    assert len(xprobe.load_study(run).probes) > 0


def test_training_that_cannot_be_written_leaves_the_run_as_it_was(run, monkeypatch):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def ends(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", ends)
        assert main(["probe", str(run), "--probe", "language", "--components", "2"]) == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(["probe", str(run), "--probe", "language", "--components", "2"]) == 0
    assert xprobe.load_study(run).manifest.stages["probes"].results["trained"]["language"]["n_components"] == 2


def test_the_help_lists_every_built_in_probe(capsys):
    assert main(["probe", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, description in BUILT_IN_PROBES.items():
        assert f"{name} {description}" in words


def test_a_second_process_is_refused(run, capsys):
    with FolderLock(run):
        assert main(["probe", str(run)]) == 2
    assert "is being written by this process" in capsys.readouterr().err


def test_the_object_on_stdout_is_json_without_nan(run, capsys):
    assert main(["probe", str(run), "--probe", "correctness", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out, parse_constant=lambda name: pytest.fail(name))["probes"]
    assert {row["probe"] for row in rows} == set(DEFAULT_PROBES)
    assert {row["score"] for row in rows if row["probe"] == "correctness"} == {None}
    assert err == ""
