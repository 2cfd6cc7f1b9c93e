"""A model that the caller has in memory already, taken as it is: its identity, and its state put back afterwards."""

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
from xprobe.models.loading import LoadedModel, use_plain_experts
from xprobe.models.messages import quiet
from xprobe.models.sources import Source

SAMPLE = 256  # numbers of each tensor that enter the fingerprint
IDENTITY = f"configuration, tokenizer, and of every tensor name, shape, dtype and up to {SAMPLE} values"
_FREE = ("_name_or_path", "transformers_version", "_attn_implementation", "_attn_implementation_autoset", "torch_dtype")


@dataclass(frozen=True)
class InMemorySource(Source):
    """The source of a model in memory; ``digest`` is its fingerprint."""

    digest: str = ""

    def fingerprint(self) -> str:
        """SHA-256 of ``IDENTITY``."""
        return self.digest


def wrap_model(model: Any, tokenizer: Any) -> LoadedModel:
    """A loaded transformers model and its tokenizer, checked and named.

    Parameters
    ----------
    model : PreTrainedModel
        Of a causal decoder, with plain weights.
    tokenizer : PreTrainedTokenizerBase

    Raises
    ------
    UsageError
        ``model`` is not a transformers model, is an adapter's wrapper, or has no tokenizer beside it.
    ModelError
        It is not a causal decoder, or is quantised.
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
        raise ModelError(f"{name} is quantised: the lens needs plain weights, so use the original model")
    check_decoder(model.config, name)
    coarse = [key for key, value in model.state_dict().items() if not _is_plain(value)]
    coarse += [key for key, value in model.named_parameters() if not value.is_floating_point()]
    if coarse:
        raise ModelError(f"{name} is quantised ({coarse[0]}): the lens needs plain weights, so use the original model")
    source = InMemorySource(name, MODEL_IN_MEMORY, "", fingerprint(model, tokenizer))
    return LoadedModel(source, model, tokenizer, window(model.config))


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_quantized


def check_options(dtype: str, execution: Execution) -> None:
    """Refuses options that say how to load a model: this one is loaded.

    Raises
    ------
    UsageError
        Names the option.
    """
    default = Execution()
    given = {"dtype": dtype} if dtype != "auto" else {}
    for name in ("device", "device_map", "tensor_parallel", "stream", "trust_remote_code", "allow_pickle"):
        if getattr(execution, name) != getattr(default, name):
            given[name] = getattr(execution, name)
    for name, value in given.items():
        raise UsageError(f"{name}={value!r} says how to load a model, and this one is in memory")


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluation mode, and experts that can compute in the model's dtype; all as before on exit."""
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
    """SHA-256, in hexadecimal, of what ``IDENTITY`` says; the same model gives the same on any device."""
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _FREE}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest.update(words.encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_sample(value))
    return digest.hexdigest()


def _sample(value: Tensor) -> bytes:
    """Evenly spaced numbers of a tensor; none of one that is elsewhere or in parts."""
    if value.is_meta or hasattr(value, "full_tensor") or not value.numel():
        return b""
    flat = value.detach().flatten()
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).long()
    return flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes()
