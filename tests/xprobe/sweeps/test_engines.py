"""Engines: the same runs on Ray and on submitit's own executor, and what a missing package is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.families import save_tiny_model
from support.runs import contents
from support.sweeps import process_of, wait_for, write_toml

from xprobe.errors import UsageError
from xprobe.sweeps.engines import make_engine
from xprobe.sweeps.one import compute_model
from xprobe.sweeps.run import open_sweep, sweep

ONE_THREAD = {"cpus": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "one")
    save_tiny_model(folder / "two", "qwen3")
    return folder


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    engine: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    file = write_toml(tmp_path / "a.toml", [{"model": "org/one"}])
    with pytest.raises(UsageError, match=rf"needs the package {package}: pip install 'xprobe\[{engine}\]'"):
        sweep(file, out=tmp_path / "sweep", engine=engine, look=False)


@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_a_cluster_that_is_not_there_is_named(engine: str, tmp_path: Path) -> None:
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}[engine])
    if shutil.which("srun"):
        pytest.skip("this machine belongs to a Slurm cluster")
    file = write_toml(tmp_path / "a.toml", [{"model": "org/one"}])
    address, words = {"ray": ("127.0.0.1:1", "cannot reach the Ray cluster '127.0.0.1:1': ConnectionRefusedError"),
                      "slurm": (None, "cannot use Slurm: .*srun")}[engine]  # fmt: skip
    with pytest.raises(UsageError, match=words):
        sweep(file, out=tmp_path / "sweep", engine=engine, address=address, look=False)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_an_engine_goes_on_with_what_another_began(engine: str, models: Path, tmp_path: Path) -> None:
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}[engine])
    entries: list[dict[str, Any]] = [{"model": "one"}, {"model": "two"}, {"model": "gone"}]
    if engine == "ray":
        entries.append({"model": "one", "name": "greedy", "gpus": 64})
    file = write_toml(models / f"{engine}.toml", entries, resources=ONE_THREAD, slurm={"cluster": "local"})
    folder = open_sweep(file, tmp_path / "sweep")
    compute_model(folder, "one", lambda event: None)
    before = contents(folder.run("one"))
    found = sweep(folder.path, engine=engine, workers=2, look=False)
    states = {status.name: status.state for status in found.statuses}
    assert states == {"one": "done", "two": "done", "gone": "failed"} | (
        {"greedy": "refused"} if engine == "ray" else {}
    )
    errors = {status.name: status.errors for status in found.statuses}
    assert "unknown model 'gone'" in errors["gone"]["states"]
    if engine == "ray":
        assert errors["greedy"] == {"engine": "GPU 64 is more than any node of the Ray cluster has (0)"}
    assert contents(folder.run("one")) == before
    alone = open_sweep(file, tmp_path / "alone")
    compute_model(alone, "two", lambda event: None)
    assert contents(folder.run("two")) == contents(alone.run("two"))


def test_a_job_of_slurm_has_the_demands_of_its_own_model(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's executor keeps what it was told for the job before. A forecast of memory is no limit of a job."""
    submitit = pytest.importorskip("submitit")
    entries = [{"model": "one", "memory": "64 GiB", "gpus": 2, "cpus": 16, "hours": 2}, {"model": "two"}]
    slurm = {"cluster": "local", "timeout_min": 7, "slurm_mem": "3GB"}
    folder = open_sweep(write_toml(models / "jobs.toml", entries, slurm=slurm), tmp_path / "sweep")
    told: list[dict[str, Any]] = []

    def submit(executor: Any, *arguments: Any) -> None:
        told.append(dict(executor._executor.parameters))

    monkeypatch.setattr(submitit.AutoExecutor, "submit", submit)
    engine = make_engine("slurm", folder, 1)
    for name in ("one", "two"):
        engine.start(name, replace(folder.plan[name].resources, memory=10**9))
    one, two = told
    assert (one["mem_gb"], one["gpus_per_node"], one["cpus_per_task"], one["timeout_min"]) == (64, 2, 16, 120)
    assert two["timeout_min"] == 7
    assert not {"mem_gb", "gpus_per_node", "cpus_per_task"} & set(two)


@pytest.mark.slow
def test_ray_starts_a_task_again_whose_worker_was_killed(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    file = write_toml(
        models / "kill.toml", [{"model": "one", "batch_tokens": 1}],
        {"languages": ["en", "de"], "limit": 24, "bootstrap": 20, "probes": []}, resources=ONE_THREAD,
    )  # fmt: skip
    folder = open_sweep(file, tmp_path / "sweep")
    killed: list[int] = []

    def kill_worker() -> None:
        wait_for(lambda: len(list(folder.run("one").glob("shards/*.safetensors"))) >= 2)
        found = process_of(folder.path.resolve(), "one")
        assert found is not None
        child, worker = found
        os.kill(worker, signal.SIGKILL)
        killed.append(child)
        wait_for(lambda: not Path(f"/proc/{child}").exists(), 20)  # no process goes on without its worker

    killer = threading.Thread(target=kill_worker)
    killer.start()
    ended = subprocess.run(
        [sys.executable, "-m", "xprobe_cli", "sweep", str(folder.path), "--engine", "ray", "--no-forecast", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True, text=True,
    )  # fmt: skip
    killer.join()
    assert killed
    assert ended.returncode == 0
    assert "A worker died" in ended.stderr  # Ray says so, and not among the results
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [(model["state"], model["starts"]) for model in lines[-1]["models"]] == [("done", 2)]
    whole = open_sweep(file, tmp_path / "whole")
    compute_model(whole, "one", lambda event: None)
    assert contents(folder.run("one")) == contents(whole.run("one"))
