"""``lens``, the logit lens of many rows in one call, and ``Readout``, its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from xprobe_kernels.request import MIB, LensRequest
from xprobe_kernels.transfer import on
from xprobe_kernels.triton_support import interpreted, kernel_dtypes, kernels_run_on
from xprobe_kernels.unembedding import Unembedding, describe

__all__ = ["BACKENDS", "KERNELS", "MAX_TOP_K", "MIB", "Readout", "available_backends", "interpreted", "lens"]

MAX_TOP_K = 32

# name -> (module and function, device types). "auto" takes the first backend that serves the device and the dtypes.
BACKENDS = {
    "triton": ("triton_readout:readout", ("cuda",)),
    "workspace": ("workspace:readout", ("cuda",)),
    "cpu": ("cpu:readout", ("cpu", "cuda")),
    "cpu-eager": ("cpu:readout_eager", ("cpu", "cuda")),
    "reference": ("reference:readout", ("cpu", "cuda")),
}
KERNELS = ("triton", "workspace")  # need Triton; on a CPU they run in its interpreter only


@dataclass(frozen=True, eq=False)
class Readout:
    """Result of ``lens`` for R rows with A looked-up tokens each. Floating-point outputs are fp32 (fp64 for fp64 rows).

    A row with NaN or infinity gives NaN, rank 0 and id -1, and does not affect other rows. A look-up of -1 gives a
    logit of NaN and rank 0.

    Attributes
    ----------
    logits : Tensor [R, A]
        Logits of the looked-up tokens, with bias, scale and soft-cap.
    logsumexp : Tensor [R]
        Natural logarithm of the sum of the exponentials of all logits.
    rank : Tensor [R, A], int64
        1 + the number of other tokens with a strictly larger logit. Logits are compared before the soft-cap, which
        keeps their order. Logits closer than the rounding error of the projection are tied.
    entropy : Tensor [R]
        Entropy of the softmax distribution, in nats.
    top_ids, top_logits : Tensor [R, k]
        The k largest logits, largest first. Among logits that are equal before the soft-cap the lowest id comes first.
        None if k = 0.
    kl : Tensor [R]
        KL(final layer || this row), in nats. None unless ``final_rows`` was given.
    backend, precision : str
        The backend and the precision that computed the result.

    Examples
    --------
    >>> import torch
    >>> from xprobe_kernels import Unembedding, lens
    >>> head = Unembedding(torch.eye(2), norm="none")
    >>> readout = lens(torch.tensor([[0.25, 0.75]]).log(), head, torch.tensor([1]))
    >>> round(float(readout.log_probability.exp()), 4), int(readout.rank)
    (0.75, 1)
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
    """Names of the backends that run on ``device`` on this machine; "auto" prefers the first.

    Examples
    --------
    >>> from xprobe_kernels import available_backends
    >>> [name for name in available_backends("cpu") if name not in ("triton", "workspace")]
    ['cpu', 'cpu-eager', 'reference']

    "triton" and "workspace" need a GPU. With ``TRITON_INTERPRET=1`` they also run on a CPU, slowly.
    """
    device = torch.device(device)
    names = [name for name, (_, kinds) in BACKENDS.items() if device.type in kinds and name not in KERNELS]
    if not kernels_run_on(device):
        return names
    return [*names, *KERNELS] if device.type == "cpu" else [*KERNELS, *names]


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
    """Logit lens of ``hidden``: per row the logits and ranks of given tokens, log-sum-exp, entropy, top-k and KL.

    Only the ``reference`` backend holds all [R, V] logits at once.

    Parameters
    ----------
    hidden : Tensor [R, D]
        Rows of the residual stream *before* the final norm. The rows of any number of layers may be stacked.
    head : Unembedding
        The model's final norm and unembedding.
    lookup : Tensor [R] or [R, A], int64
        Token ids to look up in each row; -1 looks up nothing.
    top_k : int, 0 to 32
        How many of the largest logits to return.
    final_rows : Tensor [R], int64, optional
        For each row, the index of the row that holds the final layer of the same position. With it ``kl`` is computed.
        It may be on the device of ``hidden`` or on the CPU. The CPU is faster: the host then does not wait for the GPU.
    backend : str
        "auto" or one of ``available_backends(hidden.device)``.
    precision : "ieee" or "tf32"
        "tf32" lets a GPU round fp32 operands of the projection to 10 mantissa bits.
    workspace_bytes : int
        Upper bound on temporary memory, in bytes; with ``final_rows`` the weights of final rows take as much again.
        More rows than fit are read in blocks. The backend "workspace" also holds a normed copy of all rows, unless
        they need neither norm nor cast (rows from ``capture`` with a head).
    check : bool
        False skips the check that ids and row indices are in range. On a GPU this saves one wait for the device.

    Returns
    -------
    Readout

    Raises
    ------
    ValueError
        Names the argument, its value and what was expected. Also if ``hidden`` requires a gradient, because none is
        computed: pass ``hidden.detach()`` or call under ``torch.no_grad()``.

    Notes
    -----
    Results have no gradient, neither for ``hidden`` nor for the head.

    The logit lens is from nostalgebraist, "interpreting GPT: the logit lens" (2020). docs/kernels.md describes the
    algorithm and its numerics.

    Examples
    --------
    Two layers of one position. The second layer is the final one:

    >>> import torch
    >>> from xprobe_kernels import Unembedding, lens
    >>> head = Unembedding(torch.eye(3), norm="none")
    >>> hidden = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    >>> readout = lens(hidden, head, torch.tensor([0, 0]), top_k=2, final_rows=torch.tensor([1, 1]))
    >>> readout.rank.flatten().tolist(), readout.top_ids.tolist()
    ([3, 1], [[2, 1], [0, 1]])
    >>> readout.kl[1].item()
    0.0
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
        _check_indices("final_rows", final_rows, hidden, (hidden.shape[0],), bounds, cpu_allowed=True)
    name = _backend(backend, hidden, head)
    if final_rows is not None and name not in KERNELS:
        final_rows = final_rows.to(hidden.device)
    check_forward_only(hidden, "lens")
    request = LensRequest(hidden, head, lookup, top_k, final_rows, precision, workspace_bytes)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), on(hidden.device):
        fields = _function(name)(request)
    return Readout(**fields, backend=name, precision=precision)


def check_forward_only(hidden: Tensor, function: str) -> None:
    """Raises ``ValueError`` if a gradient is asked for: a loss made of the results would silently lack it."""
    if hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"hidden requires a gradient, and {function} computes none: pass hidden.detach(), or call it under "
            "torch.no_grad()"
        )


def _backend(asked: str, hidden: Tensor, head: Unembedding) -> str:
    """The name of the backend to use. "auto" skips backends that do not take the dtypes."""
    usable = available_backends(hidden.device)
    if asked != "auto" and asked not in usable:
        raise ValueError(f"backend must be 'auto' or one of {usable} on {hidden.device.type}, got {asked!r}")
    for name in usable if asked == "auto" else [asked]:
        if name not in KERNELS:
            return name
        wrong = [dtype for dtype in (hidden.dtype, head.weight.dtype) if dtype not in kernel_dtypes()]
        if not wrong:
            return name
        if asked == name:
            raise ValueError(f"backend {name!r} takes {', '.join(map(str, kernel_dtypes()))} here, got {wrong[0]}")
    raise AssertionError("some backend takes every dtype")


@cache
def _function(name: str) -> Callable[[LensRequest], dict[str, Any]]:
    module, function = BACKENDS[name][0].split(":")
    return getattr(import_module(f"xprobe_kernels.{module}"), function)


def _checked_lookup(hidden: Tensor, head: Unembedding, lookup: Tensor, check: bool) -> Tensor:
    """Checks rows and look-ups against the head. Returns the look-ups as [R, A]."""
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
    cpu_allowed: bool = False,
) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or tuple(value.shape) != shape:
        raise ValueError(f"{name} must be an int64 tensor of shape {list(shape)}, got {describe(value)}")
    if value.device != hidden.device and not (cpu_allowed and value.device.type == "cpu"):
        raise ValueError(f"{name} is on {value.device}, hidden is on {hidden.device}: move one of them")
    if bounds and value.numel():
        low, high = bounds
        smallest, largest = (int(bound) for bound in value.aminmax())
        if smallest < low or largest >= high:
            wrong = smallest if smallest < low else largest
            raise ValueError(f"{name} holds {wrong}; every entry must be from {low} to {high - 1}")
