"""The definition of the lens in plain torch, fp64. Holds all logits at once; other backends are tested against it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xprobe_kernels.unembedding import Unembedding

# A dot product of h and w is off by less than this many eps * |h| * |w|, unless its addends are so alike that all of
# them round one way (thousands of equal numbers): then equal tokens may still rank apart.
TIE_ROUNDINGS = 4.0
TILE_BYTES = 64 << 20  # of the head's weight, converted at a time by `logits`


def logits(hidden: Tensor, head: Unembedding, dtype: torch.dtype = torch.float64) -> Tensor:
    """All logits [R, V] of ``hidden`` [R, D], computed in ``dtype``; the head is converted tile by tile."""
    normed = head.normalize(hidden.to(dtype))
    tiles = head.weight.split(max(1, TILE_BYTES // (head.width * dtype.itemsize)))
    projected = torch.cat([normed @ tile.to(dtype).T for tile in tiles], -1)
    return head.cap(head.bias_and_scale(projected))


def tie_threshold(normed: Tensor, weight: Tensor, logit: Tensor, scale: float) -> Tensor:
    """What another token's logit must exceed to rank above a token's ``logit`` [R] (all before the soft-cap).

    Equal tokens may come out of a matrix product a few roundings apart. ``weight`` [R, D] holds the token's row.
    """
    eps = torch.finfo(normed.dtype).eps
    slack = TIE_ROUNDINGS * eps * abs(scale) * normed.norm(dim=-1) * weight.norm(dim=-1) + 2 * eps * logit.abs()
    return torch.where(torch.isfinite(logit), logit + slack, logit)


def readout(
    hidden: Tensor,
    head: Unembedding,
    lookup: Tensor,
    top_k: int,
    final_rows: Tensor | None,
    workspace_bytes: int,
    precision: str = "ieee",
) -> dict[str, Any]:
    """The fields of ``Readout``, by their definitions (docs/method.md); arguments as ``lens`` has checked them."""
    out = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    finite = torch.isfinite(hidden).all(-1)
    normed = head.normalize(torch.where(finite[:, None], hidden, torch.zeros_like(hidden)).double())
    before_cap = head.bias_and_scale(normed @ head.weight.double().T)
    z = head.cap(before_cap.clone())
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    plogp = torch.where(p > 0, p * log_p, torch.zeros_like(p))

    wanted = lookup >= 0
    known = wanted & finite[:, None]
    looked_up = z.gather(1, lookup.clamp(min=0))
    rank = torch.ones_like(lookup)
    for a, tokens in enumerate(lookup.clamp(min=0).unbind(1)):
        logit = before_cap.gather(1, tokens[:, None])[:, 0]
        threshold = tie_threshold(normed, head.weight[tokens].double(), logit, head.scale)
        rank[:, a] += (before_cap > threshold[:, None]).sum(-1)

    top_ids = top_logits = kl = None
    if top_k:
        top_logits, top_ids = before_cap.sort(dim=-1, descending=True, stable=True)
        top_logits = _blank(head.cap(top_logits[:, :top_k].clone()).to(out), finite[:, None])
        top_ids = torch.where(finite[:, None], top_ids[:, :top_k], -1)
    if final_rows is not None:
        p_final, log_p_final = p[final_rows], log_p[final_rows]
        terms = torch.where(p_final > 0, p_final * (log_p_final - log_p), torch.zeros_like(p))
        kl = _blank(terms.sum(-1).clamp(min=0).to(out), finite & finite[final_rows])
    return {
        "logits": _blank(looked_up.to(out), known),
        "logsumexp": _blank(z.logsumexp(-1).to(out), finite),
        "rank": torch.where(known, rank, 0),
        "entropy": _blank(-plogp.sum(-1).to(out), finite),
        "top_ids": top_ids,
        "top_logits": top_logits,
        "kl": kl,
    }


def _blank(values: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, values, torch.full_like(values, float("nan")))
