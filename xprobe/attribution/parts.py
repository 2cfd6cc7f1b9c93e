"""Finds the parts of a decoder's blocks that are not linear: norms, activations, gates, routers.

A short forward pass says which modules a block runs. A norm is recognised by what it computes, a gate by the shapes of
the matrices around it. A part of an unknown kind is named and refused, because its relevance would be wrong.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xprobe.errors import ModelError
from xprobe.models.anatomy import Anatomy, sample_ids
from xprobe.models.block_io import compute_logits
from xprobe.models.norms import read_norm

INERT = ("Dropout", "Identity", "Rotary", "Linear", "Conv1D")  # in the name of a class: linear, or not in the way
SINKS = ("sinks",)  # parameters that only count among attention weights


@dataclass(frozen=True, eq=False)
class Norm:
    """What a norm computes, with the denominator as a constant.

    Examples
    --------
    >>> norm = Norm("rms", gamma=None, eps=0.0)
    >>> hidden = torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> norm.linear(hidden).sum().backward()
    >>> hidden.grad
    tensor([[0.2828, 0.2828]])
    """

    kind: str  # "rms" or "layer"
    gamma: Tensor | None
    eps: float

    def linear(self, hidden: Tensor) -> Tensor:
        """The norm of ``hidden`` [..., D] without its bias."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        with torch.no_grad():
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        out = wide * scale
        return (out if self.gamma is None else out * self.gamma.to(out)).to(hidden.dtype)


@dataclass(frozen=True, eq=False)
class Activation:
    """An activation, the module around it, and whether its output gates another product."""

    module: nn.Module
    parent: nn.Module
    gated: bool


@dataclass
class Parts:
    """The parts of all blocks that a rule replaces."""

    norms: list[tuple[nn.Module, Norm]] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    routers: list[nn.Module] = field(default_factory=list)


def find_parts(model: Any, anatomy: Anatomy) -> Parts:
    """The parts of all blocks of a model.

    Raises
    ------
    ModelError
        A block runs a module of an unknown kind, or an activation between matrices of unknown shapes.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> from xprobe.models.anatomy import inspect
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    >>> parts = find_parts(model, inspect(model))
    >>> len(parts.norms), [activation.gated for activation in parts.activations]
    (4, [True, True])
    """
    inside = {id(module): module for block in anatomy.blocks for module in block.modules()}
    names = {id(module): name for name, module in model.named_modules()}
    parents = {id(child): module for module in inside.values() for child in module.children()}
    parts = Parts()
    for module, inputs in _called(model, list(inside.values())):
        name, kind = names.get(id(module), "?"), type(module).__name__
        leaf = not any(True for _ in module.children())
        own = [key for key, _ in module.named_parameters(recurse=False) if key not in SINKS]
        if "Norm" in kind and leaf:
            spec = read_norm(module, name, inputs, model.config)
            parts.norms.append((module, Norm(spec["norm"], spec["gamma"], spec["eps"])))
        elif "Router" in kind:
            parts.routers.append(module)
        elif leaf and _is_activation(module):
            parent = parents[id(module)]
            parts.activations.append(Activation(module, parent, _is_gate(parent, names.get(id(parent), "?"))))
        elif any(word in kind for word in INERT) or (not leaf and (not own or _has_experts(module))):
            continue
        else:
            raise ModelError(
                f"{type(model).__name__}: {name} is a {kind}, and the rules of attribution do not know how relevance "
                "passes it; the rule 'gradient' needs no such knowledge"
            )
    return parts


def _called(model: Any, modules: list[nn.Module]) -> list[tuple[nn.Module, Tensor]]:
    """The modules that a forward pass runs, each once, with the first tensor that each was given."""
    found: dict[int, tuple[nn.Module, Tensor]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        found.setdefault(id(module), (module, tensors[0] if tensors else torch.empty(0)))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        compute_logits(model, sample_ids(model))
    return list(found.values())


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    return home in ("torch.nn.modules.activation", "transformers.activations") and not any(
        True for _ in module.parameters()
    )


def _has_experts(module: nn.Module) -> bool:
    return _expert_sizes(module) is not None


def _expert_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Numbers of the two stacked matrices of experts: into the activation, and out of it."""
    into, out = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if isinstance(into, nn.Parameter) and isinstance(out, nn.Parameter) and into.ndim == out.ndim == 3:
        return into.numel(), out.numel()
    return None


def _is_gate(parent: nn.Module, name: str) -> bool:
    """Whether an activation gates another product: by the sizes of the matrices before and after it."""
    if (experts := _expert_sizes(parent)) is not None:
        ratios = {experts[0] / experts[1]}
    else:
        sizes = [size for child in parent.children() if (size := _width(child)) is not None]
        ratios = set()
        for place, (inner, outer) in enumerate(sizes):  # the matrix after the activation
            others = [*sizes[:place], *sizes[place + 1 :]]
            if others and all(width == outer for width, _ in others):
                ratios.add(sum(width for _, width in others) / inner)
    if ratios in ({1.0}, {2.0}):
        return ratios == {2.0}
    raise ModelError(f"{name} ({type(parent).__name__}) has an activation between matrices of sizes that are unknown")


def _width(module: nn.Module) -> tuple[int, int] | None:
    """Entries in and out of a matrix; None for another module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    return None
