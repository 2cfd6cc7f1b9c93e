"""Rules that say how relevance passes through the parts of a block, as changes of one model that are undone.

Relevance is gradient times input. What makes a rule is the gradient: parts that are not linear are replaced, in the
backward pass only, by linear ones. The forward pass computes the same numbers as before.

``gradient``  nothing is replaced
``cp``        attention weights, norm denominators and gates are constants, so relevance is conserved
``attnlrp``   AttnLRP: half of the relevance of a product goes to each factor; the softmax keeps its gradient

Sources: Ali et al. 2022, "XAI for Transformers: Better Explanations through Conservative Propagation" (arXiv
2202.07304) for ``cp``; Achtibat et al. 2024, "AttnLRP" (arXiv 2402.05602) for ``attnlrp``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from xprobe.attribution.parts import Parts, find_parts
from xprobe.attribution.settings import check_rule
from xprobe.errors import ModelError, UsageError
from xprobe.models.anatomy import Anatomy, sample_ids
from xprobe.models.block_io import hidden_input, hidden_output, with_hidden_input

_BUSY = "_xprobe_rule"  # attribute of a model whose parts are replaced
MOST_LOST = 1e-3  # share of what a known block adds that rounding may lose, in fp32


@contextmanager
def rule_applied(model: Any, anatomy: Anatomy, rule: str, parts: Parts | None = None) -> Iterator[None]:
    """Replaces the backward pass of parts of ``model`` inside the context. The forward pass gives the same numbers.

    Everything is undone on exit, also after an exception. Other models are not touched.

    Parameters
    ----------
    model : PreTrainedModel
    anatomy : Anatomy
        Where its blocks are (``xprobe.models.anatomy.inspect``).
    rule : str
        One of ``xprobe.attribution.settings.RULES``.
    parts : Parts, optional
        Those that ``known_parts`` found; looked for here if None.

    Raises
    ------
    UsageError
        The rule is unknown, or the model is inside another such context, in this thread or another.
    ModelError
        A part of the model is of a kind that the rule does not know: names it.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> from xprobe.models.anatomy import inspect
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> with torch.no_grad(), rule_applied(model, inspect(model), "cp"):
    ...     changed = model(ids).logits
    >>> torch.equal(changed, model(ids).logits)
    True
    """
    check_rule(rule)
    with _claimed(model):
        if rule == "gradient":
            yield
            return
        parts = _known_parts(model, anatomy) if parts is None else parts
        with _replaced(model, parts, rule):
            yield


def known_parts(model: Any, anatomy: Anatomy) -> Parts:
    """The parts of a model that rules replace, after a check that these are all: for many calls of ``rule_applied``.

    Raises
    ------
    UsageError
        The model is being attributed.
    ModelError
        A part of the model is of a kind that the rules do not know.
    """
    with _claimed(model):
        return _known_parts(model, anatomy)


@contextmanager
def _claimed(model: Any) -> Iterator[None]:
    token = object()
    if vars(model).setdefault(_BUSY, token) is not token:  # one step, also between threads
        raise UsageError("this model is being attributed already: wait for that to end, or use another copy of it")
    try:
        yield
    finally:
        vars(model).pop(_BUSY, None)


@contextmanager
def _replaced(model: Any, parts: Parts, rule: str) -> Iterator[None]:
    with ExitStack() as stack:
        _replace_norms(parts, stack)
        _replace_activations(parts, rule, stack)
        _hold_routers(parts, stack)
        _replace_attention(model, rule, stack)
        yield


def _known_parts(model: Any, anatomy: Anatomy) -> Parts:
    parts = find_parts(model, anatomy)
    with _replaced(model, parts, "cp"):
        _check_blocks(model, anatomy)
    return parts


def _check_blocks(model: Any, anatomy: Anatomy) -> None:
    """Checks that every block conserves under ``cp`` once its biases are 0. What does not is not linear, and unknown.

    This finds products and attention that blocks compute outside of their modules.

    Raises
    ------
    ModelError
        Names the block and what it loses.
    """
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    with ExitStack() as stack, torch.no_grad():
        for block in anatomy.blocks:
            hook = block.register_forward_pre_hook(
                lambda module, args, kwargs: calls.append((module, args, kwargs)), with_kwargs=True
            )
            stack.callback(hook.remove)
        model.base_model(input_ids=sample_ids(model), use_cache=False)
    for number, (block, args, kwargs) in enumerate(calls):
        wide = torch.promote_types(hidden_input(args, kwargs).dtype, torch.float32)  # 16 bits would hide small losses
        args, kwargs = _cast(args, wide), _cast(kwargs, wide)
        weights = {
            name: torch.zeros_like(own, dtype=wide) if "bias" in name else _cast(own.detach(), wide)
            for name, own in block.named_parameters()
        }
        hidden = hidden_input(args, kwargs).detach().requires_grad_()
        args, kwargs = with_hidden_input(args, kwargs, hidden)
        with torch.enable_grad():
            output = hidden_output(functional_call(block, weights, args, kwargs))
        added = (output - hidden).detach()
        (gradient,) = torch.autograd.grad(output, hidden, added)
        pairs = ((gradient, hidden.detach()), (added, output.detach()))
        conserved, wanted = ((one * other).double().sum() for one, other in pairs)
        lost = float((conserved - wanted).abs() / added.double().square().sum().clamp(min=1e-300))
        if not lost < MOST_LOST:
            raise ModelError(
                f"{type(model).__name__}: block {number} ({type(block).__name__}) computes something outside of its "
                f"modules that the rules of attribution do not know (without its biases it loses {lost:.1e} of the "
                "relevance that it should pass on); the rule 'gradient' needs no such knowledge"
            )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A value, or all values of a tuple or dictionary, with floating-point tensors in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(one, dtype) for one in value)
    return {name: _cast(one, dtype) for name, one in value.items()} if isinstance(value, dict) else value


# -- the parts ------------------------------------------------------------------------------------------------------


def same_value(value: Tensor, linear: Tensor) -> Tensor:
    """The numbers of ``value`` with the gradient of ``linear``.

    Examples
    --------
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> y = same_value(x * x, 3 * x)
    >>> y.backward()
    >>> y.item(), x.grad.item()
    (9.0, 3.0)
    """
    return value.detach() + (linear - linear.detach())


def scaled_gradient(value: Tensor, factor: float) -> Tensor:
    """The same numbers with ``factor`` times the gradient."""
    return same_value(value, value * factor)


def proportional(value: Tensor, inputs: Tensor) -> Tensor:
    """``value`` as a multiple of ``inputs``, element by element, with the multiples as constants."""
    with torch.no_grad():
        ratio = torch.where(inputs == 0, 0, value / inputs)
    return same_value(value, inputs * ratio)


def _replace_norms(parts: Parts, stack: ExitStack) -> None:
    for module, spec in parts.norms:
        original = module.forward

        def forward(hidden: Tensor, *args: Any, original: Any = original, spec: Any = spec, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                value = original(hidden, *args, **kwargs)
            return same_value(value, spec.linear(hidden))

        replace_forward(module, forward, stack)


def _replace_activations(parts: Parts, rule: str, stack: ExitStack) -> None:
    for activation in parts.activations:
        original = activation.module.forward

        def forward(
            inputs: Tensor, *args: Any, original: Any = original, gate: bool = activation.gated, **kwargs: Any
        ) -> Tensor:
            with torch.no_grad():
                value = original(inputs, *args, **kwargs)
            return value if gate and rule == "cp" else proportional(value, inputs)

        replace_forward(activation.module, forward, stack)
        if activation.gated and rule == "attnlrp":  # the product of gate and value: half for each
            hook = activation.parent.register_forward_hook(lambda module, args, output: _halved(output))
            stack.callback(hook.remove)


def _halved(output: Any) -> Any:
    if isinstance(output, tuple):
        return (scaled_gradient(output[0], 0.5), *output[1:])
    return scaled_gradient(output, 0.5)


def _hold_routers(parts: Parts, stack: ExitStack) -> None:
    """The weights of experts are constants under every rule."""
    for module in parts.routers:
        stack.callback(module.register_forward_hook(lambda module, args, output: _detached(output)).remove)


def _detached(output: Any) -> Any:
    if isinstance(output, tuple | list):
        return type(output)(_detached(part) for part in output)
    return output.detach() if isinstance(output, Tensor) else output


def replace_forward(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    """Gives one module another forward. If it had one of its own before, that comes back."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward

    def restore() -> None:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before

    stack.callback(restore)


# -- attention ------------------------------------------------------------------------------------------------------


def _replace_attention(model: Any, rule: str, stack: ExitStack) -> None:
    """Puts a function in front of the model's own attention that changes the gradients of its inputs."""
    from transformers import AttentionInterface, AttentionMaskInterface

    configs = {id(c): c for c in (model.config, model.base_model.config, model.config.get_text_config(decoder=True))}
    masks = AttentionMaskInterface()
    for config in configs.values():
        own = config._attn_implementation
        name = f"xprobe_{rule}_{own}"
        AttentionInterface.register(name, _attention(rule, own))
        if own in masks:
            AttentionMaskInterface.register(name, masks[own])
        stack.callback(setattr, config, "_attn_implementation", own)
        config._attn_implementation = name


def _attention(rule: str, own: str) -> Callable[..., Any]:
    """The model's own attention ``own``, with other gradients."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if rule == "cp":
            query, key = query.detach(), key.detach()
        else:  # the product of weights and values: half for each; that of queries and keys: half of that half
            query, key, value = scaled_gradient(query, 0.25), scaled_gradient(key, 0.25), scaled_gradient(value, 0.5)
        return _function(module, own)(module, query, key, value, *args, **kwargs)

    return attend


def _function(module: nn.Module, own: str) -> Callable[..., Any]:
    from transformers import AttentionInterface

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found = AttentionInterface().get(own, eager) if own != "eager" else eager
    if found is None:
        raise ModelError(f"{type(module).__name__} does not use the attention interface of transformers")
    return found
