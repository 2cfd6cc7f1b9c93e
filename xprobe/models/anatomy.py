"""Finds a decoder's blocks, final norm and head by watching it run, whatever its family calls them.

No family is known by name. The blocks are the one list of ``num_hidden_layers`` modules that a forward pass runs; the
final norm is the module that takes the last block's output on its way to the head; what that norm computes, and what
the model does to the logits after the head, is told from numbers (``head.py``). What cannot be told is refused.
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
from xprobe.models.block_io import entering, leaving, short_run
from xprobe.models.head import Call, read_head

PROBE_LENGTH = 8


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Blocks in order, and the head spec. Layer 0 is the input of the first block, layer l the output of block l."""

    blocks: tuple[nn.Module, ...]
    head: Unembedding
    names: dict[str, str]  # what was found where, for the manifest: blocks, norm, head

    @property
    def n_layers(self) -> int:
        """Number of residual states: blocks + 1."""
        return len(self.blocks) + 1


def inspect(model: Any) -> Anatomy:
    """Reads the anatomy of a causal decoder from one forward pass of a few tokens.

    Raises
    ------
    ModelError
        Blocks, norm or head are not found or are of an unknown kind, or the model looks at later tokens.
    """
    head_module = model.get_output_embeddings()
    if head_module is None or getattr(head_module, "weight", None) is None:
        raise ModelError(
            f"{type(model).__name__} has no output embedding: xprobe reads models that predict the next token"
        )
    ids = probe_ids(model)
    block_name, blocks = _find_blocks(model, ids)
    calls, states = _watch(model, blocks, ids)
    _check_causal(model, blocks, ids, states[-1])
    head, norm_name = read_head(model, blocks, calls, ids, states[-1])
    names = {"blocks": block_name, "norm": norm_name, "head": _name_of(model, head_module), "norm_kind": head.norm}
    return Anatomy(tuple(blocks), head, names)


@contextmanager
def watch_states(blocks: tuple[nn.Module, ...] | nn.ModuleList, receive: Any) -> Iterator[None]:
    """Calls ``receive(layer, hidden)`` for layers 0..L during forward passes inside the context; undone on exit."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        receive(0, entering(args, kwargs))

    def after(layer: int) -> Any:
        return lambda module, args, output: receive(layer, leaving(output))

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for layer, block in enumerate(blocks, 1):
            stack.callback(block.register_forward_hook(after(layer)).remove)
        yield


def probe_ids(model: Any) -> Tensor:
    """A short made-up prompt [1, PROBE_LENGTH] on the model's device."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(10, vocabulary - 1), vocabulary, (1, PROBE_LENGTH), generator=generator)
    return ids.to(input_device(model))


def input_device(model: Any) -> torch.device:
    """Where token ids go: the device of the model's first weights, or the one they are brought to when they run."""
    device = torch.device(model.device)
    if device.type != "meta":
        return device
    embedding = model.get_input_embeddings()
    real = [value.device for value in (embedding.parameters() if embedding is not None else ()) if not value.is_meta]
    if real:  # a streamed model whose blocks, on the meta device, come first
        return real[0]
    hook = getattr(embedding, "_hf_hook", None)
    if (place := getattr(hook, "execution_device", None)) is None:
        raise ModelError(f"{type(model).__name__} holds no numbers: its embedding is on the meta device")
    return torch.device(place)


def changed_ids(ids: Tensor) -> Tensor:
    """The probe with another second half: a causal model's states of the first half stay what they are."""
    half = PROBE_LENGTH // 2
    return torch.cat([ids[:, :half], ids[:, :half]], 1)


def block_lists(model: Any) -> dict[str, nn.ModuleList]:
    """Lists of as many modules as the model has layers, by name; none lies inside another.

    Where no list has that length (LongCat-Flash counts two layers for each block), every outermost list of at least
    two modules.
    """
    counts = _layer_counts(model)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    some = [entry for entry in lists if len(entry[1]) in counts] or [entry for entry in lists if len(entry[1]) > 1]
    return {name: m for name, m in some if not any(name.startswith(other + ".") for other, _ in some)}


def _layer_counts(model: Any) -> set[int]:
    """How many layers the model has, by its configuration: those of a decoder may have an entry of their own."""
    text = model.config.get_text_config(decoder=True)
    numbers = {getattr(text, name, None) for name in ("num_hidden_layers", "decoder_layers")}
    return {number for number in numbers if isinstance(number, int)}


def the_one_that_ran(model: Any, ran: set[str]) -> str:
    """The only name in ``ran``, or a ModelError that tells which lists of blocks ran."""
    if len(ran) != 1:
        counts = " or ".join(map(str, sorted(_layer_counts(model)))) or "unknown number of"
        found = ", ".join(sorted(ran)) or "none"
        raise ModelError(
            f"cannot tell the {counts} blocks of {type(model).__name__}: lists whose modules ran once each, in order, "
            f"and handed a hidden state on: {found}"
        )
    return next(iter(ran))


def _find_blocks(model: Any, ids: Tensor) -> tuple[str, nn.ModuleList]:
    lists = block_lists(model)
    handed: dict[str, list[tuple[Any, Any]]] = {name: [] for name in lists}  # what each module was given and gave
    with ExitStack() as stack:
        for name, modules in lists.items():
            for module in modules:
                hook = module.register_forward_hook(
                    lambda _, args, kwargs, output, name=name: handed[name].append(((args, kwargs), output)),
                    with_kwargs=True,
                )
                stack.callback(hook.remove)
        short_run(model, ids)
    name = the_one_that_ran(model, {name for name, calls in handed.items() if _is_chain(calls, len(lists[name]))})
    return name, lists[name]


def _is_chain(calls: list[tuple[Any, Any]], count: int) -> bool:
    """Whether ``count`` modules ran once each and each took up the hidden state, or one made of it, where the one
    before had left it."""
    try:
        states = [(entering(*given), leaving(output)) for given, output in calls]
    except ModelError:
        return False
    return len(states) == count and all(after.shape == states[0][0].shape for pair in states for after in pair)


def _watch(model: Any, blocks: nn.ModuleList, ids: Tensor) -> tuple[list[Call], list[Tensor]]:
    """One forward pass: calls of modules outside the blocks in order of completion, and states 0..L."""
    inside = {id(m) for block in blocks for m in block.modules()}
    calls: list[Call] = []
    states: list[Tensor] = []

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given = next(
                (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None
            )
            if given is not None and isinstance(output, Tensor):
                calls.append(Call(name, module, given.detach().clone(), output.detach().clone()))

        return record

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if id(module) not in inside and not any(id(child) in inside for child in module.modules()):
                stack.callback(module.register_forward_hook(recorder(name), with_kwargs=True).remove)
        stack.enter_context(watch_states(blocks, lambda layer, hidden: states.append(hidden.detach().clone())))
        logits = short_run(model, ids)
    if states[-1].ndim != 3 or len(states) != len(blocks) + 1:
        raise ModelError(f"{type(model).__name__}: the blocks do not hand on one hidden state [batch, tokens, width]")
    for layer, state in enumerate(states):
        check_finite(model, state, f"at layer {layer}")
    check_finite(model, logits.clamp(-1, 1), "in its logits")  # tokens that can never be produced have -inf
    return calls, states


def check_finite(model: Any, values: Tensor, where: str) -> None:
    """Raises a ModelError that says ``where`` if ``values`` hold NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        raise ModelError(f"{type(model).__name__} gives NaN or infinity {where}: {why_not_finite(model.dtype)}")


def why_not_finite(dtype: torch.dtype) -> str:
    """What may be the matter with a model that gives NaN or infinity, and what to do."""
    if dtype.itemsize >= 4:
        return "its weights are damaged, or hold NaN or infinity: fetch the checkpoint again"
    return f"its weights are damaged, or {str(dtype).removeprefix('torch.')} is too narrow for it: try --dtype float32"


def _check_causal(model: Any, blocks: nn.ModuleList, ids: Tensor, last: Tensor) -> None:
    """Refuses models whose earlier states change with later tokens."""
    _, states = _watch(model, blocks, changed_ids(ids))
    check_causal(model, last, states[-1])


def check_causal(model: Any, state: Tensor, changed: Tensor) -> None:
    """Raises a ModelError if states [1, PROBE_LENGTH, D] of ``probe_ids`` and ``changed_ids`` differ early on."""
    half = PROBE_LENGTH // 2
    before, after = state[0, :half].float(), changed[0, :half].float()
    tolerance = 1e-5 if state.dtype.itemsize >= 4 else 1e-2
    if float((before - after).abs().max()) > tolerance * float(before.abs().max()):
        raise ModelError(
            f"{type(model).__name__} looks at later tokens (an encoder?): xprobe reads decoder-only models"
        )


def _name_of(model: Any, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "?")
