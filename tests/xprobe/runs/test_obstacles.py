"""Something else than a file where a run keeps one: one line says what stands where, and nothing hangs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from xprobe_cli.main import main

import xprobe
from xprobe.errors import RunFolderError, UsageError, XprobeError
from xprobe.runs.folder import JOURNAL, LAYERS, MANIFEST, SHARDS, RunFolder

SHARD = f"{SHARDS}/en-x.en.a000p000.safetensors"
PARTS = [".manifest.json.part", ".layers.parquet.part", f"{SHARDS}/.en-x.en.a000p000.safetensors.part", ".rows-x"]
WORDS = {
    "folder": "a folder",
    "pipe": "a named pipe",
    "dead link": "a link( to nothing)?",
    "loop": "a link( to nothing)?",
}


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    xprobe.run(str(tiny), out=out, languages=("en",), limit=1, bootstrap=20, probes=())
    return out


@pytest.fixture(params=["running", "done"])
def out(request: pytest.FixtureRequest, finished: Path, tmp_path: Path) -> Path:
    out = shutil.copytree(finished, tmp_path / "run")
    folder = RunFolder(out)
    folder.write_manifest(replace(folder.read_run(), status=request.param))
    return out


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    """A named pipe that is opened waits for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def put(path: Path, kind: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else path.with_name("nowhere"))


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("name", [MANIFEST, JOURNAL, LAYERS, SHARD, SHARDS, ".lock", *PARTS])
def test_an_obstacle_is_named_and_not_changed(
    name: str, kind: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if (name, kind) == (SHARDS, "folder"):
        pytest.skip("a folder belongs there")
    put(out / name, kind)
    code = main(["run", "--out", str(out), "--resume"])
    err = capsys.readouterr().err
    if name in (LAYERS, SHARD) and "folder" != kind != "pipe":
        assert code == 0, err  # a link is no obstacle: the new file takes its name
        assert (out / name).is_file()
        assert not (out / name).is_symlink()
        return
    assert code == 1
    assert err.count("\n") == 1
    assert re.search(
        rf"{re.escape(str(out / name))} is {WORDS[kind]}, not a f\w+: (move it away, then try again|put)", err
    )
    assert os.path.lexists(out / name)
    if kind == "folder":
        assert (out / name / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("name", [JOURNAL, LAYERS, SHARD, SHARDS, ".lock"])
def test_a_run_is_resumed_after_the_obstacle_is_moved_away(name: str, out: Path, finished: Path) -> None:
    put(out / name, "pipe")
    assert main(["run", "--out", str(out), "--resume"]) == 1
    (out / name).unlink()
    assert main(["run", "--out", str(out), "--resume"]) == 0
    assert (out / LAYERS).read_bytes() == (finished / LAYERS).read_bytes()
    assert (out / SHARD).read_bytes() == (finished / SHARD).read_bytes()


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("name", [MANIFEST, LAYERS])
def test_reading_a_run_names_the_obstacle(name: str, kind: str, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    put(out / name, kind)
    with pytest.raises(RunFolderError, match=rf"{re.escape(str(out / name))} is {WORDS[kind]}, not a file"):
        xprobe.load_study(out)


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("name", [JOURNAL, SHARD, ".lock"])
def test_training_probes_names_the_obstacle(
    name: str, kind: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    put(out / name, kind)
    assert main(["probe", str(out), "--probe", "language"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert (out / name).name in err
    assert re.search("move it away, then try again|--resume", err)


@pytest.mark.parametrize("name", [".lock", ".manifest.json.part"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_new_run_names_the_obstacle(name: str, kind: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    put(tmp_path / "run" / name, kind)
    with pytest.raises(XprobeError, match=rf"{name} is {WORDS[kind]}, not a file"):
        xprobe.run(str(tiny), out=tmp_path / "run", languages=("en",), limit=1)


def test_a_pipe_as_out_is_refused_as_a_pipe(tiny: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run")
    with pytest.raises(UsageError, match="is a named pipe"):
        xprobe.run(str(tiny), out=tmp_path / "run", languages=("en",), limit=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
@pytest.mark.parametrize("name", [MANIFEST, JOURNAL, LAYERS])
def test_a_file_that_may_not_be_read_is_named(name: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if json.loads((out / MANIFEST).read_text())["status"] == "running" and name == LAYERS:
        pytest.skip("it is written again")
    (out / name).chmod(0)
    code = main(["run", "--out", str(out), "--resume"])
    err = capsys.readouterr().err
    if name == LAYERS:
        assert code == 0  # written again
    else:
        assert f"cannot read {out / name}: Permission denied; give yourself the right to read it" in err
