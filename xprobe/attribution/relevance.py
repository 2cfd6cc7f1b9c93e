"""Relevance of every token at every layer for an answer: one backward pass through the blocks.

R[l, t] = sum over D of h[l, t] * d y / d h[l, t], with y the sum of the logits of the answer's tokens (or of their
log-probabilities). The backward pass goes block by block: only the states between blocks are kept, and a block is run
again, with gradients, when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from xprobe_kernels import Unembedding
from xprobe_kernels.transfer import upload

from xprobe.attribution.parts import Norm
from xprobe.attribution.rules import rule_applied, same_value
from xprobe.errors import UsageError
from xprobe.models.anatomy import Anatomy, input_device
from xprobe.models.block_io import hidden_argument, hidden_input, hidden_output, model_code_errors, with_hidden_input
from xprobe.models.passes import pad

ATTRIBUTED = ("logit", "log_probability")


@dataclass(frozen=True, eq=False)
class Relevance:
    """Relevance of the tokens of one text.

    Attributes
    ----------
    values : Tensor [L + 1, T], float32 (float64 for such a model)
        Layer 0 is the input of the first block.
    attributed : float
        y: what the relevance is of.
    """

    values: Tensor
    attributed: float

    @property
    def conserved(self) -> Tensor:
        """Sum over the tokens as a share of y, by layer [L + 1]; 1 where nothing is lost."""
        return self.values.sum(1) / self.attributed


def relevance(
    model: Any,
    anatomy: Anatomy,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    rule: str = "cp",
    attributed: str = "logit",
) -> list[Relevance]:
    """Relevance of every token for the answer that follows it.

    Parameters
    ----------
    model : PreTrainedModel
        A causal decoder in evaluation mode. It is left as it was.
    anatomy : Anatomy
    texts : sequence of (token ids of the prompt, token ids of the answer)
        They share one batch, padded on the right. The last answer token is not run.
    rule : str
        One of ``xprobe.attribution.rules.RULES``.
    attributed : str
        ``logit`` or ``log_probability``, summed over the answer's tokens.

    Returns
    -------
    list of Relevance
        T is the number of tokens of the prompt, and of the answer but for its last.

    Raises
    ------
    UsageError
        A prompt or an answer is empty, or the rule is unknown.
    ModelError
        The rule does not know a part of the model.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> from xprobe.models.anatomy import inspect
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    >>> (found,) = relevance(model, inspect(model), [((5, 6, 7), (8, 9))])
    >>> found.values.shape, [round(float(share), 3) for share in found.conserved]
    (torch.Size([3, 4]), [1.0, 1.0, 1.0])
    """
    if attributed not in ATTRIBUTED:
        raise UsageError(f"unknown quantity {attributed!r}; known: {', '.join(ATTRIBUTED)}")
    if empty := [index for index, text in enumerate(texts) if not all(map(len, text))]:
        raise UsageError(f"text {empty[0]} has an empty prompt or answer: each needs at least one token")
    with rule_applied(model, anatomy, rule), frozen(model), model_code_errors(model):
        return _backward(model, anatomy, texts, rule, attributed)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter of the model gets a gradient inside the context."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _backward(
    model: Any, anatomy: Anatomy, texts: Sequence[tuple[Sequence[int], Sequence[int]]], rule: str, attributed: str
) -> list[Relevance]:
    ids = [(*prompt, *answer[:-1]) for prompt, answer in texts]
    calls = _forward(model, anatomy, pad(ids, input_device(model)))
    top = calls[-1].output.detach().requires_grad_()
    answers = _attributed(top, texts, anatomy.head, rule, attributed)
    (gradient,) = torch.autograd.grad(answers.sum(), top)
    rows = [_product(top.detach(), gradient)]
    for block, call in zip(reversed(anatomy.blocks), reversed(calls), strict=True):
        with torch.enable_grad():
            hidden = call.hidden.detach().requires_grad_()
            args, kwargs = with_hidden_input(call.args, call.kwargs, hidden)
            output = hidden_output(block(*args, **kwargs))
        (gradient,) = torch.autograd.grad(output, hidden, gradient.to(output))
        rows.append(_product(hidden.detach(), gradient))
    wide = torch.stack([row.to(rows[0].device) for row in reversed(rows)], 1)  # [B, L + 1, T]
    return [
        Relevance(values[:, : len(own)], float(answer))
        for values, own, answer in zip(wide, ids, answers.tolist(), strict=True)
    ]


def _product(hidden: Tensor, gradient: Tensor) -> Tensor:
    """Sum over D of hidden times gradient [B, T], in fp32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(wide) * gradient.to(wide)).sum(-1)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a block: its arguments, its hidden input, and its hidden output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor
    output: Tensor


def _forward(model: Any, anatomy: Anatomy, ids: Tensor) -> list[_Call]:
    """The calls of all blocks in a forward pass without gradients."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        hidden = hidden_input(args, kwargs)
        place = hidden_argument(args, kwargs)
        if isinstance(place, int):
            args = (*args[:place], hidden, *args[place + 1 :])
        calls.append(_Call(args, kwargs, hidden, hidden_output(output)))

    with ExitStack() as stack, torch.no_grad():
        for block in anatomy.blocks:
            stack.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        model.base_model(input_ids=ids, use_cache=False)
    return calls


def _attributed(
    top: Tensor, texts: Sequence[tuple[Sequence[int], Sequence[int]]], head: Unembedding, rule: str, attributed: str
) -> Tensor:
    """y of each text [B], from the states [B, T, D] of the last layer."""
    device = head.weight.device
    found = []
    for row, (prompt, answer) in enumerate(texts):
        states = top[row, len(prompt) - 1 : len(prompt) + len(answer) - 1].to(device)
        normed = states if head.norm == "none" else _normed(states, head, rule)
        targets = upload(torch.tensor(list(answer)), device)
        if attributed == "logit":
            found.append(_logits(normed, head, rule, targets).sum())
        else:
            found.append(_logits(normed, head, rule, None).log_softmax(-1).gather(1, targets[:, None]).sum())
    return torch.stack(found)


def _normed(states: Tensor, head: Unembedding, rule: str) -> Tensor:
    """The final norm of rows, with the denominator as a constant unless the rule is ``gradient``."""
    value = head.normalize(states)
    return (
        value
        if rule == "gradient"
        else same_value(value, Norm(head.norm, head.gamma, head.eps).linear(states).to(value))
    )


def _logits(normed: Tensor, head: Unembedding, rule: str, targets: Tensor | None) -> Tensor:
    """Logits of one token per row [n], or of all [n, V]. A soft-cap is a multiple, unless the rule is ``gradient``."""
    weight = head.weight if targets is None else head.weight[targets]
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, normed = weight.to(wide), normed.to(wide)
    raw = normed @ weight.T if targets is None else (normed * weight).sum(-1)
    if head.bias is not None:
        raw = raw + (head.bias if targets is None else head.bias[targets]).to(wide)
    raw = raw * head.scale
    if head.softcap is None:
        return raw
    capped = head.softcap * torch.tanh(raw / head.softcap)
    return capped if rule == "gradient" else same_value(capped, raw * (capped / raw).detach())
