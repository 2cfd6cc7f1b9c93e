"""The machine, the versions and the time of a measurement, which are stored with every figure."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads, date, command line and commit. Unknown entries are None."""
    git = ("git", "-C", str(Path(__file__).parent))
    # installed into a virtual environment, this file may lie in somebody else's checkout, which does not track it
    ours = program_output(*git, "ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = program_output(*git, "rev-parse", "HEAD") if ours else None
    changed = program_output(*git, "status", "--porcelain", "--untracked-files=no") if ours else None
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of the machine before the measurement
        "fp32_products": torch.get_float32_matmul_precision(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [_relative(part) for part in sys.argv],
        "commit": commit,
        "commit_changed": None if commit is None else bool(changed),
    }


def _relative(part: str) -> str:
    """A path below the current folder without that folder, which says nothing of the measurement."""
    here = f"{Path.cwd()}{os.sep}"
    return part.removeprefix(here)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def processor() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    printed = program_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return printed.splitlines()[0].strip() if printed else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def program_output(*command: str) -> str | None:
    """The output of a program; None if the program is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
