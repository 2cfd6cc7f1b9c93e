"""``lens``: the logit lens of many rows in one call, and ``Readout``, what it returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module, util
from typing import Any, Literal

import torch
from torch import Tensor

from xprobe_kernels.transfer import on
from xprobe_kernels.unembedding import Unembedding, describe

MAX_TOP_K = 32
MIB = 1 << 20

# name -> (module and function, device types it serves). `auto` takes the first that serves device and dtype.
BACKENDS = {
    "triton": ("triton_lens:readout", ("cuda",)),
    "workspace": ("workspace:readout", ("cuda",)),
    "cpu": ("cpu:readout", ("cpu", "cuda")),
    "cpu-eager": ("cpu:readout_eager", ("cpu", "cuda")),
    "reference": ("reference:readout", ("cpu", "cuda")),
}
KERNELS = ("triton", "workspace")  # need Triton; on a CPU only its interpreter runs them


@dataclass(frozen=True, eq=False)
class Readout:
    """What the lens says of R rows with A looked-up tokens each. Floating-point outputs are fp32 (fp64 for fp64 rows).

    A row that holds NaN or infinity reads NaN (rank 0, id -1), and so does a look-up of -1; other rows are untouched.

    Attributes
    ----------
    logits : Tensor [R, A]
        Logits of the looked-up tokens, with bias, scale and soft-cap.
    logsumexp : Tensor [R]
        Natural logarithm of the sum of exponentials over the vocabulary; ``logits - logsumexp`` is in nats.
    rank : Tensor [R, A], int64
        1 + number of other tokens with a strictly larger logit, compared before the soft-cap, which keeps the order.
        Logits closer than the rounding error of the projection count as tied.
    entropy : Tensor [R]
        Of the lens distribution, in nats.
    top_ids, top_logits : Tensor [R, k]
        The k largest logits, largest first; of equal ones (before the soft-cap) the lowest id first. None if k = 0.
    kl : Tensor [R]
        KL(final layer || this row) in nats. None unless ``final_rows`` was given.
    backend, precision : str
        What computed it.
    """

    logits: Tensor
    logsumexp: Tensor
    rank: Tensor
    entropy: Tensor
    top_ids: Tensor | None
    top_logits: Tensor | None
    kl: Tensor | None
    backend: str
    precision: str

    @property
    def log_probability(self) -> Tensor:
        """Log-probability of the looked-up tokens [R, A], in nats."""
        return self.logits - self.logsumexp[:, None]


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """Backends that can serve ``device`` here, the one that ``auto`` takes first."""
    kind = torch.device(device).type
    found = [name for name, (_, kinds) in BACKENDS.items() if kind in kinds]
    if kind == "cpu" and interpreted():
        found += KERNELS
    return [name for name in found if name not in KERNELS or util.find_spec("triton")]


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter (``TRITON_INTERPRET=1``): slow, on any machine."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def lens(
    hidden: Tensor,
    head: Unembedding,
    lookup: Tensor,
    *,
    top_k: int = 0,
    final_rows: Tensor | None = None,
    backend: str = "auto",
    precision: Literal["ieee", "tf32"] = "ieee",
    workspace_bytes: int = 256 * MIB,
    check: bool = True,
) -> Readout:
    """Logit lens of ``hidden``: logit, rank and log-normaliser of given tokens, entropy, top-k and KL, row by row.

    The [R, V] logits are never held at once (the ``reference`` backend excepted).

    Parameters
    ----------
    hidden : Tensor [R, D]
        Residual-stream rows as the model left them, *before* the final norm; any number of layers stacked.
    head : Unembedding
        The model's final norm and unembedding.
    lookup : Tensor [R] or [R, A], int64
        Token ids to look up in each row; -1 for none.
    top_k : int, 0 to 32
        How many of the largest logits to return.
    final_rows : Tensor [R], int64, optional
        For each row, the index of the row that holds the final layer of the same position; asks for ``kl``. On the
        device of ``hidden``, or in main memory: then no GPU is waited for to find how many there are.
    backend : "auto" or one of ``available_backends(hidden.device)``
    precision : "ieee" or "tf32"
        "tf32" lets a GPU round fp32 operands of the projection to 10 mantissa bits.
    workspace_bytes : int
        Bound on temporary memory, in bytes. The GPU kernels take a normed copy of the rows beside it, unless the rows
        need neither norm nor cast (``capture`` with a head).
    check : bool
        False: ids and row indices are known to be in range. On a GPU that saves waiting for it before the first launch.

    Raises
    ------
    ValueError
        Names the argument, its value and what was expected.
    """
    lookup = _checked_lookup(hidden, head, lookup, check)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k <= min(MAX_TOP_K, head.vocab_size):
        limit = min(MAX_TOP_K, head.vocab_size)
        raise ValueError(f"top_k must be a whole number from 0 to {limit}, got {top_k!r}")
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee' or 'tf32', got {precision!r}")
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes < MIB:
        raise ValueError(f"workspace_bytes must be a whole number of at least {MIB} (1 MiB), got {workspace_bytes!r}")
    if final_rows is not None:
        bounds = (0, hidden.shape[0]) if check else None
        _check_indices("final_rows", final_rows, hidden, (hidden.shape[0],), bounds, anywhere=True)
    name = _backend(backend, hidden, head)
    if final_rows is not None and name not in KERNELS:
        final_rows = final_rows.to(hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), on(hidden.device):
        fields = _function(name)(hidden, head, lookup, top_k, final_rows, workspace_bytes, precision)
    return Readout(**fields, backend=name, precision=precision)


def _backend(asked: str, hidden: Tensor, head: Unembedding) -> str:
    """The backend's name; "auto" skips what cannot take the dtypes."""
    usable = available_backends(hidden.device)
    if asked != "auto" and asked not in usable:
        raise ValueError(f"backend must be 'auto' or one of {usable} on {hidden.device.type}, got {asked!r}")
    for name in usable if asked == "auto" else [asked]:
        if name not in KERNELS:
            return name
        narrow = (torch.float32, torch.float16) + (() if interpreted() else (torch.bfloat16,))
        wrong = [dtype for dtype in (hidden.dtype, head.weight.dtype) if dtype not in narrow]
        if not wrong:
            return name
        if asked == name:
            raise ValueError(f"backend {name!r} takes {', '.join(map(str, narrow))} here, got {wrong[0]}")
    raise AssertionError("some backend takes every dtype")


@cache
def _function(name: str) -> Callable[..., dict[str, Any]]:
    module, function = BACKENDS[name][0].split(":")
    return getattr(import_module(f"xprobe_kernels.{module}"), function)


def _checked_lookup(hidden: Tensor, head: Unembedding, lookup: Tensor, check: bool) -> Tensor:
    """Checks rows and look-ups against the head; returns the look-ups as [R, A]."""
    if not isinstance(head, Unembedding):
        raise ValueError(f"head must be an Unembedding, got {describe(head)}")
    if not isinstance(hidden, Tensor) or hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating-point tensor of shape [R, {head.width}], got {describe(hidden)}")
    if hidden.shape[1] != head.width:
        raise ValueError(f"hidden has width {hidden.shape[1]}, the head's weight has width {head.width}")
    if hidden.device != head.weight.device:
        raise ValueError(
            f"hidden is on {hidden.device}, the head's weight is on {head.weight.device}: move one of them"
        )
    if not isinstance(lookup, Tensor) or lookup.ndim not in (1, 2):
        raise ValueError(f"lookup must be an int64 tensor of shape [R] or [R, A], got {describe(lookup)}")
    if lookup.ndim == 1:
        lookup = lookup[:, None]
    bounds = (-1, head.vocab_size) if check else None
    _check_indices("lookup", lookup, hidden, (hidden.shape[0], lookup.shape[1]), bounds)
    return lookup


def _check_indices(
    name: str,
    value: object,
    hidden: Tensor,
    shape: tuple[int, ...],
    bounds: tuple[int, int] | None,
    anywhere: bool = False,
) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or tuple(value.shape) != shape:
        raise ValueError(f"{name} must be an int64 tensor of shape {list(shape)}, got {describe(value)}")
    if value.device != hidden.device and not (anywhere and value.device.type == "cpu"):
        raise ValueError(f"{name} is on {value.device}, hidden is on {hidden.device}: move one of them")
    if bounds and value.numel():
        low, high = bounds
        smallest, largest = (int(bound) for bound in value.aminmax())
        if smallest < low or largest >= high:
            wrong = smallest if smallest < low else largest
            raise ValueError(f"{name} holds {wrong}; every entry must be from {low} to {high - 1}")
