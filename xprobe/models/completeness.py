"""Whether a checkpoint holds exactly the tensors of the model that its config.json describes.

A tensor that is missing is filled with random numbers, one that is left over means that the model does something else
than the checkpoint's authors did. Both are refused, whichever way the model is loaded; only what the model class itself
declares as ignorable passes, and what explains itself (``leftovers.py``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any

from xprobe.errors import ModelError
from xprobe.models.leftovers import Read, unexplained, wrong_frequencies

SHOWN = 3  # tensors that a message names
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
    """Raises a ModelError that names tensors and the likely cause if anything is missing, left over or misshapen.

    Parameters
    ----------
    model : model
        Its class says which tensors may be missing and which may be left over.
    where : str
        Name of the checkpoint, for the message.
    missing, unexpected : iterable of str
        Tensors that the model has and the checkpoint lacks, and the other way round.
    mismatched : iterable of (name, shape in the checkpoint, shape in the model)
    config : configuration, optional
        Of the checkpoint, which may be of a larger model (with images or sound) than the text decoder that is read.
    read : callable (name) -> Tensor or None, optional
        A tensor of the checkpoint. Old buffers that the model computes itself are told by their values.
    """
    names = set(unexpected)
    lacking, left_over = ignorable_removed(model, missing, names)
    wrong = wrong_frequencies(names, model, read)
    if wrong is not None:
        raise ModelError(
            f"{where}: {wrong} holds other rotary frequencies than {type(model).__name__} computes from config.json, "
            "which says nothing of a scaling: they would be lost, so use the original configuration"
        )
    left_over = unexplained(left_over, model, config, read)
    shapes = sorted((name, tuple(stored), tuple(wanted)) for name, stored, wanted in mismatched)
    kind = type(model).__name__
    if shapes:
        name, stored, wanted = shapes[0]
        more = f" (and {len(shapes) - 1} more)" if len(shapes) > 1 else ""
        raise ModelError(
            f"{where}: {name} has shape {list(stored)}, its config.json asks for {list(wanted)}{more}: weights and "
            "configuration are not of the same model"
        )
    if not lacking and not left_over:
        return
    parts = [f"lacks {len(lacking)} {_tensors(lacking)} of {kind} ({_some(lacking)})"] if lacking else []
    if left_over:
        parts.append(f"holds {len(left_over)} {_tensors(left_over)} that {kind} has no place for ({_some(left_over)})")
    raise ModelError(f"{where} {' and '.join(parts)}: {likely_cause(model, lacking, left_over)}")


def ignorable_removed(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[list[str], list[str]]:
    """``missing`` and ``unexpected``, sorted, without what the model class declares as ignorable."""
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)
    return sorted(info.missing_keys), sorted(info.unexpected_keys)


def likely_cause(model: Any, missing: Collection[str], unexpected: Collection[str]) -> str:
    """Why a checkpoint does not fit, as far as names tell, and what to do."""
    prefix = _common_prefix(missing, unexpected)
    if prefix:
        return (
            f"every name begins with {prefix!r}, as in a model that was saved inside a wrapper"
            f"{' (torch.compile)' if prefix == '_orig_mod.' else ''}: save the model itself with save_pretrained"
        )
    if any(_ADAPTER.search(name) for name in unexpected):
        return f"these are an adapter's: {MERGE}"
    if any(_QUANTISED.search(name) for name in unexpected):
        return "these belong to quantised weights, which mean nothing without them: use the original model"
    head = _head_name(model)
    if missing and set(missing) <= {head} and not unexpected:
        return (
            "the head would be random numbers; if this model uses its embedding as head, its config.json must say "
            '"tie_word_embeddings": true'
        )
    if missing and not unexpected:
        return "they would be random numbers; the checkpoint is incomplete, or of another model than its config.json"
    if unexpected and not missing:
        return "the model would be another one without them; config.json is of another model, or of another version"
    return "weights and config.json are not of the same model"


MERGE = (
    "merge it into the weights first, with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
    ".save_pretrained(folder)"
)


def _common_prefix(missing: Collection[str], unexpected: Collection[str]) -> str:
    """What stands before the model's own name in every tensor that is left over; "" if there is no such thing."""
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
