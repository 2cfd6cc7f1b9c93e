"""The definition of the lens in plain torch and fp64. It holds all logits at once.

The other backends are tested against it, so it shares no arithmetic with them: the final norm, the logits, the soft-cap
and the rule on ties are written here again. From the rest of the package it uses only the tensors and numbers of the
head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xprobe_kernels.request import LensRequest
from xprobe_kernels.unembedding import Unembedding

TILE_BYTES = 64 << 20  # `logits` converts the head's weight in tiles of this size


def logits(hidden: Tensor, head: Unembedding, dtype: torch.dtype = torch.float64) -> Tensor:
    """All logits [R, V] of ``hidden`` [R, D], computed in ``dtype``. The head is converted tile by tile."""
    normed = _final_norm(hidden.to(dtype), head)
    tiles = head.weight.split(max(1, TILE_BYTES // (head.width * dtype.itemsize)))
    projected = torch.cat([normed @ tile.to(dtype).T for tile in tiles], -1)
    return _soft_cap(_bias_and_scale(projected, head), head)


def readout(request: LensRequest) -> dict[str, Any]:
    """The fields of ``Readout`` by their definitions (docs/method.md)."""
    hidden, head, lookup, final_rows = request.hidden, request.head, request.lookup, request.final_rows
    out = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    finite = torch.isfinite(hidden).all(-1)
    normed = _final_norm(torch.where(finite[:, None], hidden, 0.0).double(), head)
    raw = _bias_and_scale(normed @ head.weight.double().T, head)  # before the soft-cap
    z = _soft_cap(raw, head)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    plogp = torch.where(p > 0, p * log_p, 0.0)

    known = (lookup >= 0) & finite[:, None]
    rank = torch.ones_like(lookup)
    for a, tokens in enumerate(lookup.clamp(min=0).unbind(1)):
        rank[:, a] += _count_above(raw, tokens, normed, head)

    top_ids = top_logits = kl = None
    if request.top_k:
        values, ids = raw.sort(dim=-1, descending=True, stable=True)
        top_logits = _blank(_soft_cap(values[:, : request.top_k], head).to(out), finite[:, None])
        top_ids = torch.where(finite[:, None], ids[:, : request.top_k], -1)
    if final_rows is not None:
        p_final, log_p_final = p[final_rows], log_p[final_rows]
        terms = torch.where(p_final > 0, p_final * (log_p_final - log_p), 0.0)
        kl = _blank(terms.sum(-1).clamp(min=0).to(out), finite & finite[final_rows])
    return {
        "logits": _blank(z.gather(1, lookup.clamp(min=0)).to(out), known),
        "logsumexp": _blank(z.logsumexp(-1).to(out), finite),
        "rank": torch.where(known, rank, 0),
        "entropy": _blank(-plogp.sum(-1).to(out), finite),
        "top_ids": top_ids,
        "top_logits": top_logits,
        "kl": kl,
    }


def _final_norm(hidden: Tensor, head: Unembedding) -> Tensor:
    """norm(h) * gamma + beta, in the dtype of ``hidden``."""
    if head.norm == "layer":
        hidden = hidden - hidden.mean(-1, keepdim=True)
    if head.norm in ("layer", "rms"):
        hidden = hidden * (hidden.square().mean(-1, keepdim=True) + head.eps).rsqrt()
    if head.gamma is not None:
        hidden = hidden * head.gamma.to(hidden.dtype)
    return hidden if head.beta is None else hidden + head.beta.to(hidden.dtype)


def _bias_and_scale(projected: Tensor, head: Unembedding) -> Tensor:
    """scale * (projected + bias) [R, V]; overwrites ``projected``."""
    if head.bias is not None:
        projected += head.bias.to(projected.dtype)
    return projected.mul_(head.scale)


def _soft_cap(raw: Tensor, head: Unembedding) -> Tensor:
    """c * tanh(raw / c)."""
    return raw if head.softcap is None else (raw / head.softcap).tanh_().mul_(head.softcap)


def _count_above(raw: Tensor, tokens: Tensor, normed: Tensor, head: Unembedding) -> Tensor:
    """How many tokens rank above ``tokens`` [R], given all logits before the soft-cap, ``raw`` [R, V].

    Above means: larger by more than rounding explains. A dot product is trusted to 4 eps |h| |w|, the sum with the bias
    to 2 eps |z|. An infinite logit has no rounding error.
    """
    eps = torch.finfo(raw.dtype).eps
    own = raw.gather(1, tokens[:, None])
    lengths = normed.norm(dim=-1) * head.weight[tokens].to(raw.dtype).norm(dim=-1)
    rounding = eps * (4 * abs(head.scale) * lengths[:, None] + 2 * own.abs())
    return (raw > own + torch.where(own.isinf(), 0.0, rounding)).sum(-1)


def _blank(values: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, values, torch.nan)
