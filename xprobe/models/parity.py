"""Parity: the lens at the last layer must give the model's own logits, or nothing it says can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from xprobe_kernels import Unembedding, lens, reference

from xprobe.errors import ParityError
from xprobe.models.anatomy import Anatomy, input_device, watch_states, why_not_finite
from xprobe.models.block_io import logits_of, own_code
from xprobe.models.head import BANNED
from xprobe.models.passes import pad

FLOOR = 1e-3  # nats; what fp32 must reach
ROUNDINGS = 4  # times what rounding alone does to these very rows
COARSE = 0.5  # nats: rounding by more deserves a word


@dataclass(frozen=True)
class TeacherForced:
    """A prompt with its answer, as the model is fed it: ``targets`` are the tokens that follow the last ``ids``.

    Parameters
    ----------
    ids : tuple of int
        The prompt and the answer without its last token.
    targets : tuple of int, n of them
        The gold answer; target t follows ``ids[len(ids) - n + t]``.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]


def coarse(error: float) -> str | None:
    """A warning for a difference that is rounding alone, but a large one; None if it is small."""
    if error <= COARSE:
        return None
    return f"rounding changes log-probabilities by up to {error:.2g} nats: --dtype float32 is finer"


def check_parity(model: Any, anatomy: Anatomy, prompts: Sequence[TeacherForced], backend: str = "auto") -> float:
    """Largest difference, in nats, between the model's log-probabilities and the lens at the last layer.

    Compared over the whole vocabulary (by the definition in ``xprobe_kernels.reference``) and for the gold tokens (by
    ``backend``), at all answer positions of ``prompts``, each of which is run alone through the full model.

    Raises
    ------
    ParityError
        The difference exceeds 1e-3 nats, or 4 times the largest difference that norm and product in the model's dtype
        make on the same rows, if that is more.
    """
    hidden, own = [], []
    for prompt in prompts:
        rows, logits = _ends(model, anatomy, prompt)
        hidden.append(rows)
        own.append(logits)
    targets = torch.tensor([token for prompt in prompts for token in prompt.targets])
    return compare_with_own(model, torch.cat(hidden), torch.cat(own), anatomy.head, targets, backend)


def _ends(model: Any, anatomy: Anatomy, prompt: TeacherForced) -> tuple[Tensor, Tensor]:
    """Rows of the last layer [n, D] and the model's logits [n, V] at a prompt's answer positions, its last n."""
    last: list[Tensor] = []

    def receive(layer: int, hidden: Tensor) -> None:
        if layer == anatomy.n_layers - 1:
            last.append(hidden)

    count = len(prompt.targets)
    # most models can leave out the logits of other positions, which would take more memory than all the rest
    few = {"logits_to_keep": count} if "logits_to_keep" in signature(model.forward).parameters else {}
    ids = pad([prompt.ids], input_device(model))
    with torch.inference_mode(), watch_states(anatomy.blocks, receive), own_code(model):
        logits = logits_of(model, model(input_ids=ids, use_cache=False, **few))
    return last[0][0, -count:].clone(), logits[0, -count:].clone()


def compare_with_own(
    model: Any, hidden: Tensor, logits: Tensor, head: Unembedding, targets: Tensor, backend: str = "auto"
) -> float:
    """Largest difference, in nats, between the lens of rows of the last layer and the model's own log-probabilities.

    Parameters
    ----------
    hidden : Tensor [R, D]
        Rows of the last layer, before the final norm.
    logits : Tensor [R, V]
        What ``model`` itself makes of them.
    targets : Tensor [R], int64
        Gold tokens. On whatever devices these three are, they are compared on the head's.

    Raises
    ------
    ParityError
        As of ``check_parity``.
    """
    hidden, logits, targets = (values.to(head.weight.device) for values in (hidden, logits, targets))
    if logits.shape[-1] != head.vocab_size:
        raise ParityError(
            f"{type(model).__name__} gives {logits.shape[-1]} logits for each token, its head {head.vocab_size}: they "
            "cannot be compared"
        )
    wanted = logits.double().log_softmax(-1)
    defined = reference.logits(hidden, head).log_softmax(-1)
    gold = lens(hidden, head, targets, backend=backend).log_probability[:, 0]
    if any(bool(values.isnan().any()) for values in (wanted, defined, gold)):
        raise ParityError(f"{type(model).__name__} gives NaN at answer positions: {why_not_finite(model.dtype)}")
    never = (wanted < BANNED) & (defined < BANNED)  # tokens that cannot be produced, whatever the number
    finite = torch.isfinite(wanted) & ~never
    error = float((defined - wanted)[finite].abs().max())
    error = max(error, float((gold - wanted.gather(1, targets[:, None])[:, 0]).abs().max()))
    coarsest = min((logits.dtype, head.weight.dtype, model.dtype), key=lambda dtype: dtype.itemsize)
    allowed = max(FLOOR, ROUNDINGS * _rounding(hidden, head, coarsest, defined))
    if not error <= allowed:
        raise ParityError(
            f"the lens at the last layer is off the model's own log-probabilities by {error:.2g} nats "
            f"(allowed: {allowed:.2g}): {type(model).__name__} does something between its last block and its logits "
            "that was not understood, so no layer's values could be believed"
        )
    return error


def _rounding(hidden: Tensor, head: Unembedding, dtype: torch.dtype, exact: Tensor) -> float:
    """Largest difference in nats from ``exact`` [R, V] if norm and product are rounded to ``dtype``."""
    normed = head.normalize(hidden.to(torch.promote_types(dtype, torch.float32))).to(dtype)
    projected = head.cap(head.bias_and_scale(normed @ head.weight.to(dtype).T))
    rounded = projected.double().log_softmax(-1)
    return float((rounded - exact)[torch.isfinite(exact)].abs().max())
