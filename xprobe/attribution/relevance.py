"""Relevance of every token at every layer for an answer: one backward pass through the blocks.

R[l, t] = sum over D of h[l, t] * d y / d h[l, t], with y the sum of the logits of the answer's tokens (or of their
log-probabilities). The backward pass goes block by block, so its memory is bounded: the states between blocks are kept,
and the graphs of as many blocks as fit into ``KEPT_BYTES``. The other blocks are run again when their turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from xprobe_kernels import Unembedding
from xprobe_kernels.transfer import upload

from xprobe.attribution.parts import Norm, Parts
from xprobe.attribution.rules import known_parts, replace_forward, rule_applied, same_value
from xprobe.attribution.settings import RelevanceSettings
from xprobe.capture.memory import is_out_of_memory, release_memory
from xprobe.capture.plan import part_tokens, split
from xprobe.capture.requests import Each, Request
from xprobe.capture.runner import Warnings
from xprobe.errors import UsageError
from xprobe.models import tensor_parallel
from xprobe.models.anatomy import Anatomy, input_device
from xprobe.models.block_io import (
    hidden_input,
    hidden_output,
    model_code_errors,
    with_hidden_input,
    with_hidden_output,
)
from xprobe.models.passes import frozen, pad

# most bytes of the graphs of blocks, by device; blocks beyond run again in the backward pass
KEPT_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
# by device, a batch has at most this part of the tokens of a pass, because its graphs are kept
SHARE = {"cpu": 8, "cuda": 2}


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
    parts: Parts | None = None,
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
        One of ``xprobe.attribution.settings.RULES``.
    attributed : str
        ``logit`` or ``log_probability``, summed over the answer's tokens.
    parts : Parts, optional
        Those that ``xprobe.attribution.rules.known_parts`` found; looked for here if None.

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
    RelevanceSettings(rule, attributed)  # refuses unknown ones
    if empty := [index for index, text in enumerate(texts) if not all(map(len, text))]:
        raise UsageError(f"text {empty[0]} has an empty prompt or answer: each needs at least one token")
    with rule_applied(model, anatomy, rule, parts), frozen(model), model_code_errors(model):
        return _backward(model, anatomy, texts, rule, attributed)


class GradientRunner:
    """Computes the relevance of many texts, in batches.

    Parameters
    ----------
    model : PreTrainedModel
    anatomy : Anatomy
    rule, attributed : str
        As for ``relevance``.
    batch_tokens : int
        Most tokens of one forward pass of the study. A batch with gradients has a part of them (``SHARE``), or one
        text.
    notify : callable (message), optional
        Called with each warning.

    Raises
    ------
    UsageError
        The rule is unknown, or several processes share the model.
    ModelError
        The rule does not know a part of the model.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        rule: str = "cp",
        attributed: str = "logit",
        batch_tokens: int = 4096,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        if tensor_parallel.size() > 1:
            raise UsageError("relevance needs the whole model in one process: leave tensor_parallel")
        settings = RelevanceSettings(rule, attributed)
        self.model, self.anatomy, self.rule, self.attributed = model, anatomy, settings.rule, settings.attributed
        self.batch_tokens = max(1, batch_tokens // SHARE.get(input_device(model).type, SHARE["cpu"]))
        self.warn = Warnings(notify)
        self._parts = None if rule == "gradient" else known_parts(model, anatomy)

    def run(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Relevance]:
        """The relevance of every text, in their order. If memory runs out, it goes on with smaller batches.

        Raises
        ------
        UsageError, ModelError
            As ``relevance``.
        RuntimeError, MemoryError
            Memory runs out even for one text, or the model fails.
        """
        requests = [Request((*prompt, *answer[:-1]), {"last": Each((0,))}) for prompt, answer in texts]
        found: dict[int, Relevance] = {}
        waiting = split(requests, range(len(requests)), self.batch_tokens, "plain")
        while waiting:
            part = waiting[0]
            try:
                results = relevance(
                    self.model, self.anatomy, [texts[i] for i in part], self.rule, self.attributed, self._parts
                )
                found.update(zip(part, results, strict=True))
                waiting.pop(0)
                continue
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
            release_memory()  # after the handler: the error's traceback holds the tensors of the batch
            self.batch_tokens = max(1, part_tokens(requests, part, "plain") // 2)
            self.warn(f"memory ran out: going on with at most {self.batch_tokens} tokens in a batch")
            left = [i for some in waiting for i in some]
            waiting = split(requests, left, self.batch_tokens, "plain")
        return [found[i] for i in range(len(texts))]


def _backward(
    model: Any, anatomy: Anatomy, texts: Sequence[tuple[Sequence[int], Sequence[int]]], rule: str, attributed: str
) -> list[Relevance]:
    ids = [(*prompt, *answer[:-1]) for prompt, answer in texts]
    calls = _forward(model, anatomy, pad(ids, input_device(model)))
    top = calls[-1].result.detach().requires_grad_()
    with torch.enable_grad():
        answers = _attributed(top, texts, anatomy.head, rule, attributed)
    (gradient,) = torch.autograd.grad(answers.sum(), top)
    rows = [_product(top.detach(), gradient)]
    while calls:
        call = calls.pop()
        gradient = call.gradient(gradient)
        rows.append(_product(call.hidden.detach(), gradient))
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
    """One call of a block: how to repeat it, its hidden input (a leaf), and its hidden output."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor
    result: Tensor

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of the input, given that of the output. Runs the block again if its graph was not kept."""
        result = self.result
        if not result.requires_grad:
            with torch.enable_grad():
                args, kwargs = with_hidden_input(self.args, self.kwargs, self.hidden)
                result = hidden_output(self.run(*args, **kwargs))
        return torch.autograd.grad(result, self.hidden, gradient.to(result))[0]


def _forward(model: Any, anatomy: Anatomy, ids: Tensor) -> list[_Call]:
    """The calls of all blocks in a forward pass. Graphs of blocks are kept while they fit into ``KEPT_BYTES``."""
    calls: list[_Call] = []
    kept, most = 0, KEPT_BYTES.get(ids.device.type, KEPT_BYTES["cpu"])

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        if not isinstance(tensor, nn.Parameter):
            kept += tensor.numel() * tensor.itemsize
        return tensor.detach()  # a node that kept its own output would keep itself, for ever where nothing runs it

    def recorded(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = hidden_input(args, kwargs).detach().requires_grad_()
            args, kwargs = with_hidden_input(args, kwargs, hidden)
            with torch.set_grad_enabled(kept < most), saved_tensors_hooks(count, lambda tensor: tensor):
                output = run(*args, **kwargs)
            result = hidden_output(output)
            calls.append(_Call(run, args, kwargs, hidden, result))
            return with_hidden_output(output, result.detach())

        return forward

    with ExitStack() as stack, torch.no_grad():
        for block in anatomy.blocks:
            replace_forward(block, recorded(block.forward), stack)
        model.base_model(input_ids=ids, use_cache=False)
    return calls


def _attributed(
    top: Tensor, texts: Sequence[tuple[Sequence[int], Sequence[int]]], head: Unembedding, rule: str, attributed: str
) -> Tensor:
    """y of each text [B], from the states [B, T, D] of the last layer."""
    device = head.weight.device
    rows = [row for row, (_, answer) in enumerate(texts) for _ in answer]
    places = [len(prompt) - 1 + step for prompt, answer in texts for step in range(len(answer))]
    states = top[upload(torch.tensor(rows), top.device), upload(torch.tensor(places), top.device)].to(device)
    normed = states if head.norm == "none" else _normed(states, head, rule)  # of all answer tokens [n, D]
    targets = upload(torch.tensor([token for _, answer in texts for token in answer]), device)
    lengths = [len(answer) for _, answer in texts]
    if attributed == "logit":
        values = _logits(normed, head, rule, targets)
    else:  # text by text: the logits of all tokens are large
        every = zip(normed.split(lengths), targets.split(lengths), strict=True)
        values = torch.cat(
            [_logits(own, head, rule, None).log_softmax(-1).gather(1, ids[:, None])[:, 0] for own, ids in every]
        )
    numbers = iter(range(len(values)))
    table = [[next(numbers) for _ in range(own)] + [len(values)] * (max(lengths) - own) for own in lengths]
    return torch.cat([values, values.new_zeros(1)])[upload(torch.tensor(table), device)].sum(1)


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
