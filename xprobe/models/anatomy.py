"""Finds a decoder's blocks, final norm and head by watching it run, whatever its family calls them.

No family is known by name. The blocks are the one list of ``num_hidden_layers`` modules that a forward pass runs; the
final norm is the module that takes the last block's output on its way to the head; what that norm computes, and what
the model does to the logits after the head, is told from numbers. What cannot be told is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from xprobe_kernels import Unembedding
from xprobe_kernels.reference import logits as reference_logits

from xprobe.errors import ModelError

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


@dataclass
class _Call:
    name: str
    module: nn.Module
    given: Tensor
    result: Tensor


def inspect(model: Any) -> Anatomy:
    """Reads the anatomy of a causal decoder from one forward pass of a few tokens.

    Raises
    ------
    ModelError
        Blocks, norm or head are not found or are of an unknown kind, or the model looks at later tokens.
    """
    config = model.config.get_text_config(decoder=True)
    head_module = model.get_output_embeddings()
    if head_module is None or getattr(head_module, "weight", None) is None:
        raise ModelError(
            f"{type(model).__name__} has no output embedding: xprobe reads models that predict the next token"
        )
    ids = probe_ids(model)
    block_name, blocks = _find_blocks(model, ids)
    calls, states, logits = _watch(model, blocks, ids)
    _check_causal(model, blocks, ids, states[-1])
    chain = _chain(calls, states[-1], head_module)
    head, norm_name = _head_before_scale(model, chain, head_module, states[-1])
    head = _with_scale(head, config, states[-1], logits)
    names = {"blocks": block_name, "norm": norm_name, "head": _name_of(model, head_module), "norm_kind": head.norm}
    return Anatomy(tuple(blocks), head, names)


@contextmanager
def watch_states(blocks: tuple[nn.Module, ...] | nn.ModuleList, receive: Any) -> Iterator[None]:
    """Calls ``receive(layer, hidden)`` for layers 0..L during forward passes inside the context; undone on exit."""

    def entering(module: nn.Module, args: tuple, kwargs: dict) -> None:
        receive(0, first_tensor(args) if args else kwargs["hidden_states"])

    def leaving(layer: int) -> Any:
        return lambda module, args, output: receive(layer, first_tensor(output))

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(entering, with_kwargs=True).remove)
        for layer, block in enumerate(blocks, 1):
            stack.callback(block.register_forward_hook(leaving(layer)).remove)
        yield


def first_tensor(value: Any) -> Tensor:
    """The hidden state of a block's output: the tensor itself, or the first one of a tuple or output object."""
    while not isinstance(value, Tensor):
        value = value[0]
    return value


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
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    if (place := getattr(hook, "execution_device", None)) is None:
        raise ModelError(f"{type(model).__name__} holds no numbers: its embedding is on the meta device")
    return torch.device(place)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters, whole: those kept elsewhere or in parts are brought to where the module runs.

    Raises
    ------
    ModelError
        They cannot be brought there.
    """
    own = {name: _whole(value.detach()) for name, value in module.named_parameters(recurse=False)}
    if not any(value.is_meta for value in own.values()):
        return own
    from accelerate.utils import align_module_device

    with align_module_device(module):  # afterwards they are away again: hence the copies
        own = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}
    if any(value.is_meta for value in own.values()):
        raise ModelError(
            f"cannot read the weights of {type(module).__name__}, which are on no device: give the final norm and the "
            "head a device of their own in device_map"
        )
    return own


def changed_ids(ids: Tensor) -> Tensor:
    """The probe with another second half: a causal model's states of the first half stay what they are."""
    half = PROBE_LENGTH // 2
    return torch.cat([ids[:, :half], ids[:, :half]], 1)


def _whole(value: Tensor) -> Tensor:
    """Gathers a weight of which every process holds a part."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def block_lists(model: Any) -> dict[str, nn.ModuleList]:
    """Lists of as many modules as the model has layers, by name; none lies inside another."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return {name: m for name, m in lists if not any(name.startswith(other + ".") for other, _ in lists)}


def the_one_that_ran(model: Any, ran: set[str]) -> str:
    """The only name in ``ran``, or a ModelError that tells which lists of blocks ran."""
    if len(ran) != 1:
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        found = ", ".join(sorted(ran)) or "none"
        raise ModelError(f"cannot tell the {count} blocks of {type(model).__name__}: lists that ran: {found}")
    return next(iter(ran))


def _find_blocks(model: Any, ids: Tensor) -> tuple[str, nn.ModuleList]:
    lists = block_lists(model)
    ran: set[str] = set()
    with ExitStack() as stack, torch.inference_mode():
        for name, modules in lists.items():
            hook = modules[-1].register_forward_hook(lambda *_, name=name: ran.add(name))
            stack.callback(hook.remove)
        model(input_ids=ids, use_cache=False)
    name = the_one_that_ran(model, ran)
    return name, lists[name]


def _watch(model: Any, blocks: nn.ModuleList, ids: Tensor) -> tuple[list[_Call], list[Tensor], Tensor]:
    """One forward pass: calls of modules outside the blocks in order of completion, states 0..L, logits [T, V]."""
    inside = {id(m) for block in blocks for m in block.modules()}
    calls: list[_Call] = []
    states: list[Tensor] = []

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given = next(
                (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None
            )
            if given is not None and isinstance(output, Tensor):
                calls.append(_Call(name, module, given.detach().clone(), output.detach().clone()))

        return record

    with ExitStack() as stack, torch.inference_mode():
        for name, module in model.named_modules():
            if id(module) not in inside and not any(id(child) in inside for child in module.modules()):
                stack.callback(module.register_forward_hook(recorder(name), with_kwargs=True).remove)
        stack.enter_context(watch_states(blocks, lambda layer, hidden: states.append(hidden.detach().clone())))
        logits = model(input_ids=ids, use_cache=False).logits
    if states[-1].ndim != 3 or len(states) != len(blocks) + 1:
        raise ModelError(f"{type(model).__name__}: the blocks do not hand on one hidden state [batch, tokens, width]")
    for layer, state in enumerate(states):
        check_finite(model, state, f"at layer {layer}")
    check_finite(model, logits.clamp(-1, 1), "in its logits")  # tokens that can never be produced have -inf
    return calls, states, logits[0]


def check_finite(model: Any, values: Tensor, where: str) -> None:
    """Raises a ModelError that says ``where`` if ``values`` hold NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            f"{type(model).__name__} gives NaN or infinity {where}: its weights are damaged, or {model.dtype} is too "
            "narrow for it (try --dtype float32)"
        )


def _check_causal(model: Any, blocks: nn.ModuleList, ids: Tensor, last: Tensor) -> None:
    """Refuses models whose earlier states change with later tokens."""
    _, states, _ = _watch(model, blocks, changed_ids(ids))
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


def _chain(calls: list[_Call], state: Tensor, head: nn.Module) -> list[_Call]:
    """Modules that the last state passes through on its way to the head, the head left out."""
    chain: list[_Call] = []
    current = state.reshape(-1, state.shape[-1])
    for call in calls:
        given, result = (t.reshape(-1, t.shape[-1]) for t in (call.given, call.result))
        if call.module is head:
            break
        if given.shape != current.shape or result.shape[0] != given.shape[0]:
            continue
        if not torch.equal(given, current.to(given.device)):
            continue
        if result.shape == given.shape and torch.equal(result.to(given.device), given):
            continue  # dropout, identity
        chain.append(call)
        current = result
    return chain


def _head_before_scale(model: Any, chain: list[_Call], head_module: Any, state: Tensor) -> tuple[Unembedding, str]:
    """Head spec with scale 1 and no soft-cap, from the modules between the last block and the logits."""
    own = weights_of(head_module)
    weight, bias = own.get("weight", head_module.weight.detach()), own.get("bias", getattr(head_module, "bias", None))
    norm: dict[str, Any] = {"norm": "none"}
    norm_name = "none"
    for position, call in enumerate(chain):
        if isinstance(call.module, nn.Linear):
            # OPT-350m projects to a narrower width before the head: fold both matrices into one
            inner = {name: value.to(weight.device) for name, value in weights_of(call.module).items()}
            if "bias" in inner:
                bias = weight @ inner["bias"] + (0 if bias is None else bias)
            weight = weight @ inner["weight"]
        elif position == 0:
            norm, norm_name = _read_norm(call, model.config), call.name
        else:
            raise ModelError(
                f"{type(model).__name__}: unknown module {call.name!r} between the final norm and the head"
            )
    if weight.shape[1] != state.shape[-1]:
        raise ModelError(
            f"{type(model).__name__}: the head has width {weight.shape[1]} and the blocks {state.shape[-1]}"
        )
    device = weight.device
    norm = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in norm.items()}
    return Unembedding(weight, bias=bias, **norm), norm_name


def _read_norm(call: _Call, config: Any) -> dict[str, Any]:
    """Which norm a module computes: the candidate that reproduces it on inputs of several sizes."""
    module = call.module
    own = weights_of(module)
    weight, beta = own.get("weight"), own.get("bias")
    gammas = [None] if weight is None else [weight, 1 + weight.float()]
    epsilons = {v for k, v in vars(module).items() if "eps" in k and isinstance(v, float)}
    epsilons |= {
        v for k, v in config.get_text_config(decoder=True).to_dict().items() if "eps" in k and isinstance(v, float)
    }
    generator = torch.Generator().manual_seed(0)
    shape = (16, call.given.shape[-1])
    rows = torch.randn(shape, generator=generator) * torch.logspace(-4, 2, 16)[:, None] + 0.1
    rows = rows.to(call.result.device, call.given.dtype)
    with torch.inference_mode():
        wanted = module(rows).double()
    best: tuple[float, dict[str, Any]] = (float("inf"), {})
    for kind, gamma, eps in product(("rms", "layer"), gammas, sorted(epsilons | {1e-5, 1e-6})):
        spec: dict[str, Any] = {"norm": kind, "gamma": gamma, "beta": beta, "eps": eps}
        blank = Unembedding(torch.zeros(1, shape[1], device=rows.device), **spec)
        error = float((blank.normalize(rows.double()) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        if error < best[0]:
            best = (error, spec)
    if not best[0] < 16 * max(torch.finfo(rows.dtype).eps, torch.finfo(torch.float32).eps):  # most compute in fp32
        raise ModelError(
            f"{type(module).__name__} ({call.name}) is neither RMSNorm nor LayerNorm: off by {best[0]:.1e}"
        )
    return best[1]


def _with_scale(head: Unembedding, config: Any, state: Tensor, logits: Tensor) -> Unembedding:
    """Adds the logit scale and soft-cap that take the plain projection to the model's own logits."""
    raw = reference_logits(state[0].to(head.weight.device), head)
    wanted = logits.double()[:, : raw.shape[1]].to(raw.device)
    values = {
        k: float(v) for k, v in config.to_dict().items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    caps = [None, *(v for k, v in values.items() if "softcap" in k and v > 0)]
    resolution = torch.finfo(logits.dtype).eps
    best: tuple[float, float, float | None] = (float("inf"), 1.0, None)
    for cap in caps:
        bounded = wanted if cap is None else cap * torch.atanh((wanted / cap).clamp(-1 + resolution, 1 - resolution))
        usable = torch.isfinite(raw) & torch.isfinite(bounded)
        ratio = float((raw * bounded)[usable].sum() / raw.square()[usable].sum().clamp(min=1e-300))
        scale = _snap(ratio, values, max(1e-4, 8 * resolution))
        guess = raw * scale if cap is None else cap * torch.tanh(raw * scale / cap)
        error = float((guess - wanted)[usable].abs().max() / wanted[usable].abs().max().clamp(min=1e-300))
        if error < best[0]:
            best = (error, scale, cap)
    error, scale, cap = best
    if not error < max(1e-4, 16 * resolution):
        raise ModelError(
            f"the model does to its logits what scale and soft-cap cannot express (off by {error:.1e} of the largest)"
        )
    return Unembedding(
        head.weight, norm=head.norm, gamma=head.gamma, beta=head.beta, eps=head.eps, bias=head.bias,
        scale=scale, softcap=cap,
    )  # fmt: skip


def _snap(ratio: float, values: dict[str, float], tolerance: float) -> float:
    """The exact number behind a measured ratio: 1, an entry of the configuration, or one over it; else the ratio."""
    named = [v for k, v in values.items() if v > 0 and any(w in k for w in ("scal", "multiplier", "logit"))]
    for exact in [1.0, *named, *(1 / v for v in named)]:
        if abs(ratio - exact) <= tolerance * abs(exact):
            return exact
    return ratio


def _name_of(model: Any, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "?")
