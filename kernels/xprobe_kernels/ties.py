"""When two logits count as equal. The backends share this rule; ``reference.py`` states its own.

A matrix product may return logits of equal tokens that are a few roundings apart. So a token ranks above another one
only if its logit is larger by more than the rounding error of the two dot products.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The error of a dot product of h and w stays below this many eps * |h| * |w|. Exception: thousands of equal addends,
# which all round in the same direction. Equal tokens may then get different ranks.
TIE_ROUNDINGS = 4.0


def tie_threshold(normed: Tensor, weight: Tensor, logit: Tensor, scale: float) -> Tensor:
    """The value [R] that the logit of another token must exceed to rank above ``logit`` [R].

    Parameters
    ----------
    normed : Tensor [R, D]
        Rows after the final norm.
    weight : Tensor [R, D]
        For each row, the unembedding row of the looked-up token.
    logit : Tensor [R]
        Logit of that token with bias and scale, before the soft-cap.
    scale : float
        The head's logit scale.
    """
    eps = torch.finfo(normed.dtype).eps
    slack = TIE_ROUNDINGS * eps * abs(scale) * normed.norm(dim=-1) * weight.norm(dim=-1) + 2 * eps * logit.abs()
    return torch.where(torch.isfinite(logit), logit + slack, logit)
