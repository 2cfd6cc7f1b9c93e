"""Parity check: the lens at the last layer must give the model's own log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from xprobe_kernels import Unembedding, lens, reference

from xprobe.errors import ParityError, UsageError
from xprobe.models.anatomy import Anatomy, input_device, watch_states, why_not_finite
from xprobe.models.block_io import extract_logits, model_code_errors
from xprobe.models.head import MASKED_LOGIT
from xprobe.models.passes import pad
from xprobe.models.token_limits import TokenLimits

FLOOR = 1e-3  # nats; the tolerance in fp32
ROUNDINGS = 4  # the tolerance as a multiple of the rounding error on the same rows
MOST_TOKENS = 512  # most of a prompt in the check: the head works on single rows, so long prompts show nothing more
COARSE = 0.5  # nats; a larger rounding error leads to a warning


@dataclass(frozen=True)
class TeacherForced:
    """A prompt with its gold answer, for teacher forcing.

    Parameters
    ----------
    ids : tuple of int
        The prompt and the answer without its last token: the input of the model.
    targets : tuple of int, length n
        The tokens of the gold answer. The model predicts target t at position ``len(ids) - n + t``.

    Examples
    --------
    The prompt 5 6 7 with the answer 8 9:

    >>> item = TeacherForced(ids=(5, 6, 7, 8), targets=(8, 9))
    >>> [item.ids[len(item.ids) - len(item.targets) + t] for t in range(2)]
    [7, 8]
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]


def check_prompts(prompts: Sequence[TeacherForced], limits: TokenLimits) -> None:
    """Refuses prompts that the parity check cannot be made on.

    Raises
    ------
    UsageError
        There is no prompt; or a prompt has ids or targets that the model does not have, or more targets than ids. The
        message names the prompt, the value and what is allowed.

    Examples
    --------
    >>> check_prompts([TeacherForced(ids=(5,), targets=(6, 7))], TokenLimits(vocab_size=160))
    Traceback (most recent call last):
    ...
    xprobe.errors.UsageError: prompt 0: it has 2 targets, but only 1 of its ids can predict one
    """
    if not prompts:
        raise UsageError("the parity check has no prompts, give at least one")
    for index, prompt in enumerate(prompts):
        limits.check(prompt.ids, f"prompt {index}")
        limits.check(prompt.targets, f"prompt {index}", "targets")
        if len(prompt.targets) > len(prompt.ids):
            raise UsageError(
                f"prompt {index}: it has {len(prompt.targets)} targets, but only {len(prompt.ids)} of its ids can "
                "predict one"
            )


def shorten(prompt: TeacherForced) -> TeacherForced:
    """The prompt of the parity check: of a long one, its first and its last tokens, together ``MOST_TOKENS``.

    The positions where the answer is predicted stay, so a longer answer leaves more tokens.

    Examples
    --------
    >>> long = TeacherForced(ids=tuple(range(3000)), targets=(7, 8))
    >>> len(shorten(long).ids), shorten(long).ids[255:258]
    (512, (255, 2744, 2745))
    """
    if len(prompt.ids) <= MOST_TOKENS:
        return prompt
    half = MOST_TOKENS // 2
    last = max(half, len(prompt.targets))
    return TeacherForced((*prompt.ids[:half], *prompt.ids[max(half, len(prompt.ids) - last) :]), prompt.targets)


def rounding_warning(error: float) -> str | None:
    """A warning if the parity error (in nats) is more than ``COARSE``, else None.

    Examples
    --------
    >>> rounding_warning(0.01) is None
    True
    >>> rounding_warning(0.8)
    "rounding changes log-probabilities by up to 0.8 nats: dtype='float32' (--dtype float32) is finer"
    """
    if error <= COARSE:
        return None
    return f"rounding changes log-probabilities by up to {error:.2g} nats: dtype='float32' (--dtype float32) is finer"


def check_parity(model: Any, anatomy: Anatomy, prompts: Sequence[TeacherForced], backend: str = "auto") -> float:
    """Compares the lens at the last layer with the model's own log-probabilities.

    The function runs each prompt alone through the full model, long ones shortened (``shorten``). It compares all
    answer positions: the whole vocabulary with ``xprobe_kernels.reference``, and the gold tokens with ``backend``.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model in evaluation mode.
    anatomy : Anatomy
        From ``inspect(model)``.
    prompts : sequence of TeacherForced
    backend : str
        Lens backend for the gold tokens.

    Returns
    -------
    float
        The largest difference in nats.

    Raises
    ------
    UsageError
        A prompt cannot be run (``check_prompts``).
    ParityError
        The difference is larger than the tolerance. The tolerance is 1e-3 nats, or 4 times the rounding error of norm
        and projection in the model's dtype on the same rows, whichever is larger.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> from xprobe.models.anatomy import inspect
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    >>> error = check_parity(model, inspect(model), [TeacherForced(ids=(5, 6, 7, 8), targets=(8, 9))])
    >>> error < 1e-3
    True
    """
    check_prompts(prompts, TokenLimits.from_model(model, anatomy))
    hidden, model_logits = [], []
    for prompt in map(shorten, prompts):
        rows, logits = _answer_rows(model, anatomy, prompt)
        hidden.append(rows)
        model_logits.append(logits)
    targets = torch.tensor([token for prompt in prompts for token in prompt.targets])
    return compare_with_model(model, torch.cat(hidden), torch.cat(model_logits), anatomy.head, targets, backend)


def _answer_rows(model: Any, anatomy: Anatomy, prompt: TeacherForced) -> tuple[Tensor, Tensor]:
    """Rows of the last layer [n, D] and the model's logits [n, V] at the answer positions, the last n of a prompt."""
    last: list[Tensor] = []

    def receive(layer: int, hidden: Tensor) -> None:
        if layer == anatomy.n_layers - 1:
            last.append(hidden)

    count = len(prompt.targets)
    # most models can skip the logits of other positions, which would need more memory than everything else
    few = {"logits_to_keep": count} if "logits_to_keep" in signature(model.forward).parameters else {}
    ids = pad([prompt.ids], input_device(model))
    with torch.inference_mode(), watch_states(anatomy.blocks, receive), model_code_errors(model):
        logits = extract_logits(model, model(input_ids=ids, use_cache=False, **few))
    return last[0][0, -count:].clone(), logits[0, -count:].clone()


def compare_with_model(
    model: Any, hidden: Tensor, logits: Tensor, head: Unembedding, targets: Tensor, backend: str = "auto"
) -> float:
    """Compares the lens on rows of the last layer with the model's own log-probabilities.

    Parameters
    ----------
    hidden : Tensor [R, D]
        Rows of the last layer, before the final norm.
    logits : Tensor [R, V]
        The logits of ``model`` for these rows.
    head : Unembedding
        The lens head. The comparison runs on its device.
    targets : Tensor [R], int64
        Gold tokens.

    Returns
    -------
    float
        The largest difference in nats.

    Raises
    ------
    ParityError
        The difference is larger than the tolerance (see ``check_parity``), or the model gives NaN.
    """
    hidden, logits, targets = (values.to(head.weight.device) for values in (hidden, logits, targets))
    if logits.shape[-1] != head.vocab_size:
        raise ParityError(
            f"{type(model).__name__} gives {logits.shape[-1]} logits for each token and its head {head.vocab_size}, so "
            "they cannot be compared"
        )
    wanted = logits.double().log_softmax(-1)
    defined = reference.logits(hidden, head).log_softmax(-1)
    gold = lens(hidden, head, targets, backend=backend).log_probability[:, 0]
    if any(bool(values.isnan().any()) for values in (wanted, defined, gold)):
        raise ParityError(f"{type(model).__name__} gives NaN at answer positions: {why_not_finite(model.dtype)}")
    never = (wanted < MASKED_LOGIT) & (defined < MASKED_LOGIT)  # for these tokens the exact logit does not matter
    finite = torch.isfinite(wanted) & ~never
    error = float((defined - wanted)[finite].abs().max())
    error = max(error, float((gold - wanted.gather(1, targets[:, None])[:, 0]).abs().max()))
    coarsest = min((logits.dtype, head.weight.dtype, model.dtype), key=lambda dtype: dtype.itemsize)
    allowed = max(FLOOR, ROUNDINGS * _rounding(hidden, head, coarsest, defined))
    if not error <= allowed:
        raise ParityError(
            f"the lens at the last layer is off the model's own log-probabilities by {error:.2g} nats "
            f"(allowed: {allowed:.2g}): {type(model).__name__} does something between its last block and its logits "
            "that xprobe does not know, so the values of all layers would be wrong"
        )
    return error


def _rounding(hidden: Tensor, head: Unembedding, dtype: torch.dtype, exact: Tensor) -> float:
    """Rounding error of norm and projection in ``dtype``: largest difference in nats from ``exact`` [R, V]."""
    normed = head.normalize(hidden.to(torch.promote_types(dtype, torch.float32))).to(dtype)
    projected = head.cap(head.bias_and_scale(normed @ head.weight.to(dtype).T))
    rounded = projected.double().log_softmax(-1)
    return float((rounded - exact)[torch.isfinite(exact)].abs().max())
