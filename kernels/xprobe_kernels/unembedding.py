"""The head of a decoder as tensors and numbers: final norm, unembedding matrix, bias, scale, soft-cap."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

NormKind = Literal["rms", "layer", "none"]


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The final norm and unembedding of a model.

    ``logits = softcap(scale * (norm(h) @ weight.T + bias))`` with ``softcap(z) = c * tanh(z / c)``.

    Parameters
    ----------
    weight : Tensor [V, D]
        Unembedding matrix, floating point. The projection multiplies in the wider dtype of rows and weight.
    norm : "rms", "layer" or "none"
        ``rms``: ``h / sqrt(mean(h^2) + eps)`` along D. ``layer``: the same after the mean is subtracted.
    gamma : Tensor [D], optional
        The factor *as applied* after the norm. Gemma stores ``w`` and applies ``1 + w``: pass ``1 + w``.
    beta : Tensor [D], optional
        Added after gamma (LayerNorm).
    eps : float
        The norm's epsilon.
    bias : Tensor [V], optional
        Added to the projection. ``-inf`` excludes a token.
    scale : float
        Multiplies projection plus bias. This is Cohere's ``logit_scale``, and 1 / ``logits_scaling`` of Granite.
    softcap : float, optional
        The ``c`` of the formula above (Gemma 2: 30). None: no soft-cap.

    Raises
    ------
    ValueError
        Names the argument, its value and what was expected.

    Examples
    --------
    >>> import torch
    >>> from xprobe_kernels import Unembedding
    >>> head = Unembedding(torch.eye(2), norm="rms", gamma=torch.tensor([1.0, 2.0]), eps=0.0, softcap=30.0)
    >>> head.vocab_size, head.width
    (2, 2)
    >>> head.normalize(torch.tensor([[3.0, 3.0]])).tolist()
    [[1.0, 2.0]]
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
        if hasattr(weight, "full_tensor"):  # a DTensor, whose module takes long to import
            raise ValueError("weight is a DTensor, spread over devices: gather it with weight.full_tensor()")
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
        """The same head for rows that already went through the norm, such as rows from ``capture`` with a head."""
        return replace(self, norm="none", gamma=None, beta=None)

    def bias_and_scale(self, projected: Tensor, tokens: Tensor | slice = slice(None)) -> Tensor:
        """Adds bias and scale to ``norm(h) @ weight[tokens].T``. Changes ``projected`` in place and returns it.

        ``tokens`` names the vocabulary entries along the last dimension of ``projected``.
        """
        if self.bias is not None:
            projected += self.bias[tokens].to(projected.dtype)
        if self.scale != 1.0:
            projected *= self.scale
        return projected

    def cap(self, logits: Tensor) -> Tensor:
        """Applies the soft-cap, which keeps the order of logits. Changes ``logits`` in place and returns it."""
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def fingerprint(self) -> str:
        """SHA-256 over all numbers of the head, in hexadecimal. Equal heads have equal fingerprints."""
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
    """For error messages: dtype, shape and device of a tensor, or the type of anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__}"
