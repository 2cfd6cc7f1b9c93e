"""Least squares from streamed sums: the map from the states of a layer to those of the target layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Fit:
    """A least-squares map y = W x + b of one layer.

    Attributes
    ----------
    weight : Tensor [D, D]
    bias : Tensor [D]
    """

    weight: Tensor
    bias: Tensor


class Sums:
    """Sums of x, y, x x', x y' and y² over rows, of one pair of layers. Two of them can be added.

    They are kept in fp64, so the order of the rows hardly matters.

    Examples
    --------
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> sums = Sums(3)
    >>> sums.add(x, 2 * x + 1)
    >>> fit = sums.solve(ridge=0.0)
    >>> fit.weight.diag().round(decimals=4).tolist(), fit.bias.round(decimals=4).tolist()
    ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.count = 0
        self.x, self.y, self.yy = zeros(width), zeros(width), zeros(width)
        self.xx, self.xy = zeros(width, width), zeros(width, width)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds rows x [n, D] and y [n, D]."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.yy += y.square().sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)

    def __add__(self, other: Sums) -> Sums:
        total = Sums(len(self.x), self.x.device)
        total.count = self.count + other.count
        for name in ("x", "y", "yy", "xx", "xy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def solve(self, ridge: float) -> Fit:
        """The map with the least squared error, with ``ridge`` times the variance of each entry added to it.

        So the penalty is the same for an entry of the state that is a hundred times larger than the others.
        """
        n = max(self.count, 1)
        mean_x, mean_y = self.x / n, self.y / n
        covariance = self.xx / n - torch.outer(mean_x, mean_x)
        both = self.xy / n - torch.outer(mean_x, mean_y)
        scale = covariance.diagonal().clamp(min=0).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        scaled = covariance / torch.outer(scale, scale)
        scaled.diagonal().add_(max(ridge, 1e-12))
        solved = torch.linalg.solve(scaled, both / scale[:, None]) / scale[:, None]  # [x, y]
        return Fit(solved.T.contiguous(), mean_y - mean_x @ solved)

    def explained(self, fit: Fit) -> float:
        """Share of the variance of y that a map explains on these rows, R² over all entries together."""
        n = max(self.count, 1)
        weight, bias = fit.weight.T, fit.bias  # [x, y]
        mean_x, mean_y = self.x / n, self.y / n
        residual = (
            self.yy / n
            - 2 * (weight * (self.xy / n)).sum(0)
            - 2 * bias * mean_y
            + (weight * ((self.xx / n) @ weight)).sum(0)
            + 2 * bias * (mean_x @ weight)
            + bias.square()
        )
        total = self.yy / n - mean_y.square()
        return float(1 - residual.sum() / total.sum())


def agreement(one: Tensor, other: Tensor) -> float:
    """Cosine of two maps, as vectors: 1 where both halves of the text give the same one.

    Examples
    --------
    >>> agreement(torch.eye(2), 3 * torch.eye(2))
    1.0
    """
    a, b = one.flatten().double(), other.flatten().double()
    return round(float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-300)), 12)
