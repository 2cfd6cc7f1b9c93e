"""The steps of gpu.py without a GPU: limits, what is kept, where a step goes on, and what the table says."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_process, gpu_results


class FakeSteps:
    """Steps of small Python programs."""

    def __init__(self, out: Path, **code: str) -> None:
        for name, body in code.items():
            part = gpu.Part([sys.executable, "-c", body], out / "log.txt")
            setattr(self, name, lambda limit, result, part=part: iter([part]))


def test_a_step_that_sleeps_is_stopped_and_the_others_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "RESERVE", 0.0)
    monkeypatch.setattr(gpu, "WEIGHTS", {"env": 20, "tests": 1, "bench": 20, "tune": 20})
    steps = FakeSteps(
        tmp_path, env="print('hello')", tests="import time; print('zzz', flush=True); time.sleep(60)",
        bench="import sys; sys.exit(7)", tune="print('last')",
    )  # fmt: skip
    results = gpu.run_all(steps, list(gpu.WEIGHTS), 120.0, tmp_path, ["me"])
    assert [each.status for each in results] == ["ok", "out of time", "failed", "ok"]
    assert [each.exit_code for each in results] == [0, None, 7, 0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step["name"] for step in summary["steps"]] == list(gpu.WEIGHTS)
    assert summary["steps"][2]["log"] == "log.txt"
    log = (tmp_path / "log.txt").read_text()
    assert all(word in log for word in ("hello", "zzz", "last", "stopped after"))
    assert gpu.table(results).splitlines()[-1].startswith("tune")


def test_what_a_stopped_step_had_started_ends_with_it(tmp_path) -> None:
    body = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    assert gpu.run(gpu.Part([sys.executable, "-c", body], tmp_path / "log.txt"), 3.0) is None
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")


def test_steps_that_come_too_late_are_said_to_be(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "RESERVE", 0.0)
    results = gpu.run_all(FakeSteps(tmp_path, env="1", tests="1"), ["env", "tests"], 0.5, tmp_path, [])
    assert [each.message for each in results] == ["not reached", "not reached"]
    assert not any(each.good for each in results)


def test_a_program_that_is_not_there_is_a_failure_not_a_crash(tmp_path) -> None:
    part = gpu.Part(["/no/such/program"], tmp_path / "log.txt")
    assert gpu.run_step("env", lambda limit, result: iter([part]), 5.0).status == "failed"


def test_a_missing_profiler_is_skipped_a_missing_sanitizer_is_not(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    monkeypatch.setattr(gpu, "run", lambda part, limit: 0)
    steps = gpu.Steps(tmp_path, tmp_path, None)
    assert gpu.run_step("profile", steps.profile, 9.0).good
    found = gpu.run_step("sanitize", steps.sanitize, 9.0)
    assert (found.status, found.exit_code) == ("failed", 0)
    assert "compute-sanitizer is not installed" in found.message


CASE = '<testcase classname="t" name="{name}">{inner}</testcase>'


@pytest.mark.parametrize(
    ("names", "inner", "expected"),
    [
        (["a[triton]", "b[cpu]"], "", None),
        (["b[cpu]"], "", "1 tests passed, but none of them ran the triton backend"),
        (["a[triton]"], "<skipped/>", "1 tests passed, but none of them ran the triton backend"),
        (["a[triton]"], '<failure message="off by 1&#10;more"/>', "1 of 1 tests failed"),
    ],
)
def test_tests_count_only_if_they_ran_the_kernels(tmp_path, names, inner, expected) -> None:
    cases = "".join(CASE.format(name=name, inner=inner) for name in names)
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    details: dict = {}
    assert gpu_results.read_tests(tmp_path / "tests.xml", details) == expected
    assert details["failures"] == (["t::a[triton]: off by 1"] if "failure" in inner else [])
    assert gpu_results.read_tests(tmp_path / "none.xml", {}) == "the tests did not finish"


def test_long_logs_keep_their_beginning_and_their_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_process, "LARGEST_LOG", 1000)
    log = tmp_path / "log.txt"
    log.write_text("begin" + "x" * 5000 + "end")
    gpu_process.shorten(log)
    assert log.read_text().startswith("begin")
    assert log.read_text().endswith("end")
    assert log.stat().st_size < 1100


def test_the_files_that_the_steps_leave_are_listed() -> None:
    named = {"environment.json", "run.json", "bench.json", "roofline.png", "tune.json", "profile.txt", "log.txt"}
    assert all(name in gpu.__doc__ for name in named | {"summary.json", "tests-passed.txt"})


def test_every_step_exists() -> None:
    assert all(callable(getattr(gpu.Steps, name)) for name in gpu.WEIGHTS)


# steps that go on

CURRENT = {"card": "NVIDIA H200, 580", "torch": "2.11.0", "commit": "abc", "sources_sha256": "1"}


def bench_result(name: str, *, status: str = "ok", message: str | None = None) -> dict:
    """What one process of `bench` writes for a shape."""
    variant = {"name": "lens triton", "kind": "backend", "status": status, "message": None}
    lens = [{"name": f"{name}/{rows}", "message": message, "variants": [variant]} for rows in ("many", "few")]
    return {"environment": {"commit": None}, "settings": {}, "lens": lens, "capture": [], "rivals": []}


def steps_at(out: Path, current: dict = CURRENT) -> gpu.Steps:
    return gpu.Steps(out, out, "abc", "demo.gguf", "xquad", current)


@pytest.fixture
def no_figure(monkeypatch) -> None:
    monkeypatch.setattr("xprobe_kernels.bench.figure.roofline", lambda result, target: None)


def shapes_measured(out: Path, monkeypatch, write) -> tuple[list[str], gpu.Result]:
    """Runs the step `bench` with ``write(shape)`` as its process; returns the shapes it asked for."""
    asked = []

    def process(part: gpu_process.Part, limit: float) -> int | None:
        shape = part.command[part.command.index("--shape") + 1]
        asked.append(shape)
        result = write(shape)
        if result is None:
            return None
        Path(part.command[-1]).write_text(json.dumps(result))
        return 0

    monkeypatch.setattr(gpu, "run", process)
    return asked, gpu.run_step("bench", steps_at(out).bench, 60.0)


def test_bench_measures_only_shapes_that_its_file_lacks(tmp_path, monkeypatch, no_figure) -> None:
    asked, result = shapes_measured(
        tmp_path, monkeypatch, lambda shape: bench_result(shape) if shape == gpu.FIRST_SHAPE else None
    )
    assert result.status == gpu.LATE
    assert asked[0] == gpu.FIRST_SHAPE
    assert len(asked) == 2  # the second one ran out of time
    again, result = shapes_measured(tmp_path, monkeypatch, bench_result)
    assert result.status == gpu.OK
    assert gpu.FIRST_SHAPE not in again
    assert result.details["measured_earlier"] == [gpu.FIRST_SHAPE]
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert len({part["name"] for part in stored["lens"]}) == len(stored["lens"]) == 2 * (1 + len(again))
    assert stored["environment"]["commit"] == "abc"
    assert shapes_measured(tmp_path, monkeypatch, bench_result)[0] == []


def test_a_wrong_kernel_is_reported_again_and_failed_inputs_are_measured_again(
    tmp_path, monkeypatch, no_figure
) -> None:
    results = {"llama-3-8b": {"status": "wrong"}, "qwen2.5-7b": {"message": "inputs: OutOfMemoryError"}}
    shapes_measured(tmp_path, monkeypatch, lambda shape: bench_result(shape, **results.get(shape, {})))
    asked, result = shapes_measured(tmp_path, monkeypatch, bench_result)
    assert asked == ["qwen2.5-7b"]
    assert (result.status, result.message) == (gpu.FAILED, "wrong or failed: lens triton")


@pytest.mark.parametrize("change", [{"commit": "def"}, {"torch": "2.12.0"}, {"sources_sha256": "2"}])
def test_figures_of_other_code_or_versions_are_set_aside(tmp_path, monkeypatch, no_figure, change) -> None:
    shapes_measured(tmp_path, monkeypatch, bench_result)
    path = tmp_path / "bench.json"
    assert gpu_results.set_aside(path, CURRENT) is None
    before = path.read_text()
    assert f"with other {next(iter(change))}" in gpu_results.set_aside(path, CURRENT | change)
    assert not path.exists()
    assert (tmp_path / "earlier-bench.json").read_text() == before


def test_changed_sources_have_another_checksum(tmp_path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("x = 1\n")
    before = gpu_results.sources_sha256(("kernels",), tmp_path)
    (tmp_path / "kernels" / "notes.txt").write_text("not measured")
    assert gpu_results.sources_sha256(("kernels",), tmp_path) == before
    (tmp_path / "kernels" / "a.py").write_text("x = 2\n")
    assert gpu_results.sources_sha256(("kernels",), tmp_path) != before


def test_run_measures_only_models_that_were_not_run_to_their_end(tmp_path, monkeypatch) -> None:
    rate = {"attention_kernel": True, "strategy": "tree"}
    whole = {"tokenizer": "demo.gguf", "data": "xquad", "rates": [rate], "against": {"ratio": {}}}
    unfinished = {name: value for name, value in whole.items() if name != "against"}
    asked: list[str] = []

    def step(results: dict[str, dict]) -> gpu.Result:
        asked.clear()

        def process(part: gpu_process.Part, limit: float) -> int | None:
            file = Path(part.command[2])
            asked.append(file.stem)
            file.write_text(json.dumps(results[file.stem]))
            return 0 if "against" in results[file.stem] else None

        monkeypatch.setattr(gpu, "run", process)
        return gpu.run_step("run", steps_at(tmp_path).run, 60.0)

    assert step({"run-demo": whole, "run-llama-3-8b": unfinished}).status == gpu.LATE
    assert step({"run-llama-3-8b": whole}).status == gpu.OK
    assert asked == ["run-llama-3-8b"]
    runs = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["demo", "llama-3-8b"]
    assert step({}).status == gpu.OK
    assert asked == []


def test_a_run_that_measured_nothing_leaves_no_entry(tmp_path) -> None:
    (tmp_path / "run-demo.json").write_text("{}")
    assert gpu_results.add_run(tmp_path / "run-demo.json", tmp_path, CURRENT) == "no figures of demo"
    assert not (tmp_path / "run.json").exists()


def test_tests_that_passed_are_not_run_again(tmp_path) -> None:
    from benchmarks import gpu_passed

    (tmp_path / "test_x.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('backend', ['triton', 'cpu'])\n"
        "def test_good(backend): assert os.environ['STATE'] == 'broken'\n"
        "def test_mended(): assert os.environ['STATE'] == 'mended'\n"
    )
    passed, found = tmp_path / "tests-passed.txt", tmp_path / "tests.xml"

    def call(state: str) -> tuple[int | None, list[str]]:
        command = [sys.executable, "-m", "pytest", str(tmp_path / "test_x.py"), f"--rootdir={tmp_path}", "-n", "1"]
        command += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu_passed", f"--junit-xml={found}"]
        environment = {gpu_passed.VARIABLE: str(passed), "STATE": state}
        code = gpu.run(gpu_process.Part(command, tmp_path / "log.txt", environment), 60.0)
        return code, sorted(name.rpartition("::")[2] for name in gpu_passed.passed(passed))

    gpu_passed.begin(passed, "this code")
    assert call("broken") == (1, ["test_good[cpu]", "test_good[triton]"])
    gpu_passed.begin(passed, "this code")
    assert call("mended") == (0, ["test_good[cpu]", "test_good[triton]", "test_mended"])
    details: dict = {}
    assert gpu_results.read_tests(found, details, sorted(gpu_passed.passed(passed))) is None
    assert details["tests"] == 1
    assert call("anything")[0] == 0  # nothing is left
    gpu_passed.begin(passed, "other code")
    assert gpu_passed.passed(passed) == set()


def test_the_summary_keeps_the_steps_of_earlier_calls_of_the_same_code(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "RESERVE", 0.0)
    steps = FakeSteps(tmp_path, bench="1", tests="import sys; sys.exit(7)")
    for name, current in (("bench", CURRENT), ("tests", CURRENT)):
        gpu.run_all(steps, [name], 60.0, tmp_path, ["me"], current)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(step["name"], step["status"]) for step in summary["steps"]] == [("tests", "failed"), ("bench", "ok")]
    gpu.run_all(steps, ["bench"], 60.0, tmp_path, ["me"], CURRENT | {"commit": "def"})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step["name"] for step in summary["steps"]] == ["bench"]


def test_rivals_are_skipped_where_none_is_installed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("xprobe_kernels.bench.rivals.RIVALS", ())
    result = gpu.run_step("rivals", steps_at(tmp_path).rivals, 9.0)
    assert (result.status, result.message) == (gpu.SKIPPED, "no rival is installed: pip install 'xprobe[rivals]'")
