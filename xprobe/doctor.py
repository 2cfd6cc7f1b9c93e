"""What works on this machine, and what each missing piece would add."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from xprobe.cache import cache_dir
from xprobe.config import DEFAULT_MODEL
from xprobe.errors import XprobeError
from xprobe.runs.provenance import versions

KERNELS = "xprobe-kernels"  # the distribution that holds the package xprobe_kernels alone
REINSTALL = "pip install --force-reinstall --no-deps xprobe"


@dataclass(frozen=True)
class Check:
    """One finding. ``needed`` pieces that are not ``ok`` stop the main job; others only take something away."""

    name: str
    ok: bool
    detail: str
    needed: bool = False


# package -> (needed for the main job, what it adds, how to get it)
PIECES = {
    "torch": (True, "models and the lens", "pip install torch"),
    "transformers": (True, "models and tokenizers", "pip install transformers"),
    "safetensors": (True, "shards", "pip install safetensors"),
    "numpy": (True, "numbers", "pip install numpy"),
    "pandas": (True, "tables", "pip install pandas"),
    "pyarrow": (True, "parquet files", "pip install pyarrow"),
    "gguf": (False, ".gguf models, the demo model among them", "pip install 'xprobe[gguf]'"),
    "accelerate": (False, ".gguf models, the demo model among them", "pip install 'xprobe[gguf]'"),
    "scikit-learn": (True, "probes and phases", "pip install scikit-learn"),
    "scipy": (True, "phases", "pip install scipy"),
    "joblib": (True, "probes on several cores", "pip install joblib"),
    "jinja2": (True, "the page of a run", "pip install jinja2"),
    "matplotlib": (False, "figures", "pip install 'xprobe[plot]'"),
    "py3langid": (False, "error types of answers", "pip install 'xprobe[scoring]'"),
    "rjieba": (False, "scores of Chinese answers", "pip install 'xprobe[scoring]'"),
    "pythainlp": (False, "scores of Thai answers", "pip install 'xprobe[scoring]'"),
    "uniseg": (False, "words and sentences for the oracle", "pip install 'xprobe[scoring]'"),
    "datasets": (False, "questions of the Hugging Face Hub (--data hf:NAME)", "pip install 'xprobe[datasets]'"),
    "trackio": (False, "tracking of runs (--track trackio)", "pip install 'xprobe[tracking]'"),
    "wandb": (False, "tracking of runs (--track wandb)", "pip install 'xprobe[tracking]'"),
    "triton": (False, "fused kernels on a GPU", "pip install 'xprobe[gpu]'"),
    "rich": (False, "a table of all runs of a sweep", "pip install 'xprobe[sweep]'"),
    "ray": (False, "sweeps on Ray", "pip install 'xprobe[ray]'"),
    "submitit": (False, "sweeps on Slurm", "pip install 'xprobe[slurm]'"),
    "sentencepiece": (
        False,
        "SentencePiece tokenizers without a tokenizer.json",
        "pip install 'xprobe[sentencepiece]'",
    ),
}


def diagnose() -> list[Check]:
    """Checks packages, the kernels' among them, device, lens backends, demo model, data and cache, in that order."""
    checks = [_kernels(), *_packages()]
    if any(check.needed and not check.ok for check in checks):
        return checks
    sections: list[Callable[[], list[Check]]] = [_device, _backends, _demo_model, _data, _cache]
    return checks + [check for section in sections for check in section()]


def _kernels() -> Check:
    """Whether the package ``xprobe_kernels`` is here, and is xprobe's own alone."""
    other = versions((KERNELS,))[KERNELS]
    if find_spec("xprobe_kernels") is None:
        return Check("xprobe_kernels", False, f"a part of xprobe whose files are missing: {REINSTALL}", needed=True)
    if other is None:
        return Check("xprobe_kernels", True, "part of xprobe", needed=True)
    found = f"{KERNELS} {other} is installed beside xprobe and owns the same files"
    return Check("xprobe_kernels", False, f"{found}: pip uninstall {KERNELS}, then {REINSTALL}")


def _packages() -> list[Check]:
    found = versions(tuple(PIECES))
    return [
        Check(name, found[name] is not None, found[name] or f"not installed; adds {adds}: {how}", needed)
        for name, (needed, adds, how) in PIECES.items()
    ]


def _device() -> list[Check]:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        accelerator = Check("accelerator", True, ", ".join(cards))
    else:
        accelerator = Check(
            "accelerator", False, "none that torch sees; a CUDA or ROCm device makes large models practical"
        )
    flags = _cpu_flags()
    units = [label for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512")) if flag in flags]
    matrix = f"bf16 units: {' and '.join(units)}" if units else "no bf16 units found"
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return [accelerator, Check("cpu", True, f"{threads}; {matrix}")]


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return set()
    for line in path.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _backends() -> list[Check]:
    """Runs every lens backend on a small head and compares it with the fp64 definition."""
    import torch
    from xprobe_kernels import Unembedding, available_backends, compiled, lens

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 48, generator=generator)
    head = Unembedding(torch.randn(5000, 48, generator=generator), gamma=torch.rand(48, generator=generator))
    lookup = torch.randint(0, 5000, (64,), generator=generator)
    truth = lens(hidden.double(), head, lookup, backend="reference")
    checks = []
    for name in available_backends("cpu"):
        values = lens(hidden, head, lookup, backend=name)
        error = float((values.log_probability.double() - truth.log_probability).abs().max())
        checks.append(Check(f"lens: {name}", error < 1e-3, f"off the fp64 definition by {error:.1e} nats", needed=True))
    fast = compiled.row_pass() is not None
    without = "no C compiler (gcc or clang) served; with one the lens is twice as fast"
    found = "each tile of logits is read in one pass" if fast else without
    return [*checks, Check("lens: cpu, compiled", fast, found)]


def _demo_model() -> list[Check]:
    from xprobe.models import loading

    try:
        source = loading.resolve(DEFAULT_MODEL)
    except XprobeError as error:
        return [Check(f"model: {DEFAULT_MODEL}", False, str(error))]
    return [Check(f"model: {DEFAULT_MODEL}", True, source.location)]


def _data() -> list[Check]:
    from xprobe.qa.parallel import find_files

    checks = []
    for name in ("builtin", "xquad"):
        try:
            files = find_files(name)
            checks.append(
                Check(f"data: {name}", True, f"{len(files)} languages in {next(iter(files.values())).parent}")
            )
        except XprobeError as error:
            checks.append(Check(f"data: {name}", False, str(error)))
    return checks


def _cache() -> list[Check]:
    folder = cache_dir()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(nearest).free / 1e9
    writable = os.access(nearest, os.W_OK)
    detail = f"{folder}, {free:.0f} GB free" if writable else f"{folder} cannot be written: set XPROBE_CACHE"
    return [Check("cache", writable, detail)]
