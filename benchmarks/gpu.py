"""Runs all tests and measurements that need a GPU: tests, whole runs, kernels, tuning, profile.

    python benchmarks/gpu.py OUT [--minutes 10] [--steps env,sanitize,tests,run,bench,rivals,tune,profile,aot]
                                 [--model MODEL] [--data DATA] [--commit HASH] [--compare FOLDER [--strict]]
    python benchmarks/gpu.py OUT --steps none --compare FOLDER

Every step is a process with its own time limit. A step that fails or runs out of time does not stop the others, and
time that a step does not use goes to later steps. OUT gets nine files, which are written as results come:
environment.json, run.json (whole_run.py: the demo model or MODEL, then a random one of Llama-3-8B's shape, over DATA),
bench.json, roofline.png, tune.json, tests-passed.txt, profile.txt, log.txt (the output of all other steps) and
summary.json. The exit code is 0 only if every step succeeded. Clocks and other settings of the GPU are read, never
changed.

A step that is run again with the same OUT continues where it stopped: `run`, `bench` and `rivals` measure only what
their file lacks, `tests` runs only what did not pass, `tune` tries only the candidates it did not finish. With another
GPU, driver, version or code they start again, except `tune`, and earlier-run.json or earlier-bench.json keeps the
earlier figures. The other steps are short and always start again.

``--compare`` compares the figures of OUT with those of an earlier folder (gpu_compare.py) and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "kernels"))

from benchmarks import gpu_compare, gpu_passed
from benchmarks.gpu_process import Part, run
from benchmarks.gpu_results import (
    add_run,
    earlier_bench_problem,
    fingerprint,
    finished_runs,
    measured_shapes,
    merge,
    read,
    read_tests,
    run_problem,
    set_aside,
    sources_sha256,
    write,
)

ROOT = Path(__file__).resolve().parents[1]
NONE = "none"  # value of --steps: measure nothing
OK, FAILED, LATE, SKIPPED, RUNNING = "ok", "failed", "out of time", "skipped", "running"
# steps in order, and their shares of the time; sanitize comes early, because a wrong address breaks the GPU for the
# tests
WEIGHTS = {
    "env": 6,
    "sanitize": 12,
    "tests": 32,
    "run": 26,
    "bench": 26,
    "rivals": 10,
    "tune": 32,
    "profile": 5,
    "aot": 4,
}
TESTS = (  # the first are the least like those of a machine without a GPU
    "tests/xprobe/capture/test_on_gpu.py",
    "tests/xprobe/stages/test_stages_on_gpu.py",
    "tests/xprobe/models/test_devices.py",
    *(
        f"tests/kernels/test_{name}.py"
        for name in (
            "triton", "triton_readout", "lens_ranks", "lens_edges", "lens_properties", "lens", "capture", "attention",
            "continued_attention", "addresses", "memory",
        )
    ),
)  # fmt: skip
ELSEWHERE = "not cpu and not reference and not compiled"  # these backends are tested on every machine
RUNS = {"demo": [], "llama-3-8b": ["--shape", "llama-3-8b"]}  # whole_run.py's options
RESERVE = 8.0  # seconds reserved for stopping a step and printing the table
FIRST_SHAPE = "llama-3-8b"
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit"
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
ONE_LAUNCH = """
import torch
from xprobe_kernels.bench import baselines, shapes
job = shapes.work(shapes.HEADS["llama-3-8b"], "many", shapes.GPU)
with torch.inference_mode():
    task = baselines.make(job, torch.device("cuda"), torch.bfloat16)
    for _ in range(3):
        baselines.backend("triton")(task)
torch.cuda.synchronize()
"""


@dataclass
class Result:
    """A line of summary.json."""

    name: str
    status: str = RUNNING
    seconds: float = 0.0
    limit: float = 0.0
    exit_code: int | None = None
    log: str | None = None
    message: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return self.status in (OK, SKIPPED)


class Steps:
    """The steps as processes. Each yields its parts for ``limit`` seconds, or raises ``SkippedError``."""

    def __init__(
        self,
        out: Path,
        scratch: Path,
        commit: str | None,
        model: str = "smollm2-135m",
        data: str = "xquad",
        current: dict[str, Any] | None = None,
    ) -> None:
        self.out, self.scratch, self.commit, self.log = out, scratch, commit, out / "log.txt"
        self.current = current or {}  # the fingerprint of this checkout and machine
        self.model, self.data = model, data

    def env(self, limit: float, result: Result) -> Iterator[Part]:
        command = [sys.executable, __file__, str(self.out), "--environment"]
        yield Part(command + (["--commit", self.commit] if self.commit else []), self.log)

    def tests(self, limit: float, result: Result) -> Iterator[Part]:
        report, passed = self.scratch / "tests.xml", self.out / "tests-passed.txt"
        gpu_passed.begin(passed, json.dumps(self.current | {"tests_sha256": sources_sha256(("tests",))}))
        earlier = sorted(gpu_passed.passed(passed))
        result.details["passed_earlier"] = len(earlier)
        command = [sys.executable, "-m", "pytest", *TESTS, "-m", "not slow or gpu", "-k", ELSEWHERE]
        command += ["-n", str(max(2, (os.cpu_count() or 2) - 2)), "--dist", "loadscope", "-q"]
        command += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu_passed"]
        environment = {gpu_passed.VARIABLE: str(passed)}
        yield Part(
            [*command, f"--junit-xml={report}"],
            self.log,
            environment,
            lambda: read_tests(report, result.details, earlier),
        )

    def run(self, limit: float, result: Result) -> Iterator[Part]:
        finished = finished_runs(self.out, self.model, self.data)
        result.details["measured_earlier"] = list(finished)
        missing = {name: options for name, options in RUNS.items() if name not in finished}
        for name, options in missing.items():
            file = self.scratch / f"run-{name}.json"
            seconds = limit / len(missing) / 3  # for the loop; the rest is for loading, warm-up and the other lenses
            command = [sys.executable, str(ROOT / "benchmarks" / "whole_run.py"), str(file), *options]
            command += ["--model", self.model, "--tokenizer", self.model, "--data", self.data]
            command += ["--seconds", f"{seconds:.0f}", *(["--commit", self.commit] if self.commit else [])]
            yield Part(command, self.log, read_results=lambda file=file: add_run(file, self.out, self.current))
        if problems := [problem for run in finished.values() if (problem := run_problem(run))]:
            raise ProblemError("; ".join(problems))

    def bench(self, limit: float, result: Result) -> Iterator[Part]:
        yield from self._bench("lens", ["--kernel", "all"], result)

    def rivals(self, limit: float, result: Result) -> Iterator[Part]:
        from xprobe_kernels.bench.rivals import RIVALS

        if not any(rival.version for rival in RIVALS):
            raise SkippedError("no rival is installed: pip install 'xprobe[rivals]'")
        yield from self._bench("rivals", ["--rivals"], result)

    def _bench(self, kernel: str, options: list[str], result: Result) -> Iterator[Part]:
        """One process per shape that bench.json lacks."""
        from xprobe_kernels.bench.shapes import HEADS

        measured = measured_shapes(self.out, kernel)
        result.details["measured_earlier"] = measured
        for name in sorted(HEADS.keys() - measured, key=lambda name: (name != FIRST_SHAPE, list(HEADS).index(name))):
            file = self.scratch / f"{name}-{kernel}.json"
            command = [sys.executable, "-m", "xprobe_kernels.bench", *options, "--shape", name, "--json", str(file)]
            yield Part(command, self.log, read_results=lambda file=file: merge(file, self.out, self.current))
        if problem := earlier_bench_problem(self.out, kernel, measured):
            raise ProblemError(problem)

    def tune(self, limit: float, result: Result) -> Iterator[Part]:
        command = [sys.executable, str(ROOT / "benchmarks" / "tune.py"), str(self.out / "tune.json")]
        yield Part(
            [*command, "--seconds", f"{max(limit - 15, 5):.0f}"], self.log, read_results=lambda: self._paste(result)
        )

    def _paste(self, result: Result) -> str | None:
        for unfinished in self.out.glob("*.part"):
            unfinished.unlink()
        if not (self.out / "tune.json").exists():
            return "nothing was measured"
        result.details["paste"] = json.loads((self.out / "tune.json").read_text(encoding="utf-8"))["paste"]
        return None

    def sanitize(self, limit: float, result: Result) -> Iterator[Part]:
        script = [sys.executable, str(ROOT / "benchmarks" / "sanitize.py")]
        yield Part(script, self.log)  # without the tool: compiles the kernels and finds wrong results
        tool = find_tool("compute-sanitizer")
        if tool is None:
            raise ProblemError("compute-sanitizer is not installed: the kernels ran without it")
        options = ["--error-exitcode", "9", "--print-limit", "20"]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield Part([tool, "--tool", "memcheck", *options, *script], self.log, uncached)
        yield Part([tool, "--tool", "racecheck", *options, *script, "--own"], self.log)

    def profile(self, limit: float, result: Result) -> Iterator[Part]:
        tool = find_tool("ncu")
        if tool is None:
            raise SkippedError("ncu is not installed")
        command = [tool, "--clock-control", "none", "--kernel-name", "lens_kernel", "--print-details", "all"]
        command += ["--launch-skip", "2", "--launch-count", "1"]
        for section in SECTIONS:
            command += ["--section", section]
        yield Part([*command, sys.executable, "-c", ONE_LAUNCH], self.out / "profile.txt")

    def aot(self, limit: float, result: Result) -> Iterator[Part]:
        from xprobe_kernels.bench.environment import program_output

        capability = program_output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        target = f"sm_{capability.splitlines()[0].strip().replace('.', '')}" if capability else "gfx942"
        yield Part([sys.executable, "-m", "xprobe_kernels.aot", "--targets", target], self.log)


class SkippedError(Exception):
    """The step is optional and cannot run here."""


class ProblemError(Exception):
    """Part of the step cannot run here, or an earlier call found a problem that remains."""


def run_step(
    name: str, parts: Callable[[float, Result], Iterator[Part]], limit: float, result: Result | None = None
) -> Result:
    """Runs the parts one after the other until the time is over. The first part that fails gives the exit code."""
    result = result or Result(name)
    result.limit = round(limit, 1)
    started = time.monotonic()
    problems = []
    try:
        for part in parts(limit, result):
            left = limit - (time.monotonic() - started)
            code = run(part, left) if left > 1 else None
            result.log = part.log.name
            problem = part.read_results()
            if code is None:
                result.status = LATE
                problems.append(problem or f"stopped after {limit:.0f} s")
                break
            result.exit_code = result.exit_code or code
            if code or problem:
                problems.append(problem or f"exit code {code}: {' '.join(part.command[:6])} ...")
    except SkippedError as error:
        result.status, result.message = SKIPPED, str(error)
    except Exception as error:
        problems.append(str(error) if isinstance(error, ProblemError) else f"{type(error).__name__}: {error}")
    if result.status == RUNNING:
        result.status = FAILED if problems else OK
    if problems:
        result.message = "; ".join(dict.fromkeys(problems))
    result.seconds = round(time.monotonic() - started, 1)
    return result


def write_environment(out: Path, commit: str | None) -> None:
    import torch
    from xprobe_kernels.bench.environment import environment, program_output

    result = environment(torch.device("cuda"))
    properties = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    result["properties"] = {name: getattr(properties, name, None) for name in names}
    result["shared_memory_per_program"] = getattr(properties, "shared_memory_per_block_optin", None)
    result["nvidia_smi"] = program_output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv")
    result["commit"] = commit or result["commit"]
    result["tools"] = {name: find_tool(name) for name in ("compute-sanitizer", "ncu", "nvcc", "gcc")}
    write(out / "environment.json", result)


def find_tool(name: str) -> str | None:
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{cuda}/bin:/opt/nvidia/nsight-compute")


def run_all(
    steps: Any,
    names: list[str],
    seconds: float,
    out: Path,
    command: list[str],
    current: dict[str, Any] | None = None,
) -> list[Result]:
    """Runs every step within its share of the time left. summary.json is rewritten before and after each step.

    It keeps the other steps of an earlier call with the same fingerprint.
    """
    end = time.monotonic() + seconds - RESERVE
    results: list[Result] = []
    before = read(out / "summary.json")
    same = bool(before) and before.get("fingerprint") == current
    earlier = [step for step in before["steps"] if step["name"] not in names] if same else []

    def save() -> None:
        lines = sorted([*earlier, *map(asdict, results)], key=lambda step: list(WEIGHTS).index(step["name"]))
        write(out / "summary.json", {"command": command, "fingerprint": current, "steps": lines})

    for index, name in enumerate(names):
        left = end - time.monotonic()
        share = WEIGHTS[name] / sum(WEIGHTS[later] for later in names[index:])
        results.append(Result(name))
        save()
        if left <= 1:
            results[-1].status, results[-1].message = LATE, "not reached"
        else:
            run_step(name, getattr(steps, name), left * share, results[-1])
        save()
    return results


def table(results: list[Result]) -> str:
    lines = [f"{'step':<10}{'status':<13}{'seconds':>8}{'limit':>7}{'code':>6}  log"]
    for each in results:
        code = "-" if each.exit_code is None else each.exit_code
        line = f"{each.name:<10}{each.status:<13}{each.seconds:>8.1f}{each.limit:>7.0f}{code:>6}  {each.log or '-'}"
        lines.append(f"{line}  {(each.message or '')[:160]}".rstrip())
    pasted = [each.details["paste"] for each in results if each.details.get("paste")]
    return "\n".join([*pasted, *lines])


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit for all steps together (default: 10)")
    parser.add_argument(
        "--steps", default=",".join(WEIGHTS), help=f"comma-separated, from {','.join(WEIGHTS)}; or none (default: all)"
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help="model of the whole run; the random model uses its tokenizer"
    )
    parser.add_argument("--data", default="xquad", help="data of the whole run, as for xprobe run (default: xquad)")
    parser.add_argument("--commit", help="commit that is measured, needed where git is missing")
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help="compare the figures with those of FOLDER")
    parser.add_argument(
        "--strict", action="store_true", help="a lower ratio is a failure even on another GPU or with other versions"
    )
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    wanted = [] if options.steps == NONE else options.steps.split(",")
    if unknown := [name for name in wanted if name not in WEIGHTS]:
        parser.error(f"--steps: {unknown[0]!r} is not one of {', '.join([*WEIGHTS, NONE])}")
    if options.compare is None and (options.strict or not wanted):
        parser.error("--strict and --steps none need --compare")
    for folder in [options.compare] if wanted else [options.compare, options.out]:
        if folder is not None and not gpu_compare.has_figures(folder):
            parser.error(f"--compare: {folder} has no bench*.json or run*.json")
    if wanted:
        import torch

        if not torch.cuda.is_available():
            print("gpu.py needs a GPU, and torch sees none", file=sys.stderr)
            return 1
    good = not wanted or measure(options, [name for name in WEIGHTS if name in wanted])
    if options.compare is not None:
        good &= gpu_compare.show(options.compare, options.out, strict=options.strict)
    return 0 if good else 1


def measure(options: argparse.Namespace, names: list[str]) -> bool:
    """Runs the steps. Returns whether all succeeded."""
    options.out.mkdir(parents=True, exist_ok=True)
    if options.environment:
        write_environment(options.out, options.commit)
        return True
    current = fingerprint(options.commit)
    for file, users in {"bench.json": ("bench", "rivals"), "run.json": ("run",)}.items():
        if any(name in users for name in names) and (note := set_aside(options.out / file, current)):
            print(note)
    command = [sys.executable, *sys.argv]
    with tempfile.TemporaryDirectory() as scratch:
        steps = Steps(options.out.resolve(), Path(scratch), options.commit, options.model, options.data, current)
        results = run_all(steps, names, options.minutes * 60, options.out, command, current)
    print(table(results))
    return all(result.good for result in results)


if __name__ == "__main__":
    sys.exit(main())
