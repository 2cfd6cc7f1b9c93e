"""Unexpected tensors of a checkpoint that have a known purpose.

They are: the vision tower, if xprobe reads only the text decoder of a model; layers that predict further tokens, if
config.json counts them; and buffers that older versions of transformers saved and newer versions compute. The values of
these buffers are checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from xprobe.models.messages import quiet

Read = Callable[[str], Tensor | None]

_MASK, _MASKED = re.compile(r"\.(?:bias|mask)$"), re.compile(r"\.masked_bias$")
_FREQUENCIES = re.compile(r"rotary_emb\.inv_freq$")
FREQUENCY_ROUNDING = 2e-2  # relative; frequencies saved in bf16 have this error


def unexplained(unexpected: list[str], model: Any, config: Any, read: Read | None) -> list[str]:
    """The unexpected tensors without those that have a known purpose."""
    unexpected = _without_other_parts(unexpected, model, config)
    unexpected = _without_further_layers(unexpected, model)
    return unexpected if read is None else [name for name in unexpected if not _is_old_buffer(name, model, read)]


def wrong_frequencies(names: Iterable[str], model: Any, read: Read | None) -> str | None:
    """The first stored tensor of rotary frequencies that differs from the model's frequencies. None if there is none.

    A common factor is allowed, because scaled models were saved with their plain frequencies.
    """
    own = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq") and not buffer.is_meta]
    if read is None or not own:
        return None
    for name in sorted(names):
        stored = read(name) if _FREQUENCIES.search(name) else None
        if stored is None:
            continue
        candidates = [value for value in own if value.numel() == stored.numel()]
        if not any(_proportional(stored, value) for value in candidates):
            return name
    return None


def _proportional(stored: Tensor, own: Tensor) -> bool:
    """Whether two tensors are equal up to a common factor and rounding."""
    ratio = stored.double().flatten().cpu() / own.double().flatten().cpu()
    return bool(((ratio / ratio[0] - 1).abs() <= FREQUENCY_ROUNDING).all()) or bool(
        ((ratio - 1).abs() <= FREQUENCY_ROUNDING).all()
    )


def _is_old_buffer(name: str, model: Any, read: Read) -> bool:
    """Whether a tensor is a constant of old checkpoints: a causal mask, or the number for masked positions."""
    if not (_MASK.search(name) or _MASKED.search(name)):
        return False
    value = read(name)
    if value is None:
        return False
    if _MASKED.search(name):
        return value.numel() == 1 and float(value) <= -1e4
    own = dict(model.named_buffers()).get(name)
    if own is not None and own.shape == value.shape and not own.is_meta:
        return torch.equal(own.cpu().double(), value.double())
    if value.ndim < 2 or value.numel() != value.shape[-1] ** 2:
        return False
    square = value.reshape(value.shape[-2:]).double()
    return torch.equal(square, torch.ones_like(square).tril())


def _without_further_layers(unexpected: list[str], model: Any) -> list[str]:
    """Removes the layers after the last one that predict further tokens (DeepSeek-V3, GLM-4.5)."""
    text = model.config.get_text_config(decoder=True)
    further, count = getattr(text, "num_nextn_predict_layers", None), getattr(text, "num_hidden_layers", None)
    if not isinstance(further, int) or not isinstance(count, int):
        return unexpected
    own = tuple(f".layers.{number}." for number in range(count, count + further))
    return [name for name in unexpected if not any(part in f".{name}" for part in own)]


def _without_other_parts(unexpected: list[str], model: Any, config: Any) -> list[str]:
    """Removes the tensors of parts other than the text decoder, such as a vision tower.

    The class in ``config.architectures`` shows which tensors these are.
    """
    import transformers

    names = getattr(config, "architectures", None)
    own = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not unexpected or own is None or own is type(model) or config.get_text_config(decoder=True) is config:
        return unexpected
    try:
        with quiet(), torch.device("meta"):
            whole = own(config)
    except Exception:  # the names of its tensors remain unknown
        return unexpected
    text = {name.rpartition(".")[0] for name in model.state_dict()}
    known = {name for name in whole.state_dict() if name.rpartition(".")[0].removeprefix("language_model.") not in text}
    known |= {name.removeprefix("model.") for name in known}
    return [name for name in unexpected if name not in known and name.removeprefix("model.") not in known]
