"""The result files of gpu.py. Each step adds its figures; a change of code, versions or GPU starts a new file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("xprobe", "kernels", "benchmarks/whole_run.py", "benchmarks/engine_speed.py")
KERNELS = ("lens", "capture", "rivals")  # parts of bench.json


def fingerprint(commit: str | None) -> dict[str, Any]:
    """What figures depend on: GPU, driver, versions, commit and source files. A file has figures of one."""
    import torch
    from xprobe_kernels.bench.environment import program_output

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "card": program_output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton,
        "python": platform.python_version(),
        "commit": program_output("git", "-C", str(ROOT), "rev-parse", "HEAD") or commit,
        "sources_sha256": sources_sha256(),
    }


def sources_sha256(names: tuple[str, ...] = SOURCES, root: Path = ROOT) -> str:
    """Checksum of source files and folders. It also changes with edits that are not committed."""
    digest = hashlib.sha256()
    for name in names:
        path = root / name
        files = [path] if path.is_file() else sorted([*path.rglob("*.py"), *path.rglob("*.c")])
        for file in files:
            digest.update(f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def set_aside(path: Path, current: dict[str, Any]) -> str | None:
    """Renames a file with figures of another fingerprint to ``earlier-...``. Returns what differs, or None."""
    if not path.exists():
        return None
    before = read(path).get("fingerprint") or {}
    if before == current:
        return None
    os.replace(path, path.with_name(f"earlier-{path.name}"))
    changed = [name for name, value in current.items() if before.get(name) != value]
    return f"earlier-{path.name} has the earlier figures, with other {', '.join(changed)}"


def measured_shapes(out: Path, kernel: str) -> list[str]:
    """Names of the shapes whose figures bench.json has for a kernel. A shape whose inputs failed is not among them."""
    parts = read(out / "bench.json").get(kernel, [])
    failed = {_shape(part) for part in parts if part["message"] is not None}
    return [name for name in dict.fromkeys(map(_shape, parts)) if name not in failed]


def bench_problem(parts: list[dict[str, Any]]) -> str | None:
    """Names the variants of lens or rivals that are wrong or failed."""
    bad = [v["name"] for part in parts for v in part["variants"] if v["status"] in ("wrong", "failed")]
    return f"wrong or failed: {', '.join(dict.fromkeys(bad))}" if bad else None


def earlier_bench_problem(out: Path, kernel: str, shapes: list[str]) -> str | None:
    """Names the variants that are wrong or failed in the shapes that bench.json already has."""
    return bench_problem([part for part in read(out / "bench.json").get(kernel, []) if _shape(part) in shapes])


def merge(file: Path, out: Path, current: dict[str, Any] | None = None) -> str | None:
    """Adds the figures of one shape to bench.json and redraws the roofline figure. Returns a problem, or None."""
    if not file.exists():
        return f"no figures of {file.stem}"
    fresh, path = read(file), out / "bench.json"
    whole = read(path) or fresh | {kernel: [] for kernel in KERNELS}
    for kernel in KERNELS:
        new = {part["name"]: part for part in fresh.get(kernel, [])}
        kept = [part for part in whole.get(kernel, []) if part["name"] not in new]
        whole[kernel] = [*kept, *new.values()]
    shapes = [_shape(part) for kernel in ("lens", "rivals") for part in whole[kernel]]
    whole["settings"]["shape"] = ", ".join(dict.fromkeys(shapes))
    whole["fingerprint"] = current
    whole["environment"]["commit"] = whole["environment"]["commit"] or (current or {}).get("commit")
    write(path, whole)
    if fresh["lens"]:
        try:
            from xprobe_kernels.bench import figure

            figure.roofline(whole, str(out / "roofline.png"))
        except Exception as error:  # the results matter more than the figure
            return f"no figure: {type(error).__name__}: {error}"
    return bench_problem(fresh["lens"] + fresh.get("rivals", []))


def finished_runs(out: Path, tokenizer: str, data: str) -> dict[str, dict[str, Any]]:
    """The complete whole runs in run.json over the same prompts, by name."""
    return {
        run["name"]: run
        for run in read(out / "run.json").get("runs", [])
        if run.get("against") and (run["tokenizer"], run["data"]) == (tokenizer, data)
    }


def run_problem(run: dict[str, Any]) -> str | None:
    """A message if a whole run used a slower strategy or its loop waits for the GPU, else None."""
    if any(rate["attention_kernel"] is not True or rate["strategy"] != "tree" for rate in run["rates"]):
        return f"{run['name']} was not run with the attention kernel: see its warnings"
    waits = [wait for rate in run["rates"] for wait in rate.get("waits", [])]
    return f"{run['name']} waits for the GPU: {', '.join(dict.fromkeys(waits))}" if waits else None


def add_run(file: Path, out: Path, current: dict[str, Any] | None = None) -> str | None:
    """Adds the figures of one model to run.json, or replaces them. Returns a problem of the run, or None."""
    result = read(file)
    name = file.stem.removeprefix("run-")
    if not result.get("rates"):
        return f"no figures of {name}"
    result, path = {"name": name, **result}, out / "run.json"
    kept = [run for run in read(path).get("runs", []) if run["name"] != name]
    write(path, {"fingerprint": current, "runs": [*kept, result]})
    return run_problem(result)


def read_tests(found: Path, details: dict[str, Any], earlier: list[str] | None = None) -> str | None:
    """Stores counts and failures of the tests in ``details``. Returns a problem if no test ran a Triton kernel.

    ``earlier`` has the ids of the tests that passed in an earlier call.
    """
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
    if kernels or any("triton" in name.rpartition("::")[2] for name in earlier or []):
        return None
    return f"{len(cases)} tests passed, but none of them ran the triton backend"


def read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path: Path, content: Any) -> None:
    """Writes the file atomically."""
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def _shape(part: dict[str, Any]) -> str:
    return part["name"].partition("/")[0]
