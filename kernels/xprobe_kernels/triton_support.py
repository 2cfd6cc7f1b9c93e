"""Where Triton's kernels can run and with which dtypes, and sizes of launches. Does not import Triton."""

from __future__ import annotations

import os
from importlib import util

import torch


def cdiv(count: int, size: int) -> int:
    """How many parts of ``size`` hold ``count``. Triton's own function costs ten times as much in Python.

    Examples
    --------
    >>> cdiv(129, 64), cdiv(128, 64)
    (3, 2)
    """
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is at least ``count``. Triton's own costs ten times as much in Python.

    Examples
    --------
    >>> next_power_of_2(5), next_power_of_2(4), next_power_of_2(1)
    (8, 4, 1)
    """
    return 1 << max(count - 1, 0).bit_length()


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
