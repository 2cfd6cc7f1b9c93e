"""Eight models with all stages on Ray, with two workers, disturbed; and the same one after the other, undisturbed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.families import save_tiny_model
from support.runs import contents
from support.sweeps import process_of, wait_for, write_toml

import xprobe
from xprobe.config import DEFAULT_MODEL
from xprobe.errors import XprobeError
from xprobe.models import loading
from xprobe.sweeps.plan import STAGE_SETTINGS
from xprobe.sweeps.run import open_sweep, sweep

ROOT = Path(__file__).parents[3]
NOISE = ("0.1", "0.2", "0.3")
FAMILIES = ("llama", "gpt2", "gemma2", "qwen3")
STUDY = {"languages": ["en", "de"], "limit": 8, "bootstrap": 100, "permutations": 20, "probes": ["language"],
         "template": "plain"}  # fmt: skip
STAGES: dict[str, dict[str, Any]] = {
    "answers": {"max_new_tokens": 8},
    "oracle": {"limit": 2, "spans": False, "without_question": False},
    "relevance": {"limit": 2},
    "patching": {"limit": 2, "cross": 0, "controls": 0},
    "lenses": {"limit": 2},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, three noisy copies, four tiny families; one without weights, one with too little memory."""
    try:
        loading.resolve(DEFAULT_MODEL)
    except XprobeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("models")
    command = [sys.executable, str(ROOT / "benchmarks" / "noisy_copies.py"), str(folder), "--noise", ",".join(NOISE)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run(command, check=True, env=env, capture_output=True)
    for name in FAMILIES:
        save_tiny_model(folder / name, name)
    shutil.copytree(folder / "llama", folder / "broken")
    (folder / "broken" / "model.safetensors").unlink()
    models = [
        {"model": DEFAULT_MODEL, "name": "demo", "role": "post-trained"},
        *({"model": f"noise-{level}"} for level in NOISE),
        *({"model": name, "role": "base"} for name in FAMILIES),
        {"model": "broken"},
        {"model": "noise-0.1", "name": "starved", "memory": "1 GB"},
    ]
    return write_toml(folder / "eight.toml", models, STUDY, stages=list(STAGES), resources={"cpus": 1}, **STAGES)


def disturb(folder: Path, done: list[str]) -> None:
    """Kills the Ray worker of one run, and the process of another."""
    for name, which in (("demo", 1), ("noise-0.2", 0)):
        wait_for(lambda name=name: list((folder / "runs" / name).glob("shards/*.safetensors")), 600)
        found = process_of(folder, name)
        assert found is not None
        os.kill(found[which], signal.SIGKILL)
        done.append(name)


def test_a_disturbed_sweep_on_ray_gives_what_an_undisturbed_one_gives(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert list(STAGES) == list(STAGE_SETTINGS)
    out = open_sweep(file, tmp_path / "ray").path.resolve()
    killed: list[str] = []
    killer = threading.Thread(target=disturb, args=(out, killed))
    killer.start()
    on_ray = sweep(out, engine="ray", workers=2, look=False)
    killer.join()
    here = sweep(file, out=tmp_path / "here", look=False)
    names = ["demo", *(f"noise-{level}" for level in NOISE), *FAMILIES]
    for found in (on_ray, here):
        states = {status.name: status.state for status in found.statuses}
        assert states == {**dict.fromkeys(names, "done"), "broken": "failed", "starved": "failed"}
        errors = {status.name: status.errors for status in found.statuses if status.errors}
        assert "memory ran out under the limit of 1,000,000,000 bytes" in errors["starved"]["states"]
        assert list(errors["broken"]) == ["states"]
        assert found.comparison.table["model"].tolist() == names
        assert set(found.compared.left_out) == {"broken", "starved"}
    assert killed == ["demo", "noise-0.2"]
    assert {status.name for status in on_ray.statuses if status.starts > 1} >= set(killed)
    for name in names:
        assert contents(on_ray.path / "runs" / name) == contents(here.path / "runs" / name), name
    for table in ("table", "correlations", "claims"):
        assert getattr(on_ray.comparison, table).equals(getattr(here.comparison, table))
    check_noise(here)


def check_noise(found: xprobe.Sweep) -> None:
    """Noise lowers stability and F1 together; and eight models leave the interval of the correlation wide."""
    table = found.comparison.table.set_index("model")
    for figure in ("stability", "readiness", "f1"):
        assert table.loc["demo", figure] > table.loc["noise-0.3", figure]
    first = found.comparison.claims.iloc[0]
    assert first["statistic"] == "Spearman's correlation of stability and F1"
    assert first["models"] == 8
    assert first["hi"] - first["lo"] > 0.5
    assert first["verdict"] == "undecided"
