"""Computes fp32 linear layers on a CPU with oneDNN where it is faster, during a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from xprobe_kernels.precision import onednn_is_faster, onednn_linear


@contextmanager
def fast_products(model: Any) -> Iterator[None]:
    """Inside, oneDNN computes the fp32 linear layers of ``model`` if it runs on a CPU where oneDNN is faster.

    This affects the current thread only, and no products that record gradients.
    """
    with fast_linear_products(model.device.type, model.dtype):
        yield


@contextmanager
def fast_linear_products(device: str, dtype: torch.dtype) -> Iterator[None]:
    """``fast_products`` for layers of one dtype on one type of device."""
    if device != "cpu" or dtype != torch.float32 or not onednn_is_faster():
        yield
        return
    with _OneDNN():
        yield


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.linear and _suits_onednn(*args, **(kwargs or {})):
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _suits_onednn(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether oneDNN can compute a product and is worth its overhead: dense fp32, and not too few rows."""
    return (
        input.dtype == weight.dtype == torch.float32
        and input.device.type == weight.device.type == "cpu"
        and input.is_contiguous()
        and weight.is_contiguous()
        and input.numel() >= 16 * input.shape[-1]
        and not torch.is_grad_enabled()
    )


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return onednn_linear(input, weight, bias)
