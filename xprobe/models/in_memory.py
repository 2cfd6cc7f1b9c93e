"""Models that the caller has already loaded: checks, a fingerprint, and a context that restores their state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xprobe.config import MODEL_IN_MEMORY, Execution
from xprobe.errors import ModelError, UsageError
from xprobe.models.completeness import MERGE
from xprobe.models.configuration import check_decoder, window
from xprobe.models.loading import LoadedModel, load, use_plain_experts
from xprobe.models.messages import quiet
from xprobe.models.sources import Source, resolve

SAMPLE = 256  # number of values of each tensor in the fingerprint
IDENTITY = f"configuration, tokenizer, names of hooks, and of every tensor name, shape, dtype and up to {SAMPLE} values"
LOADING = ("device", "trust_remote_code", "allow_pickle")  # options of Execution that concern the loading of a model
_LIBRARIES = ("transformers.", "accelerate.", "torch.")  # hooks of these belong to the model
_IGNORED = (
    "_name_or_path",
    "transformers_version",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "torch_dtype",
)


@dataclass(frozen=True)
class InMemorySource(Source):
    """The source of a model in memory. ``digest`` is its fingerprint."""

    digest: str = ""

    def fingerprint(self) -> str:
        """SHA-256 of ``IDENTITY``."""
        return self.digest


def wrap_model(model: Any, tokenizer: Any) -> LoadedModel:
    """Checks a loaded transformers model and its tokenizer, and returns them as a ``LoadedModel``.

    Parameters
    ----------
    model : PreTrainedModel
        A causal decoder with plain weights.
    tokenizer : PreTrainedTokenizerBase

    Returns
    -------
    LoadedModel

    Raises
    ------
    UsageError
        ``model`` is not a transformers model or has an adapter, or ``tokenizer`` is missing or of another kind.
    ModelError
        The model is not a causal decoder, or it is quantised.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, **sizes))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    >>> loaded = wrap_model(model, tokenizer)
    >>> loaded.source.name, loaded.source.kind, loaded.window
    ('LlamaForCausalLM', 'memory', 2048)
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(model, PreTrainedModel):
        wrapped = getattr(model, "peft_config", None) is not None
        inner = next(
            (part for part in ("_orig_mod", "module") if isinstance(getattr(model, part, None), PreTrainedModel)), ""
        )
        if inner:
            raise UsageError(f"model is wrapped in {type(model).__name__}: give the model itself, model.{inner}")
        raise UsageError(
            f"model is an adapter's wrapper ({type(model).__name__}): {MERGE}" if wrapped else
            "model must be the name of a model, the path of one, or a loaded transformers model (PreTrainedModel), got "
            f"{type(model).__name__}"
        )  # fmt: skip
    if tokenizer is None:
        raise UsageError("a model in memory needs its tokenizer: xprobe.run(model, tokenizer=...)")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UsageError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(f"{name} holds an adapter: {MERGE}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(f"{name} is quantised, and the lens needs plain weights: use the original model")
    check_decoder(model.config, name)
    quantised = [key for key, value in model.state_dict().items() if not _is_plain(value)]
    quantised += [key for key, value in model.named_parameters() if not value.is_floating_point()]
    if quantised:
        raise ModelError(
            f"{name} is quantised ({quantised[0]}), and the lens needs plain weights: use the original model"
        )
    source = InMemorySource(name, MODEL_IN_MEMORY, "", fingerprint(model, tokenizer))
    return LoadedModel(source, model, tokenizer, window(model.config))


def load_or_wrap(model: Any, tokenizer: Any, dtype: str, options: dict[str, Any]) -> LoadedModel:
    """A model by name, or one in memory with its tokenizer.

    Parameters
    ----------
    options : dict
        Of ``LOADING``.

    Raises
    ------
    UsageError
        A model by name has a tokenizer beside it, or an option is unknown; or as ``wrap_model``.
    ModelError
        The model cannot be loaded.
    """
    unknown = sorted(set(options) - set(LOADING))
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}; known: dtype, {', '.join(LOADING)}")
    if not isinstance(model, str):
        return wrap_model(model, tokenizer)
    if tokenizer is not None:
        raise UsageError("tokenizer belongs to a model in memory: leave it out, a model by name brings its own")
    return load(resolve(model), Execution(**options), dtype=dtype)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_quantized


def check_options(dtype: str, execution: Execution) -> None:
    """Refuses options for loading a model, because a model in memory is already loaded.

    Raises
    ------
    UsageError
        Names the option.

    Examples
    --------
    >>> check_options("auto", Execution())
    >>> check_options("float32", Execution())
    Traceback (most recent call last):
    ...
    xprobe.errors.UsageError: dtype='float32' is an option for loading a model, and this one is in memory
    """
    default = Execution()
    options = {"dtype": dtype} if dtype != "auto" else {}
    for name in ("device", "device_map", "tensor_parallel", "stream", "trust_remote_code", "allow_pickle"):
        if getattr(execution, name) != getattr(default, name):
            options[name] = getattr(execution, name)
    for name, value in options.items():
        raise UsageError(f"{name}={value!r} is an option for loading a model, and this one is in memory")


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Sets evaluation mode and an implementation of experts that has the model's dtype; restores both on exit."""
    modes = {module: module.training for module in model.modules()}
    experts = getattr(model.config, "_experts_implementation", None)
    model.eval()
    use_plain_experts(model)
    try:
        yield
    finally:
        if getattr(model.config, "_experts_implementation", None) != experts and experts is not None:
            with quiet():
                model.set_experts_implementation(experts)
        for module, training in modes.items():
            module.training = training


def fingerprint(model: Any, tokenizer: Any) -> str:
    """SHA-256, in hexadecimal, of the model and its tokenizer. ``IDENTITY`` lists what it covers.

    It does not depend on the device.
    """
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _IGNORED}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokenizer_text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest.update(tokenizer_text.encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    digest.update("".join(hooks(model)).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_sample(value))
    return digest.hexdigest()


def hooks(model: Any) -> list[str]:
    """The caller's forward hooks and pre-hooks on a model: module and name of the function, in order.

    Examples
    --------
    >>> layer = torch.nn.Linear(2, 2)
    >>> def steer(module, args, output): ...
    >>> handle = layer.register_forward_hook(steer)
    >>> hooks(torch.nn.Sequential(layer))
    ['0: steer']
    """
    found = []
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            function = getattr(hook, "func", hook)
            if not str(getattr(function, "__module__", "")).startswith(_LIBRARIES):
                found.append(f"{name}: {getattr(function, '__qualname__', type(function).__name__)}")
    return found


def _sample(value: Tensor) -> bytes:
    """Evenly spaced values of a tensor. Empty if the tensor is offloaded or shared among processes."""
    if value.is_meta or hasattr(value, "full_tensor") or not value.numel():
        return b""
    flat = value.detach().flatten()
    indices = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).long()
    return flat[indices.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes()
