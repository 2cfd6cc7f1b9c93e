"""The head of a decoder as numbers: final norm, unembedding matrix, bias, scale, soft-cap."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

NormKind = Literal["rms", "layer", "none"]


@dataclass(frozen=True, eq=False)
class Unembedding:
    """``logits = softcap(scale * (norm(h) @ weight.T + bias))`` with ``softcap(z) = c * tanh(z / c)``.

    Parameters
    ----------
    weight : Tensor [V, D]
        Unembedding matrix, floating point. Its dtype is the dtype of the projection's operands.
    norm : "rms", "layer" or "none"
        ``rms``: ``h / sqrt(mean(h^2) + eps)``; ``layer``: the mean is removed first. Applied along D.
    gamma : Tensor [D], optional
        The factor *as applied* after the norm (Gemma stores ``w`` and applies ``1 + w``: pass ``1 + w``).
    beta : Tensor [D], optional
        Added after gamma (LayerNorm).
    eps : float
        The norm's epsilon.
    bias : Tensor [V], optional
        Added to the projection; may hold ``-inf`` for tokens that can never be produced.
    scale : float
        Multiplies projection plus bias (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
    softcap : float, optional
        ``c`` above (Gemma 2: 30). None: no soft-cap.

    Raises
    ------
    ValueError
        Names the argument, its value and what was expected.
    """

    weight: Tensor
    norm: NormKind = "rms"
    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = 1e-6
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        weight = self.weight
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
            raise ValueError(f"weight must be a floating-point tensor of shape [V, D], got {describe(weight)}")
        if self.norm not in get_args(NormKind):
            raise ValueError(f"norm must be one of {', '.join(get_args(NormKind))}, got {self.norm!r}")
        vocabulary, width = self.weight.shape
        for name, length in (("gamma", width), ("beta", width), ("bias", vocabulary)):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or tuple(value.shape) != (length,) or not value.is_floating_point():
                raise ValueError(f"{name} must be a floating-point tensor of shape [{length}], got {describe(value)}")
            if value.device != self.weight.device:
                raise ValueError(f"{name} is on {value.device}, weight is on {self.weight.device}: move one of them")
        if not self.eps >= 0:
            raise ValueError(f"eps must be zero or positive, got {self.eps!r}")
        if not 0 < abs(self.scale) < float("inf"):
            raise ValueError(f"scale must be finite and not zero, got {self.scale!r}")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(f"softcap must be positive, got {self.softcap!r} (None means no soft-cap)")

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def normalize(self, hidden: Tensor) -> Tensor:
        """The final norm of ``hidden`` [..., D], computed and returned in ``hidden``'s dtype."""
        if self.norm == "layer":
            hidden = hidden - hidden.mean(-1, keepdim=True)
        if self.norm != "none":
            hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)
        if self.gamma is not None:
            hidden = hidden * self.gamma.to(hidden.dtype)
        if self.beta is not None:
            hidden = hidden + self.beta.to(hidden.dtype)
        return hidden

    def without_norm(self) -> Unembedding:
        """The same head for rows that ``capture`` has normed already."""
        return replace(self, norm="none", gamma=None, beta=None)

    def bias_and_scale(self, projected: Tensor, tokens: Tensor | slice = slice(None)) -> Tensor:
        """Bias and scale on ``norm(h) @ weight[tokens].T``; changes ``projected`` in place and returns it.

        ``tokens`` selects the vocabulary entries that the last dimension of ``projected`` stands for.
        """
        if self.bias is not None:
            projected += self.bias[tokens].to(projected.dtype)
        if self.scale != 1.0:
            projected *= self.scale
        return projected

    def cap(self, logits: Tensor) -> Tensor:
        """The soft-cap, which keeps the order of logits; changes ``logits`` in place and returns it."""
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def fingerprint(self) -> str:
        """SHA-256 over every number of the head, in hexadecimal: equal heads, equal readouts."""
        digest = hashlib.sha256(f"{self.norm} {self.eps!r} {self.scale!r} {self.softcap!r}".encode())
        for name in ("weight", "gamma", "beta", "bias"):
            value = getattr(self, name)
            if value is None:
                digest.update(f"{name} none".encode())
                continue
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy())
        return digest.hexdigest()


def describe(value: object) -> str:
    """Shape, dtype and device of a tensor for an error message; the type's name for anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__}"
