"""The mean Jacobian of a layer's states: how the target layer's states move with them (Gurnee et al. 2026).

For one text and one entry i of the target layer's state, a one-hot gradient is put at every position at once. The
gradient at position p of layer l is then the sum over later positions q of d h_target[q, i] / d h_l[p]. Its mean over
the positions p is row i of the text's Jacobian; the lens is the mean over texts. The first positions are left out,
because they are attention sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from xprobe_kernels.transfer import upload

from xprobe.capture.memory import is_out_of_memory
from xprobe.lenses.settings import FIRST
from xprobe.models.anatomy import Anatomy, input_device, watch_states
from xprobe.models.block_io import hidden_input, with_hidden_input


def jacobian_of_text(
    model: Any, anatomy: Anatomy, ids: Sequence[int], layers: Sequence[int], target: int, rows: int, first: int = FIRST
) -> Tensor:
    """Jacobians of one text, one for each of ``layers``.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode, its parameters frozen (``xprobe.models.passes.frozen``).
    ids : sequence of int
        More than ``first`` tokens.
    layers : sequence of int
        Below ``target``.
    target : int
        The layer whose states move.
    rows : int
        How many entries of the target's state share one backward pass.
    first : int
        Positions that are left out.

    Returns
    -------
    Tensor [len(layers), D, D], fp32
        Entry [i, j] says how entry i of the target's state moves with entry j of the layer's.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> from xprobe.models.anatomy import inspect
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=3, **sizes)).eval()
    >>> jacobian_of_text(model, inspect(model), range(20, 30), [1, 2], target=3, rows=16, first=2).shape
    torch.Size([2, 32, 32])
    """
    device, width = input_device(model), anatomy.head.width
    found = torch.zeros(len(layers), width, width)
    text = upload(torch.tensor([list(ids)]), device)
    once: list[Tensor] | None = _states(model, anatomy, text, [*layers, target])
    for start in range(0, width, rows):
        some = range(start, min(start + rows, width))
        gradients: Sequence[Tensor] | None = None
        if once is not None:
            gradients = _together(once, some, first)
            once = once if gradients is not None else None
        if gradients is None:  # the text is run once for each entry
            states = _states(model, anatomy, text.expand(len(some), -1), [*layers, target])
            end = states.pop()
            gradients = torch.autograd.grad(end, states, _one_hot(end, some, first))
        for place, moved in enumerate(gradients):
            found[place, some.start : some.stop] = moved[:, first:].float().mean(1).cpu()
    return found


def _one_hot(end: Tensor, some: range, first: int) -> Tensor:
    """Gradients [n, T, D] of the target's states: 1 at one entry, at every position from ``first`` on."""
    gradient = end.new_zeros(len(some), *end.shape[1:])
    for row, entry in enumerate(some):
        gradient[row, first:, entry] = 1
    return gradient


def _together(states: Sequence[Tensor], some: range, first: int) -> list[Tensor] | None:
    """Gradients [n, T, D] of several entries on one graph; None for a model whose backward pass cannot be batched."""
    *sources, end = states
    try:
        found = torch.autograd.grad(
            end, sources, _one_hot(end, some, first)[:, None], is_grads_batched=True, retain_graph=True
        )
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return None
    return [one[:, 0] for one in found]


def _states(model: Any, anatomy: Anatomy, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """The states [B, T, D] of some layers, with the graph between them."""
    held: dict[int, Tensor] = {}

    def receive(layer: int, hidden: Tensor) -> None:
        if layer in layers:
            held[layer] = hidden

    def begin(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return with_hidden_input(args, kwargs, hidden_input(args, kwargs).detach().requires_grad_())

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.callback(anatomy.blocks[0].register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.enter_context(watch_states(anatomy.blocks, receive))
        model.base_model(input_ids=ids, use_cache=False)
    return [held[layer] for layer in layers]
