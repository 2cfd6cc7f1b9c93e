"""Checks that a checkpoint holds exactly the tensors of the model in its config.json.

transformers fills a missing tensor with random numbers. An unexpected tensor means that the model in memory differs
from that of the authors. xprobe refuses both, for every kind of loading. Two kinds of tensors are exempt: those that
the model class declares as ignorable, and unexpected tensors with a known purpose (``leftovers.py``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any

from xprobe.errors import ModelError
from xprobe.models.leftovers import Read, unexplained, wrong_frequencies

SHOWN = 3  # number of tensors that a message names
_QUANTISED = re.compile(
    r"(?:_scale_inv|weight_scale|input_scale|activation_scale|_scales?|\.scales?|qweight|qzeros|g_idx|absmax|"
    r"quant_map|quant_state|SCB|weight_packed|weight_shape|zero_point|_blocks)(?:\.|$|_)"
)
_ADAPTER = re.compile(r"\.(?:lora_(?:A|B|embedding|magnitude)|ia3_|lokr_|hada_|oft_|vera_lambda|prompt_encoder)")


def check_complete(
    model: Any,
    where: str,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    mismatched: Iterable[tuple[str, Any, Any]] = (),
    config: Any = None,
    read: Read | None = None,
) -> None:
    """Refuses a checkpoint with missing tensors, unexpected tensors or wrong shapes.

    Parameters
    ----------
    model : PreTrainedModel
        Its class declares which tensors may be missing or unexpected.
    where : str
        Name of the checkpoint, for the message.
    missing : iterable of str
        Tensors of the model that the checkpoint lacks.
    unexpected : iterable of str
        Tensors of the checkpoint that the model lacks.
    mismatched : iterable of (name, shape in the checkpoint, shape in the model)
    config : PreTrainedConfig, optional
        The configuration of the checkpoint. It may describe more than the text decoder, such as a vision tower.
    read : callable (name) -> Tensor or None, optional
        Reads a tensor of the checkpoint. It is needed to recognise buffers of old checkpoints by their values.

    Raises
    ------
    ModelError
        Names the tensors and the likely cause.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, **sizes))
    >>> check_complete(model, "my-model")
    >>> check_complete(model, "my-model", missing=["model.norm.weight"])
    Traceback (most recent call last):
    ...
    xprobe.errors.ModelError: my-model lacks 1 tensor of LlamaForCausalLM (model.norm.weight): they would be random ...
    """
    names = set(unexpected)
    absent, extra = without_ignorable(model, missing, names)
    wrong = wrong_frequencies(names, model, read)
    if wrong is not None:
        raise ModelError(
            f"{where}: {wrong} holds other rotary frequencies than {type(model).__name__} computes from config.json, "
            "which has no entry for a scaling. The frequencies would be lost: use the original configuration"
        )
    extra = unexplained(extra, model, config, read)
    shapes = sorted((name, tuple(stored), tuple(wanted)) for name, stored, wanted in mismatched)
    kind = type(model).__name__
    if shapes:
        name, stored, wanted = shapes[0]
        more = f" (and {len(shapes) - 1} more)" if len(shapes) > 1 else ""
        raise ModelError(
            f"{where}: {name} has shape {list(stored)}, its config.json asks for {list(wanted)}{more}: weights and "
            "configuration are not of the same model"
        )
    if not absent and not extra:
        return
    parts = [f"lacks {len(absent)} {_tensors(absent)} of {kind} ({_first_names(absent)})"] if absent else []
    if extra:
        parts.append(f"holds {len(extra)} {_tensors(extra)} that {kind} has no place for ({_first_names(extra)})")
    raise ModelError(f"{where} {' and '.join(parts)}: {likely_cause(model, absent, extra)}")


def without_ignorable(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[list[str], list[str]]:
    """``missing`` and ``unexpected``, sorted, without the tensors that the model class declares as ignorable."""
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)
    return sorted(info.missing_keys), sorted(info.unexpected_keys)


def likely_cause(model: Any, missing: Collection[str], unexpected: Collection[str]) -> str:
    """The likely cause of missing or unexpected tensors, judged by their names, and the remedy."""
    prefix = _common_prefix(missing, unexpected)
    if prefix:
        return (
            f"every name begins with {prefix!r}, as in a model that was saved inside a wrapper"
            f"{' (torch.compile)' if prefix == '_orig_mod.' else ''}: save the model itself with save_pretrained"
        )
    if any(_ADAPTER.search(name) for name in unexpected):
        return f"these tensors are an adapter's: {MERGE}"
    if any(_QUANTISED.search(name) for name in unexpected):
        return "these tensors belong to quantised weights, which xprobe does not read: use the original model"
    head = _head_name(model)
    if missing and set(missing) <= {head} and not unexpected:
        return (
            "the head would be random numbers. If the head of this model is its embedding, its config.json must have "
            '"tie_word_embeddings": true'
        )
    if missing and not unexpected:
        return "they would be random numbers. The checkpoint is incomplete, or config.json is of another model"
    if unexpected and not missing:
        return "the model would ignore them. config.json is of another model, or of another version"
    return "weights and config.json are not of the same model"


MERGE = (
    "merge it into the weights first, with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
    ".save_pretrained(folder)"
)


def _common_prefix(missing: Collection[str], unexpected: Collection[str]) -> str:
    """The prefix of all unexpected tensors without which they have the model's own names. "" if there is none."""
    for name in unexpected:
        for wanted in missing:
            if name.endswith("." + wanted):
                prefix = name[: -len(wanted)]
                stripped = {other.removeprefix(prefix) for other in unexpected}
                if all(other.startswith(prefix) for other in unexpected) and stripped & set(missing):
                    return prefix
    return ""


def _head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), "")


def _tensors(names: Collection[str]) -> str:
    return "tensor" if len(names) == 1 else "tensors"


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
