"""A run killed at any moment goes on where it was, and ends with the same files as one that was left in peace."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from forks import Forks
from support.runs import contents

import xprobe
from xprobe.errors import RunFolderError, UsageError
from xprobe.runs.folder import JOURNAL, MANIFEST, SHARDS, RunFolder
from xprobe.runs.lock import LOCK


@dataclass(frozen=True)
class Whole:
    """What a run leaves that nobody disturbs, the steps that it took, and its seconds."""

    files: dict[str, Any]
    steps: list[str]
    groups: int
    seconds: float


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out = tmp_path_factory.mktemp("whole") / "run"
    forks.run(out.with_name("first"))
    started = time.monotonic()
    ended = forks.run(out)
    assert ended["code"] == 0
    groups = json.loads((out / MANIFEST).read_text())["groups"]
    return Whole(files(out), ended["steps"], len(groups), time.monotonic() - started)


def files(folder: Path) -> dict[str, Any]:
    """Every file's bytes, hidden ones included; of the manifest all that is not a time or a place."""
    return contents(folder)


def check_what_is_there(out: Path, whole: Whole) -> None:
    """What a reader finds after a kill: each shard that counts as finished is right, each file whole or not there."""
    for name in RunFolder(out).finished_shards():
        assert (out / SHARDS / name).read_bytes() == whole.files[f"{SHARDS}/{name}"]
    done = RunFolder(out).has_manifest() and RunFolder(out).read_run().status == "done"
    for name in ("layers.parquet", "examples.parquet"):
        if (out / name).exists():  # before the end, perhaps without the probes' columns: whole in any case
            assert (out / name).read_bytes() == whole.files[name] or (not done and len(pd.read_parquet(out / name)))
    if done:
        assert (
            xprobe.load_study(out).manifest.to_dict()["stages"]["phases"]["results"]
            == (whole.files[MANIFEST]["stages"]["phases"]["results"])
        )
    else:
        with pytest.raises((RunFolderError, UsageError), match=r"not finished|not a run folder"):
            xprobe.load_study(out)


def kill_and_resume(forks: Forks, whole: Whole, out: Path, at: int, half: bool = False) -> None:
    before = whole.steps[: at - 1]
    ended = forks.run(out, at=at, half=half)
    assert ended["code"] == -(signal.SIGXFSZ if half else signal.SIGKILL), ended
    check_what_is_there(out, whole)
    kept = len(RunFolder(out).finished_shards())
    entered = max((at for at, step in enumerate(before, 1) if step == f"sync {JOURNAL}"), default=0)
    assert kept >= sum(
        step.startswith(f"rename {SHARDS}/") for step in before[:entered]
    )  # the wave in hand may be lost
    resumed = forks.run(out)
    assert resumed["code"] == 0, resumed
    written = sum(step.startswith(f"rename {SHARDS}/") for step in resumed["steps"])
    assert written == whole.groups - kept  # nothing that was kept is computed again
    assert files(out) == whole.files


def of(steps: list[str], what: str, which: int) -> int:
    """Number of a step, from 1."""
    return [at for at, step in enumerate(steps, 1) if step == what][which]


SHARD = "shards/.en-x.en.a001p000.safetensors.part"
MOMENTS = [
    ("open .lock", 0),
    ("mkdir shards", 0),
    ("open .manifest.json.part", 0),
    ("rename .manifest.json.part", 0),
    (f"open {SHARD}", 0),
    (f"sync {SHARD}", 0),
    (f"rename {SHARD}", 0),
    ("sync shards", 1),
    ("half of a write to journal.jsonl", 0),
    ("half of a write to journal.jsonl", 1),
    ("sync journal.jsonl", -1),
    ("rename .examples.parquet.part", 0),
    ("open .layers.parquet.part", 0),
    ("rename .manifest.json.part", -1),
    ("sync .", -1),
    ("remove .lock", -1),
]


@pytest.mark.parametrize(("what", "which"), MOMENTS, ids=[f"{what} {which}" for what, which in MOMENTS])
def test_a_run_killed_before_a_step_can_be_resumed(
    what: str, which: int, forks: Forks, whole: Whole, tmp_path: Path
) -> None:
    kill_and_resume(forks, whole, tmp_path / "run", of(whole.steps, what, which))


@pytest.mark.parametrize("name", [".manifest.json.part", SHARD, "journal.jsonl", ".layers.parquet.part"])
def test_a_run_killed_during_a_write_can_be_resumed(name: str, forks: Forks, whole: Whole, tmp_path: Path) -> None:
    kill_and_resume(forks, whole, tmp_path / "run", of(whole.steps, f"open {name}", 0), half=True)


@pytest.mark.slow
def test_a_run_killed_before_any_step_can_be_resumed(forks: Forks, whole: Whole, tmp_path: Path) -> None:
    for at in range(1, len(whole.steps) + 1):
        kill_and_resume(forks, whole, tmp_path / str(at), at)


def kill_at_random(forks: Forks, whole: Whole, folder: Path, kills: int, seed: int) -> int:
    """Kills runs ``kills`` times, each resumed until it is done. Gives the number of runs that were done."""
    moments, done, killed = random.Random(seed), 0, 0
    while killed < kills:
        out = folder / str(done)
        pid = forks.start(out)
        time.sleep(moments.uniform(0, whole.seconds))
        os.kill(pid, signal.SIGKILL)
        ended = forks.wait(pid)
        assert ended["code"] in (0, -signal.SIGKILL), ended
        killed += ended["code"] != 0
        if ended["code"] == 0 or killed == kills:
            assert forks.run(out)["code"] == 0
            assert files(out) == whole.files
            done += 1
        else:
            check_what_is_there(out, whole)
    return done


def test_a_run_killed_at_random_moments_ends_with_the_same_files(forks: Forks, whole: Whole, tmp_path: Path) -> None:
    assert kill_at_random(forks, whole, tmp_path, kills=25, seed=0) >= 1


@pytest.mark.slow
def test_a_run_killed_at_very_many_random_moments_ends_with_the_same_files(
    forks: Forks, whole: Whole, tmp_path: Path
) -> None:
    assert kill_at_random(forks, whole, tmp_path, kills=100, seed=1) >= 1


def test_files_are_synced_before_they_are_renamed(whole: Whole) -> None:
    """What a power cut would leave: synced, then renamed, then the folder synced, and only then in the journal."""
    steps = whole.steps
    for at, step in enumerate(steps):
        if step.startswith("rename "):
            part = step.removeprefix("rename ")
            assert f"sync {part}" in steps[:at]
            synced = steps.index(f"sync {os.path.dirname(part) or '.'}", at)
            between = steps[at + 1 : synced]  # other shards of the wave, which are written side by side
            assert all(step.split()[1].startswith(f"{SHARDS}/.") for step in between)
        if step.startswith(f"rename {SHARDS}/"):
            assert steps[synced + 1 : synced + 4] == [
                f"open {JOURNAL}", f"half of a write to {JOURNAL}", f"sync {JOURNAL}",
            ]  # fmt: skip
    sizes = [part.count(f"rename {SHARDS}/") for part in "\n".join(steps).split(f"sync {JOURNAL}")]
    assert max(sizes) > 1  # a wave with several shards
    assert sum(size > 0 for size in sizes) > 1
    first = steps.index(f"sync {JOURNAL}")
    assert steps[first + 1] == "sync ."  # the name of a new journal


def test_a_second_process_is_refused_while_the_first_one_runs(forks: Forks, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = forks.start(out)
    while not (out / MANIFEST).exists():
        time.sleep(0.001)
    os.kill(first, signal.SIGSTOP)
    refused = forks.run(out)
    assert refused["code"] == 1
    assert f"{out} is being written by process {first} on " in refused["error"]
    assert "UsageError" in refused["error"]
    assert "stop it, or use another folder" in refused["error"]
    os.kill(first, signal.SIGCONT)
    assert forks.wait(first)["code"] == 0
    assert files(out) == whole.files


def test_the_lock_of_a_killed_process_blocks_no_other(forks: Forks, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "run"
    forks.run(out, at=of(whole.steps, f"rename {SHARD}", 0))
    assert (out / LOCK).exists()
    assert forks.run(out)["code"] == 0
    assert not (out / LOCK).exists()
