"""Explains errors that transformers raises while it loads a model."""

from __future__ import annotations

import re

from xprobe.models.sources import Source, unknown_model


def explain_error(source: Source, error: Exception) -> str:
    """The message for an error of transformers while it loads weights or the configuration."""
    reason = _one_line(error)
    if isinstance(error, KeyError):
        return f"cannot load {source.name}: its config.json asks for {reason}, which this transformers does not know"
    if source.kind == "hub" and ("not a valid model identifier" in reason or "couldn't connect" in reason):
        return unknown_model(source)
    if "trust_remote_code" in reason:
        return _own_code_message(source)
    if "Weights only load failed" in reason:
        return f"cannot load {source.name}: its pickle is damaged, or contains other things than tensors"
    if "has no `tp_plan`" in reason:
        return f"transformers cannot share {source.name} among processes: use device_map='auto' (--device-map auto)"
    if source.kind == "hub" and re.search(r"no file named \S*(safetensors|\.bin)", reason):
        return (
            f"{source.name} has no weights in safetensors format on the hub. allow_pickle=True (--allow-pickle) loads "
            "weights from a pickle, which can run code"
        )
    if "above report" in reason:
        return (
            f"cannot load {source.name}: transformers could not convert its tensors to those of the model in "
            "config.json. Weights and configuration are not of the same model"
        )
    return f"cannot load {source.name}: {reason[:400]}"


def explain_tokenizer_error(source: Source, error: Exception) -> str:
    """The message for an error of transformers while it loads the tokenizer."""
    reason = _one_line(error)
    if "trust_remote_code" in reason:
        return _own_code_message(source)
    return (
        f"cannot read the tokenizer of {source.name} ({type(error).__name__}: {reason[:300]}): save it again with the "
        "installed versions of transformers and tokenizers"
    )


def _own_code_message(source: Source) -> str:
    return f"{source.name} has code of its own, which runs only with trust_remote_code=True (--trust-remote-code)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
