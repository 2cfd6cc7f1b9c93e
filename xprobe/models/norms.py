"""Measures what a norm computes, and reads the weights of single modules wherever they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from xprobe_kernels import Unembedding

from xprobe.errors import ModelError


@contextmanager
def with_precision(modules: list[nn.Module], dtype: torch.dtype) -> Iterator[torch.dtype]:
    """Converts the modules' parameters to ``dtype`` inside the context and yields the dtype that they have.

    A finer dtype among the parameters replaces ``dtype``. Parameters that are offloaded or shared among processes stay
    as they are.
    """
    members = list(dict.fromkeys(member for module in modules for member in module.modules()))
    own = [(m, name, value) for m in members for name, value in m._parameters.items() if value is not None]
    finest = max((value.dtype for _, _, value in own), key=lambda kind: kind.itemsize, default=dtype)
    away = any(value.is_meta or hasattr(value, "full_tensor") for _, _, value in own)
    if away or any(hasattr(member, "_hf_hook") for member in members):
        yield min((value.dtype for _, _, value in own), key=lambda kind: kind.itemsize, default=dtype)
        return
    wanted = max(dtype, finest, key=lambda kind: kind.itemsize)
    narrow = [entry for entry in own if entry[2].dtype != wanted]
    for module, name, value in narrow:
        module._parameters[name] = nn.Parameter(value.detach().to(wanted), requires_grad=False)
    try:
        yield wanted
    finally:
        for module, name, value in narrow:
            module._parameters[name] = value


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module itself, without those of its submodules.

    Offloaded parameters are loaded, and parameters that processes share are gathered.

    Raises
    ------
    ModelError
        The parameters cannot be loaded.

    Examples
    --------
    >>> {name: tuple(value.shape) for name, value in own_weights(nn.Linear(4, 3)).items()}
    {'weight': (3, 4), 'bias': (3,)}
    """
    own = {name: _gather(value.detach()) for name, value in module.named_parameters(recurse=False)}
    if not any(value.is_meta for value in own.values()):
        return own
    from accelerate.utils import align_module_device

    with align_module_device(module):  # on exit the module is offloaded again, so copy
        own = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}
    if any(value.is_meta for value in own.values()):
        raise ModelError(
            f"cannot read the weights of {type(module).__name__}, which are on no device: give the final norm and the "
            "head a device of their own in device_map"
        )
    return own


def _gather(value: Tensor) -> Tensor:
    """The whole of a weight that processes share."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def read_norm(module: nn.Module, name: str, inputs: Tensor, config: Any) -> dict[str, Any]:
    """The kind, gamma, beta and epsilon of a norm: the candidate that gives its output on rows of several sizes.

    Parameters
    ----------
    module : Module
    name : str
        Of the module, for the message.
    inputs : Tensor [..., D]
        What it is called with: only shape, dtype and device count.
    config : PreTrainedConfig
        Of the model; its epsilons are candidates.

    Raises
    ------
    ModelError
        It is neither RMSNorm nor LayerNorm.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> read_norm(nn.LayerNorm(8, eps=1e-5), "norm", torch.zeros(1, 8), LlamaConfig())["norm"]
    'layer'
    """
    own = own_weights(module)
    weight, beta = own.get("weight"), own.get("bias")
    gammas = [None] if weight is None else [weight, 1 + weight.float()]
    epsilons = {v for k, v in vars(module).items() if "eps" in k and isinstance(v, float)}
    epsilons |= {
        v for k, v in config.get_text_config(decoder=True).to_dict().items() if "eps" in k and isinstance(v, float)
    }
    generator = torch.Generator().manual_seed(0)
    shape = (16, inputs.shape[-1])
    # the mean is half the spread: if the mean were much larger, the spread would be lost in rounding
    rows = (torch.randn(shape, generator=generator) + 0.5) * torch.logspace(-5, 2, 16)[:, None]
    narrow = inputs.dtype
    if getattr(module, "eps", 0.0) is None:  # torch's RMSNorm then takes the epsilon of the dtype it runs in
        epsilons |= {torch.finfo(narrow).eps, torch.finfo(torch.promote_types(narrow, torch.float32)).eps}
    wider = narrow if getattr(module, "eps", 0.0) is None else torch.float64
    with with_precision([module], wider) as wide, torch.inference_mode():
        rows = rows.to(inputs.device, wide if own else inputs.dtype)
        wanted = module(rows).double()
    best: tuple[float, dict[str, Any]] = (float("inf"), {})
    for kind, gamma, eps in product(("rms", "layer"), gammas, sorted(epsilons | {1e-5, 1e-6})):
        spec: dict[str, Any] = {"norm": kind, "gamma": gamma, "beta": beta, "eps": eps}
        blank = Unembedding(torch.zeros(1, shape[1], device=rows.device), **spec)
        error = float((blank.normalize(rows.double()) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        if error < best[0]:
            best = (error, spec)
    # most norms compute in fp32, whatever the dtype of their input
    if not best[0] < 16 * max(torch.finfo(rows.dtype).eps, torch.finfo(torch.float32).eps):
        raise ModelError(f"{type(module).__name__} ({name}) is neither RMSNorm nor LayerNorm: off by {best[0]:.1e}")
    return best[1]
