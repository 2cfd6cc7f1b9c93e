"""Transports: linear maps that carry a hidden state to the last layer's basis, before the model's norm and head.

z[l] = head(norm(T_l h[l] + b_l)). Without a transport this is the logit lens. The maps of all layers are applied in one
batched product; that is about D / V of the work of the lens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xprobe.errors import ModelError


@dataclass(frozen=True, eq=False)
class Transport:
    """The maps of one lens.

    Attributes
    ----------
    kind : str
        One of ``xprobe.lenses.settings.LENSES``.
    layers : tuple of int
        The M layers that have a map. At the others a state is read as it is.
    weight : Tensor [M, D, D], or (Tensor [M, D, r], Tensor [M, r, D])
        T_l, or two factors of it (low rank).
    bias : Tensor [M, D], optional
    residual : bool
        Whether the state is added: T_l = 1 + weight.
    sha256 : str
        Of the file that the maps were read from; empty for maps in memory.
    about : mapping
        What the file says of itself: model, prompts, target, ...

    Examples
    --------
    >>> transport = Transport("regression", (1,), 2 * torch.eye(2)[None])
    >>> rows = torch.ones(3, 1, 2)  # three layers, one row
    >>> transport.apply(rows)[:, 0].tolist()
    [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]]
    """

    kind: str
    layers: tuple[int, ...]
    weight: Tensor | tuple[Tensor, Tensor]
    bias: Tensor | None = None
    residual: bool = False
    sha256: str = ""
    about: Mapping[str, object] = field(default_factory=dict)
    _placed: dict[tuple[torch.device, torch.dtype], tuple[tuple[Tensor, ...], Tensor | None]] = field(
        default_factory=dict
    )

    @property
    def width(self) -> int:
        """D."""
        return self._factors()[0].shape[1]

    def _factors(self) -> tuple[Tensor, ...]:
        return self.weight if isinstance(self.weight, tuple) else (self.weight,)

    def apply(self, rows: Tensor) -> Tensor:
        """Rows [L + 1, R, D] of all layers, with those of ``layers`` mapped; the others are the same.

        Products are summed in fp32 (fp64 for fp64 rows); the result has the dtype of the rows. ``rows`` is not changed.

        Raises
        ------
        ModelError
            The rows are not those of a model of this width and number of layers.
        """
        last = max(self.layers, default=0)
        if rows.shape[-1] != self.width or last >= len(rows):
            raise ModelError(
                f"the {self.kind} lens has maps of width {self.width} up to layer {last}, the rows have width "
                f"{rows.shape[-1]} and {len(rows)} layers"
            )
        factors, bias = self._on(rows)
        first, together = self.layers[0], self.layers[-1] - self.layers[0] + 1 == len(self.layers)
        where = slice(first, last + 1) if together else list(self.layers)  # a slice takes no copy
        own = rows[where].to(factors[0].dtype)
        moved = own
        for factor in reversed(factors):
            moved = torch.bmm(moved, factor.transpose(1, 2))
        if bias is not None:
            moved += bias[:, None]
        if self.residual:
            moved += own
        if together:
            return torch.cat([rows[:first], moved.to(rows.dtype), rows[last + 1 :]])
        out = rows.clone()
        out[where] = moved.to(rows.dtype)
        return out

    def _on(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Maps and biases on the device of the rows. A GPU multiplies 16 bits and sums in fp32; a CPU gets fp32."""
        dtype = rows.dtype if rows.is_cuda else torch.promote_types(rows.dtype, torch.float32)
        key = (rows.device, dtype)
        if key not in self._placed:
            bias = None if self.bias is None else self.bias.to(rows.device, dtype)
            self._placed[key] = tuple(one.to(rows.device, dtype) for one in self._factors()), bias
        return self._placed[key]


def from_maps(
    kind: str,
    maps: Mapping[int, Tensor],
    biases: Mapping[int, Tensor] | None = None,
    *,
    residual: bool = False,
    sha256: str = "",
    about: Mapping[str, object] | None = None,
) -> Transport:
    """A transport from the map [D, D] (and bias [D]) of each layer.

    Examples
    --------
    >>> from_maps("jacobian", {2: torch.eye(4), 1: torch.eye(4)}).layers
    (1, 2)
    """
    layers: Sequence[int] = sorted(maps)
    bias = torch.stack([biases[layer].float() for layer in layers]) if biases else None
    weight = torch.stack([maps[layer].float() for layer in layers])
    return Transport(kind, tuple(layers), weight, bias, residual, sha256, about or {})
