"""Everything that needs a GPU, in one command from a checkout: tests, whole runs, kernels, tuning, profile.

    python benchmarks/gpu.py OUT [--minutes 10] [--steps env,sanitize,tests,run,bench,tune,profile,aot]
                                 [--model MODEL] [--data DATA] [--commit HASH]

Every step is a process with its own time limit. A step that fails or runs out of time does not stop the others, and
time that a step does not use goes to later steps. OUT gets eight files, which are written as results come:
environment.json, run.json (whole_run.py: the demo model or MODEL, then a random one of Llama-3-8B's shape, over DATA),
bench.json, roofline.png, tune.json, profile.txt, log.txt (the output of all other steps) and summary.json. The exit
code is 0 only if every step succeeded. Clocks and other settings of the GPU are read, never changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
OK, FAILED, LATE, SKIPPED, RUNNING = "ok", "failed", "out of time", "skipped", "running"
# steps in order, and their shares of the time; sanitize comes early, because a wrong address breaks the GPU for the
# tests
WEIGHTS = {"env": 6, "sanitize": 12, "tests": 32, "run": 26, "bench": 26, "tune": 32, "profile": 5, "aot": 4}
TESTS = ("tests/kernels", "tests/xprobe/capture/test_on_gpu.py", "tests/xprobe/models/test_devices.py")
RUNS = {"demo": [], "llama-3-8b": ["--shape", "llama-3-8b"]}  # whole_run.py's options
RESERVE = 8.0  # seconds kept for stopping a step and for the table
GRACE = 5.0  # seconds between asking a process to end and ending it
LARGEST = 8 << 20  # bytes of a log; of a longer log only the beginning and the end are kept
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


@dataclass(frozen=True)
class Part:
    """One process of a step. ``then`` reads its results, also after a failure, and returns what is wrong, or None."""

    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    then: Callable[[], str | None] = lambda: None


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
        self, out: Path, scratch: Path, commit: str | None, model: str = "smollm2-135m", data: str = "xquad"
    ) -> None:
        self.out, self.scratch, self.commit, self.log = out, scratch, commit, out / "log.txt"
        self.model, self.data = model, data

    def env(self, limit: float, result: Result) -> Iterator[Part]:
        command = [sys.executable, __file__, str(self.out), "--environment"]
        yield Part(command + (["--commit", self.commit] if self.commit else []), self.log)

    def tests(self, limit: float, result: Result) -> Iterator[Part]:
        found = self.scratch / "tests.xml"
        command = [sys.executable, "-m", "pytest", *TESTS, "-m", "not slow or gpu", "-n", "8"]
        command += ["--dist", "loadscope", "-q", "-p", "no:cacheprovider", f"--junit-xml={found}"]
        yield Part(command, self.log, then=lambda: read_tests(found, result.details))

    def run(self, limit: float, result: Result) -> Iterator[Part]:
        for name, options in RUNS.items():
            file = self.scratch / f"run-{name}.json"
            seconds = limit / len(RUNS) / 3  # for the loop; the rest is for loading, warm-up and the other lenses
            command = [sys.executable, str(ROOT / "benchmarks" / "whole_run.py"), str(file), *options]
            command += ["--model", self.model, "--tokenizer", self.model, "--data", self.data]
            command += ["--seconds", f"{seconds:.0f}", *(["--commit", self.commit] if self.commit else [])]
            yield Part(command, self.log, then=lambda file=file: add_run(file, self.out))

    def bench(self, limit: float, result: Result) -> Iterator[Part]:
        from xprobe_kernels.bench.shapes import HEADS

        for name in sorted(HEADS, key=lambda name: name != FIRST_SHAPE):
            file = self.scratch / f"{name}.json"
            command = [sys.executable, "-m", "xprobe_kernels.bench", "--kernel", "all", "--shape", name]
            yield Part([*command, "--json", str(file)], self.log, then=lambda file=file: merge(file, self.out))

    def tune(self, limit: float, result: Result) -> Iterator[Part]:
        command = [sys.executable, str(ROOT / "benchmarks" / "tune.py"), str(self.out / "tune.json")]
        yield Part([*command, "--seconds", f"{max(limit - 15, 5):.0f}"], self.log, then=lambda: self._paste(result))

    def _paste(self, result: Result) -> str | None:
        for unfinished in self.out.glob("*.part"):
            unfinished.unlink()
        if not (self.out / "tune.json").exists():
            return "nothing was measured"
        result.details["paste"] = json.loads((self.out / "tune.json").read_text(encoding="utf-8"))["paste"]
        return None

    def sanitize(self, limit: float, result: Result) -> Iterator[Part]:
        script = [sys.executable, str(ROOT / "benchmarks" / "sanitize.py")]
        yield Part(script, self.log)  # first without the tool: compiles everything and finds plain errors
        tool = found_tool("compute-sanitizer")
        if tool is None:
            raise MissingToolError("compute-sanitizer is not there: the kernels ran only without it")
        options = ["--error-exitcode", "9", "--print-limit", "20"]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield Part([tool, "--tool", "memcheck", *options, *script], self.log, uncached)
        yield Part([tool, "--tool", "racecheck", *options, *script, "--own"], self.log)

    def profile(self, limit: float, result: Result) -> Iterator[Part]:
        tool = found_tool("ncu")
        if tool is None:
            raise SkippedError("ncu is not there")
        command = [tool, "--clock-control", "none", "--kernel-name", "lens_kernel", "--print-details", "all"]
        command += ["--launch-skip", "2", "--launch-count", "1"]
        for section in SECTIONS:
            command += ["--section", section]
        yield Part([*command, sys.executable, "-c", ONE_LAUNCH], self.out / "profile.txt")

    def aot(self, limit: float, result: Result) -> Iterator[Part]:
        from xprobe_kernels.bench.environment import program_output

        found = program_output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        target = f"sm_{found.splitlines()[0].strip().replace('.', '')}" if found else "gfx942"
        yield Part([sys.executable, "-m", "xprobe_kernels.aot", "--targets", target], self.log)


class SkippedError(Exception):
    """The step is optional and cannot run here."""


class MissingToolError(Exception):
    """Part of the step cannot run here."""


def run_step(
    name: str, parts: Callable[[float, Result], Iterator[Part]], limit: float, result: Result | None = None
) -> Result:
    """Runs the parts one after the other until the time is over. The first part that fails gives the exit code."""
    result = result or Result(name)
    result.limit = round(limit, 1)
    begun = time.monotonic()
    troubles = []
    try:
        for part in parts(limit, result):
            left = limit - (time.monotonic() - begun)
            code = run(part, left) if left > 1 else None
            result.log = part.log.name
            problem = part.then()
            if code is None:
                result.status = LATE
                troubles.append(problem or f"stopped after {limit:.0f} s")
                break
            result.exit_code = result.exit_code or code
            if code or problem:
                troubles.append(problem or f"exit code {code}: {' '.join(part.command[:6])} ...")
    except SkippedError as error:
        result.status, result.message = SKIPPED, str(error)
    except Exception as error:
        troubles.append(str(error) if isinstance(error, MissingToolError) else f"{type(error).__name__}: {error}")
    if result.status == RUNNING:
        result.status = FAILED if troubles else OK
    if troubles:
        result.message = "; ".join(dict.fromkeys(troubles))
    result.seconds = round(time.monotonic() - begun, 1)
    return result


def run(part: Part, limit: float) -> int | None:
    """Runs a part. Returns its exit code, or None if it and its children were stopped after ``limit`` seconds."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    with part.log.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(part.command)}\n")
        log.flush()
        try:
            child = subprocess.Popen(
                part.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                env=environment | part.environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            log.write(f"{error}\n")
            return 127
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            log.write(f"\nstopped after {limit:.0f} s\n")
        finally:
            stop(child)
    shorten(part.log)
    return code


def stop(child: subprocess.Popen[Any]) -> None:
    """Ends a process and its group. It is asked first, so that a supervisor can end its own workers."""
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def shorten(log: Path) -> None:
    size = log.stat().st_size
    if size > LARGEST:
        content = log.read_bytes()
        cut = b"\n[... %d bytes left out ...]\n" % (size - LARGEST)
        log.write_bytes(content[: LARGEST // 8] + cut + content[-(LARGEST - LARGEST // 8) :])


def read_tests(found: Path, details: dict[str, Any]) -> str | None:
    """Stores counts and failures of the tests in ``details``. Returns a problem if no test ran a Triton kernel."""
    if not found.exists():
        return "the tests did not finish"
    cases = list(ElementTree.parse(found).getroot().iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    kernels = [case for case in cases if "triton" in case.get("name", "") and case not in skipped]
    details |= {"tests": len(cases), "failed": len(bad), "skipped": len(skipped), "of_the_triton_backend": len(kernels)}
    details["failures"] = []
    for case in bad[:50]:
        what = case.find("failure") if case.find("failure") is not None else case.find("error")
        message = "" if what is None else (what.get("message") or "").strip().splitlines()[:1]
        details["failures"].append(f"{case.get('classname')}::{case.get('name')}: {' '.join(message)[:200]}")
    if bad:
        return f"{len(bad)} of {len(cases)} tests failed"
    return None if kernels else f"{len(cases)} tests passed, but none of them ran the triton backend"


def merge(file: Path, out: Path) -> str | None:
    """Adds the figures of one shape to bench.json and redraws the roofline figure."""
    if not file.exists():
        return f"no figures of {file.stem}"
    result, whole = json.loads(file.read_text(encoding="utf-8")), out / "bench.json"
    if whole.exists():
        before = json.loads(whole.read_text(encoding="utf-8"))
        result = before | {kernel: before[kernel] + result[kernel] for kernel in ("lens", "capture")}
    result["settings"]["shape"] = ", ".join(dict.fromkeys(part["name"].partition("/")[0] for part in result["lens"]))
    write(whole, result)
    try:
        from xprobe_kernels.bench import figure

        figure.roofline(result, str(out / "roofline.png"))
    except Exception as error:  # the results matter more than the figure
        return f"no figure: {type(error).__name__}: {error}"
    bad = [v["name"] for part in result["lens"] for v in part["variants"] if v["status"] in ("wrong", "failed")]
    return f"wrong or failed: {', '.join(dict.fromkeys(bad))}" if bad else None


def add_run(file: Path, out: Path) -> str | None:
    """Adds the figures of one model to run.json. Returns a problem if the loop waits for the GPU."""
    if not file.exists():
        return f"no figures of {file.stem}"
    result, whole = json.loads(file.read_text(encoding="utf-8")), out / "run.json"
    before = json.loads(whole.read_text(encoding="utf-8"))["runs"] if whole.exists() else []
    write(whole, {"runs": [*before, result]})
    if any(rate["attention_kernel"] is not True or rate["strategy"] != "tree" for rate in result["rates"]):
        return f"{file.stem} was not run with the attention kernel: see its warnings"
    waits = [wait for rate in result["rates"] for wait in rate.get("waits", [])]
    return f"{file.stem} waits for the GPU: {', '.join(dict.fromkeys(waits))}" if waits else None


def write_environment(out: Path, commit: str | None) -> None:
    import torch
    from xprobe_kernels.bench.environment import environment, program_output

    found = environment(torch.device("cuda"))
    properties = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    found["properties"] = {name: getattr(properties, name, None) for name in names}
    found["shared_memory_per_program"] = getattr(properties, "shared_memory_per_block_optin", None)
    found["nvidia_smi"] = program_output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv")
    found["commit"] = found["commit"] or commit
    found["tools"] = {name: found_tool(name) for name in ("compute-sanitizer", "ncu", "nvcc", "gcc")}
    write(out / "environment.json", found)


def write(path: Path, content: Any) -> None:
    """Writes the file atomically."""
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def found_tool(name: str) -> str | None:
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{cuda}/bin:/opt/nvidia/nsight-compute")


def run_all(steps: Any, names: list[str], seconds: float, out: Path, command: list[str]) -> list[Result]:
    """Runs every step within its share of the time left. summary.json is rewritten before and after each step."""
    end = time.monotonic() + seconds - RESERVE
    results: list[Result] = []

    def save() -> None:
        write(out / "summary.json", {"command": command, "steps": [asdict(result) for result in results]})

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
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything (default: 10)")
    parser.add_argument("--steps", default=",".join(WEIGHTS), help=f"of {','.join(WEIGHTS)} (default: all)")
    parser.add_argument(
        "--model", default="smollm2-135m", help="of the whole run, and whose tokenizer the random one has"
    )
    parser.add_argument("--data", default="xquad", help="of the whole run, as for xprobe run (default: xquad)")
    parser.add_argument("--commit", help="what is being measured, where git cannot tell")
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    wanted = options.steps.split(",")
    if unknown := [name for name in wanted if name not in WEIGHTS]:
        parser.error(f"--steps: {unknown[0]!r} is not one of {', '.join(WEIGHTS)}")
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import torch

    if not torch.cuda.is_available():
        print("gpu.py needs a GPU, and torch sees none", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    if options.environment:
        write_environment(options.out, options.commit)
        return 0
    command = [sys.executable, *sys.argv]
    with tempfile.TemporaryDirectory() as scratch:
        steps = Steps(options.out.resolve(), Path(scratch), options.commit, options.model, options.data)
        names = [name for name in WEIGHTS if name in wanted]
        results = run_all(steps, names, options.minutes * 60, options.out, command)
    print(table(results))
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
