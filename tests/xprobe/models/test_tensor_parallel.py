"""Two processes share one model: same results, one folder, one output, and no process hangs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.families import save_tiny_model
from support.runs import chosen_strategy, parity
from xprobe_cli.main import main

import xprobe
from xprobe.config import Execution
from xprobe.errors import ModelError, UsageError
from xprobe.models import loading, tensor_parallel

ROOT = Path(__file__).parents[3]
SMALL = ["--languages", "en,th", "--limit", "4", "--batch-tokens", "500"]

# the command line with an error in forward pass number `failing_pass` of process `failing_rank`
FAULTY = """
import os, sys
import torch
from xprobe.capture.engine import Engine
from xprobe_cli.main import main

failing_rank, failing_pass, *arguments = sys.argv[1:]
run, passes = Engine._run, 0

def counted(self, *args):
    global passes
    passes += 1
    if os.environ["RANK"] == failing_rank and passes == int(failing_pass):
        raise torch.OutOfMemoryError("CUDA out of memory: of this one process")
    return run(self, *args)

Engine._run = counted
sys.exit(main(arguments))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "llama")


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun sets."""
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "cli"))
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}


def run_processes(*command: str, size: int = 2, seconds: int = 120) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process. torchrun is not used: it stops all processes when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, *command], env=environment(rank, size, port), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def test_several_processes_without_tensor_parallelism_are_refused(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["run", str(tiny), *SMALL, "--out", str(tmp_path / "run")]) == 2
    assert "each of which would do the same run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_single_process_with_tensor_parallelism_is_refused_and_the_message_shows_torchrun(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["run", str(tiny), *SMALL, "--tensor-parallel", "--out", str(tmp_path / "run")]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="torchrun"):
        xprobe.run(str(tiny), tensor_parallel=True, out=tmp_path / "run", limit=2, languages=("en",))


@pytest.mark.parametrize("other", [{"device": "cpu"}, {"device_map": "auto"}, {"stream": True}])
def test_tensor_parallelism_excludes_other_device_options(other):
    with pytest.raises(UsageError, match="tensor_parallel"):
        Execution(tensor_parallel=True, **other)


def test_heads_that_the_processes_cannot_share_evenly_are_refused(tiny, monkeypatch):
    config = loading.load_config(loading.resolve(str(tiny)))
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    monkeypatch.setattr(tensor_parallel, "size", lambda: 2)
    tensor_parallel.check_heads(config, "tiny")
    monkeypatch.setattr(tensor_parallel, "size", lambda: 4)
    with pytest.raises(ModelError, match=r"4 processes .*num_key_value_heads = 2"):
        tensor_parallel.check_heads(config, "tiny")


@pytest.mark.slow
def test_torchrun_gives_the_results_of_one_process_in_one_folder(tiny, tmp_path):
    alone = xprobe.run(str(tiny), languages=("en", "th"), limit=4, batch_tokens=500, out=tmp_path / "alone")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    run = [*torchrun, "xprobe_cli", "run", str(tiny), *SMALL, "--tensor-parallel", "--out", str(tmp_path / "shared")]
    env = {k: v for k, v in environment(0, 1, 0).items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run([*run, "--json"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)  # one object: the second process prints nothing
    shared = xprobe.load_study(tmp_path / "shared")
    assert printed == shared.to_dict()
    assert parity(shared) < 1e-3
    assert chosen_strategy(shared) == chosen_strategy(alone) == "tree"
    for column in ("readiness", "log_probability", "entropy"):
        assert abs(shared.stability[column] - alone.stability[column]).max() < 1e-4
    again = subprocess.run([*run, "--resume"], env=env, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0  # the results come from the files, so no process waits for a model
    assert again.stdout.count("parity ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_runs_out_of_memory_all_stop_and_the_run_can_resume(tiny, tmp_path, rank):
    out = tmp_path / "run"
    run = ["run", str(tiny), *SMALL, "--batch-tokens", "200", "--tensor-parallel", "--out", str(out)]
    (first, _, first_error), (second, _, second_error) = run_processes("-c", FAULTY, str(rank), "9", *run)
    assert first == 1
    assert second == 1
    assert "the run failed" in first_error
    assert "Traceback" not in first_error + second_error
    if rank == 0:
        assert "of this one process" in first_error
    else:
        assert "process 1 of 2 failed" in second_error
        assert "of this one process" in second_error
    assert xprobe.runs.folder.RunFolder.open(out).read_run().status == "running"
    (first, output, first_error), (second, silence, second_error) = run_processes("-m", "xprobe_cli", *run, "--resume")
    assert (first, second) == (0, 0), first_error + second_error
    assert "parity" in output
    assert silence == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "arguments", "code", "message"),
    [
        ("gpt2", [], 1, "cannot share"),
        ("llama", ["--data", "/nowhere"], 2, "/nowhere"),
    ],
)
def test_a_refusal_is_printed_once_and_stops_all_processes(tmp_path, family, arguments, code, message):
    model = save_tiny_model(tmp_path / "model", family)
    out = ["--out", str(tmp_path / "run")]
    run = ["run", str(model), *SMALL, *arguments, "--tensor-parallel", *out]
    (first, _, first_error), (second, silence, second_error) = run_processes("-m", "xprobe_cli", *run)
    assert (first, second) == (code, code), second_error
    assert message in first_error
    assert silence == second_error == ""
