"""How precisely the kernels compute: library products with fp32 sums at the precision that the caller asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_A_TIME = 64
BOUNDED_CAP = 40.0  # up to this soft-cap, e^(z - cap) is a normal fp32 number for every capped logit z


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets the precision of fp32 products on a GPU to "ieee" or "tf32", and puts the caller's setting back.

    The setting belongs to the process: fp32 products of other threads use it too while this context is active.
    """
    # oneDNN has its own setting. It matters for interpreted kernels on processors with matrix units
    libraries: list[tuple[Any, str]] = [(torch.backends.cuda.matmul, precision)]
    libraries.append((torch.backends.mkldnn.matmul, "ieee"))  # type: ignore[attr-defined]
    before = [library.fp32_precision for library, _ in libraries]
    try:
        for library, wanted in libraries:
            if library.fp32_precision != wanted:
                library.fp32_precision = wanted
        yield
    finally:
        for (library, _), earlier in zip(libraries, before, strict=True):
            if library.fp32_precision != earlier:
                library.fp32_precision = earlier


def product(rows: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``rows @ weight.T`` [r, v] in fp32. On a GPU 16-bit operands are multiplied as they are and summed in fp32."""
    if rows.dtype == torch.float32 or rows.device.type != "cuda":
        return torch.mm(rows.float(), weight.float().T, out=out)
    if out is None:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return torch.mm(rows, weight.T, out_dtype=torch.float32, out=out)


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN computes fp32 products on this CPU faster than torch's own BLAS library.

    True on AMD processors with AVX-512 where torch uses MKL: MKL runs its AVX2 code there, oneDNN uses AVX-512. The
    decision depends on the processor's name, not on a measurement. The two libraries differ in the last bits, and a
    machine must give the same bits every time.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "AuthenticAMD" in cpuinfo and torch.backends.mkldnn.is_available() and _onednn_works()


def _onednn_works() -> bool:
    """Whether oneDNN's linear layer computes correctly. torch's function for it is not public, so this tests it."""
    rows, weight = torch.arange(6.0).view(2, 3), torch.ones(4, 3)
    try:
        return torch.equal(onednn_linear(rows, weight, None), rows @ weight.T)
    except (AttributeError, RuntimeError, TypeError):
        return False


def onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows @ weight.T + bias`` [..., v] of fp32 CPU tensors by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def cpu_product(rows: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``rows @ weight.T`` [r, v] by the faster library. oneDNN returns a new tensor; torch writes to ``out``."""
    if rows.dtype == torch.float32 and rows.device.type == "cpu" and onednn_is_faster():
        # oneDNN compiles and keeps code for each number of rows, so the number is rounded up
        missing = -rows.shape[0] % ROWS_AT_A_TIME
        return onednn_linear(F.pad(rows, (0, 0, 0, missing)) if missing else rows, weight, None)[: rows.shape[0]]
    return torch.mm(rows, weight.T, out=out)
