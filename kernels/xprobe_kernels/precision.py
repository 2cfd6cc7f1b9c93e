"""Matrix products of the library with fp32 accumulation and fp32 results, at the precision the caller asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """fp32 products on a GPU at "ieee" or "tf32", whatever the caller's own setting; the setting is put back.

    The setting is the process's: another thread's fp32 products run at it while this one is inside.
    """
    matmul = torch.backends.cuda.matmul
    before, wanted = matmul.fp32_precision, precision
    try:
        if before != wanted:
            matmul.fp32_precision = wanted
        yield
    finally:
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before


def product(rows: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``rows @ weight.T`` [r, v] in fp32; 16-bit operands are multiplied as they are and summed in fp32."""
    if rows.dtype == torch.float32 or rows.device.type != "cuda":
        return torch.mm(rows.float(), weight.float().T, out=out)
    if out is None:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return torch.mm(rows, weight.T, out_dtype=torch.float32, out=out)
