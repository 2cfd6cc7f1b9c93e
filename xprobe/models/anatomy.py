"""Finds a decoder's blocks, final norm and head with a forward pass.

The code knows no model family by name. The blocks are the one list of ``num_hidden_layers`` modules that a forward pass
runs. The final norm is the module between the last block and the head. ``head.py`` measures what the norm computes and
what the model does to the logits after the head. A model that does not fit this scheme is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from xprobe_kernels import Unembedding

from xprobe.errors import ModelError
from xprobe.models.block_io import compute_logits, hidden_input, hidden_output
from xprobe.models.head import Call, read_head

SAMPLE_LENGTH = 8


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a decoder that the logit lens needs.

    Layer 0 is the input of the first block. Layer l is the output of block l.

    Attributes
    ----------
    blocks : tuple of Module
        The decoder blocks in order.
    head : Unembedding
        The final norm and the unembedding.
    names : dict of str to str
        Names of the modules for the manifest: ``blocks``, ``norm``, ``head``, and the kind of norm (``norm_kind``).

    Examples
    --------
    >>> from torch import nn, zeros
    >>> from xprobe_kernels import Unembedding
    >>> Anatomy((nn.Identity(), nn.Identity()), Unembedding(zeros(10, 4)), {}).n_layers
    3
    """

    blocks: tuple[nn.Module, ...]
    head: Unembedding
    names: dict[str, str]

    @property
    def n_layers(self) -> int:
        """Number of residual states: number of blocks + 1."""
        return len(self.blocks) + 1


def inspect(model: Any) -> Anatomy:
    """Finds the blocks, the final norm and the head of a causal decoder.

    The function runs the model a few times on a short random prompt.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model in evaluation mode.

    Returns
    -------
    Anatomy

    Raises
    ------
    ModelError
        The model has no such blocks, norm or head, their kind is unknown, or a token sees later tokens.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    >>> anatomy = inspect(model)
    >>> anatomy.n_layers
    3
    >>> anatomy.names
    {'blocks': 'model.layers', 'norm': 'model.norm', 'head': 'lm_head', 'norm_kind': 'rms'}
    """
    head_module = model.get_output_embeddings()
    if head_module is None or getattr(head_module, "weight", None) is None:
        raise ModelError(
            f"{type(model).__name__} has no output embedding: xprobe reads models that predict the next token"
        )
    ids = sample_ids(model)
    block_name, blocks = _find_blocks(model, ids)
    calls, states = _record_pass(model, blocks, ids)
    _check_causal(model, blocks, ids, states[-1])
    head, norm_name = read_head(model, blocks, calls, ids, states[-1])
    names = {"blocks": block_name, "norm": norm_name, "head": _name_of(model, head_module), "norm_kind": head.norm}
    return Anatomy(tuple(blocks), head, names)


@contextmanager
def watch_states(blocks: tuple[nn.Module, ...] | nn.ModuleList, receive: Any) -> Iterator[None]:
    """Calls ``receive(layer, hidden)`` for layers 0..L in each forward pass inside the context.

    The hooks are removed on exit.

    Parameters
    ----------
    blocks : tuple of Module, or ModuleList
        The blocks of the model (``Anatomy.blocks``).
    receive : callable (int, Tensor [B, T, D])
        Called with the layer and its residual states.

    Examples
    --------
    >>> import torch
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    >>> shapes = {}
    >>> with watch_states(model.model.layers, lambda layer, hidden: shapes.update({layer: tuple(hidden.shape)})):
    ...     _ = model(torch.tensor([[5, 6, 7]]))
    >>> shapes
    {0: (1, 3, 32), 1: (1, 3, 32), 2: (1, 3, 32)}
    """

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        receive(0, hidden_input(args, kwargs))

    def after(layer: int) -> Any:
        return lambda module, args, output: receive(layer, hidden_output(output))

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for layer, block in enumerate(blocks, 1):
            stack.callback(block.register_forward_hook(after(layer)).remove)
        yield


def sample_ids(model: Any) -> Tensor:
    """Token ids [1, SAMPLE_LENGTH] of a random prompt on the model's device, the same in every call."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(10, vocabulary - 1), vocabulary, (1, SAMPLE_LENGTH), generator=generator)
    return ids.to(input_device(model))


def input_device(model: Any) -> torch.device:
    """The device that token ids go to.

    This is the device of the model's first weights. If ``accelerate`` moves the weights for each forward pass, it is
    the device that ``accelerate`` moves them to.

    Raises
    ------
    ModelError
        The embedding is on the meta device and nothing loads it.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> input_device(AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, **sizes)))
    device(type='cpu')
    """
    device = torch.device(model.device)
    if device.type != "meta":
        return device
    embedding = model.get_input_embeddings()
    real = [value.device for value in (embedding.parameters() if embedding is not None else ()) if not value.is_meta]
    if real:  # the blocks of a streamed model are on the meta device, and the first weight is one of theirs
        return real[0]
    hook = getattr(embedding, "_hf_hook", None)
    if (execution_device := getattr(hook, "execution_device", None)) is None:
        raise ModelError(f"{type(model).__name__} has no weights: its embedding is on the meta device")
    return torch.device(execution_device)


def changed_sample_ids(ids: Tensor) -> Tensor:
    """The sample prompt with a different second half.

    The states of the first half must not change if the model is causal.
    """
    half = SAMPLE_LENGTH // 2
    return torch.cat([ids[:, :half], ids[:, :half]], 1)


def block_lists(model: Any) -> dict[str, nn.ModuleList]:
    """The module lists that may be the list of blocks, by name.

    A candidate has as many modules as the model has layers and is not part of another candidate. If no list has that
    length, every outermost list of at least two modules is a candidate. (The configuration of LongCat-Flash counts two
    layers for each block.)
    """
    counts = _layer_counts(model)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    candidates = [entry for entry in lists if len(entry[1]) in counts]
    candidates = candidates or [entry for entry in lists if len(entry[1]) > 1]
    return {name: m for name, m in candidates if not any(name.startswith(other + ".") for other, _ in candidates)}


def _layer_counts(model: Any) -> set[int]:
    """The number of layers in the configuration. Some decoders have a separate entry, so there may be two numbers."""
    text = model.config.get_text_config(decoder=True)
    numbers = {getattr(text, name, None) for name in ("num_hidden_layers", "decoder_layers")}
    return {number for number in numbers if isinstance(number, int)}


def single_block_list(model: Any, ran: set[str]) -> str:
    """The only name in ``ran``, the names of the candidate lists that ran.

    Raises
    ------
    ModelError
        ``ran`` does not have exactly one name. The message shows the names.
    """
    if len(ran) != 1:
        counts = " or ".join(map(str, sorted(_layer_counts(model)))) or "unknown number of"
        names = ", ".join(sorted(ran)) or "none"
        raise ModelError(
            f"cannot tell the {counts} blocks of {type(model).__name__}: lists whose modules ran once each, in order, "
            f"and handed a hidden state on: {names}"
        )
    return next(iter(ran))


def _find_blocks(model: Any, ids: Tensor) -> tuple[str, nn.ModuleList]:
    lists = block_lists(model)
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in lists}  # ((args, kwargs), output) of each module
    with ExitStack() as stack:
        for name, modules in lists.items():
            for module in modules:
                hook = module.register_forward_hook(
                    lambda _, args, kwargs, output, name=name: calls[name].append(((args, kwargs), output)),
                    with_kwargs=True,
                )
                stack.callback(hook.remove)
        compute_logits(model, ids)
    name = single_block_list(model, {name for name in lists if _is_chain(calls[name], len(lists[name]))})
    return name, lists[name]


def _is_chain(calls: list[tuple[Any, Any]], count: int) -> bool:
    """Whether ``count`` modules ran once each, and all hidden states that enter and leave them have one shape."""
    try:
        states = [(hidden_input(*arguments), hidden_output(output)) for arguments, output in calls]
    except ModelError:
        return False
    return len(states) == count and all(after.shape == states[0][0].shape for pair in states for after in pair)


def _record_pass(model: Any, blocks: nn.ModuleList, ids: Tensor) -> tuple[list[Call], list[Tensor]]:
    """Runs one forward pass.

    Returns
    -------
    calls : list of Call
        The calls of modules outside the blocks, in order of completion.
    states : list of Tensor
        The residual states of layers 0..L.
    """
    inside = {id(m) for block in blocks for m in block.modules()}
    calls: list[Call] = []
    states: list[Tensor] = []

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            first = next(
                (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None
            )
            if first is not None and isinstance(output, Tensor):
                calls.append(Call(name, module, first.detach().clone(), output.detach().clone()))

        return record

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if id(module) not in inside and not any(id(child) in inside for child in module.modules()):
                stack.callback(module.register_forward_hook(recorder(name), with_kwargs=True).remove)
        stack.enter_context(watch_states(blocks, lambda layer, hidden: states.append(hidden.detach().clone())))
        logits = compute_logits(model, ids)
    if states[-1].ndim != 3 or len(states) != len(blocks) + 1:
        raise ModelError(f"{type(model).__name__}: the blocks do not hand on one hidden state [batch, tokens, width]")
    for layer, state in enumerate(states):
        check_finite(model, state, f"at layer {layer}")
    check_finite(model, logits.clamp(-1, 1), "in its logits")  # some tokens have the logit -inf
    return calls, states


def check_finite(model: Any, values: Tensor, where: str) -> None:
    """Raises a ModelError that names the place ``where`` if ``values`` contain NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        raise ModelError(f"{type(model).__name__} gives NaN or infinity {where}: {why_not_finite(model.dtype)}")


def why_not_finite(dtype: torch.dtype) -> str:
    """The likely cause of NaN or infinity in a model of this dtype, and the remedy."""
    if dtype.itemsize >= 4:
        return "its weights are damaged, or contain NaN or infinity: fetch the checkpoint again"
    name = str(dtype).removeprefix("torch.")
    return f"its weights are damaged, or {name} is too narrow for it: try dtype='float32' (--dtype float32)"


def _check_causal(model: Any, blocks: nn.ModuleList, ids: Tensor, last: Tensor) -> None:
    """Raises a ModelError if the states of earlier tokens depend on later tokens."""
    _, states = _record_pass(model, blocks, changed_sample_ids(ids))
    check_causal(model, last, states[-1])


def check_causal(model: Any, state: Tensor, changed: Tensor) -> None:
    """Raises a ModelError if a model looks at later tokens.

    Parameters
    ----------
    state, changed : Tensor [1, SAMPLE_LENGTH, D]
        The states of ``sample_ids`` and of ``changed_sample_ids``. Their first halves must be equal.
    """
    half = SAMPLE_LENGTH // 2
    before, after = state[0, :half].float(), changed[0, :half].float()
    tolerance = 1e-5 if state.dtype.itemsize >= 4 else 1e-2
    if float((before - after).abs().max()) > tolerance * float(before.abs().max()):
        raise ModelError(
            f"{type(model).__name__} looks at later tokens (an encoder?): xprobe reads decoder-only models"
        )


def _name_of(model: Any, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "?")
