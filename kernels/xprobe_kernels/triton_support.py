"""Where Triton's kernels can run, and with which dtypes. Does not import Triton."""

from __future__ import annotations

import os
from importlib import util

import torch


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` is set: Triton then interprets its kernels, slowly, on any machine."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton is installed and its kernels run on ``device``."""
    runs = device.type == "cuda" or (device.type == "cpu" and interpreted())
    return runs and util.find_spec("triton") is not None


def kernel_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that the kernels take; the interpreter does not compute in bf16."""
    return (torch.float32, torch.float16) + (() if interpreted() else (torch.bfloat16,))
