"""Where the hidden state stands in what a decoder block is given and in what it hands on, and calls of model code.

A block may take its hidden state as the first positional argument or by keyword, under any name, and may hand it on
as a tensor, the first entry of a tuple, or an entry of a dictionary or output object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xprobe.errors import ModelError, XprobeError

NAMES = ("hidden_states", "hidden_state", "last_hidden_state", "hidden", "x", "inputs_embeds")


class ModelCodeError(RuntimeError):
    """A model's own code raised something; the message names the model's class and says what."""


@contextmanager
def own_code(model: Any) -> Iterator[None]:
    """Turns what the code of ``model`` raises into a ModelCodeError; lack of memory and xprobe's own errors pass."""
    try:
        yield
    except (XprobeError, MemoryError, RuntimeError):
        raise
    except Exception as error:  # a model's code may raise anything
        raise ModelCodeError(f"{type(model).__name__} failed in its own code: {in_words(error)}") from error


def short_run(model: Any, ids: Tensor) -> Tensor:
    """The logits [B, T, V] of a short prompt.

    Raises
    ------
    ModelError
        The model's own code fails, or gives no logits.
    """
    try:
        with torch.inference_mode():
            output = model(input_ids=ids, use_cache=False)
    except XprobeError:
        raise
    except Exception as error:  # a model's code may raise anything
        raise ModelError(
            f"{type(model).__name__} cannot be run on a short prompt of {ids.shape[-1]} tokens, its own code fails: "
            f"{in_words(error)}"
        ) from error
    return logits_of(model, output)


def logits_of(model: Any, output: Any) -> Tensor:
    """The logits [B, T, V] in a model's output, whatever its form."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, tuple | list):
            found = next((value for value in output if isinstance(value, Tensor) and value.ndim == 3), None)
    if not isinstance(found, Tensor):
        raise ModelError(f"{type(model).__name__} gives no logits: xprobe reads models that predict the next token")
    return found


def hidden_argument(args: tuple, kwargs: dict[str, Any]) -> int | str:
    """Place (of a positional argument) or name of the hidden state among a block's arguments.

    Raises
    ------
    ModelError
        There is no tensor [batch, tokens, width] among them.
    """
    for place, value in enumerate(args):
        if _is_hidden(value):
            return place
    names = [name for name in NAMES if _is_hidden(kwargs.get(name))]
    names += [name for name, value in kwargs.items() if _is_hidden(value)]
    if not names:
        given = ", ".join([type(value).__name__ for value in args] + sorted(kwargs)) or "nothing"
        raise ModelError(f"a block is given no hidden state [batch, tokens, width] (only {given})")
    return names[0]


def entering(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a block's arguments."""
    where = hidden_argument(args, kwargs)
    return args[where] if isinstance(where, int) else kwargs[where]


def with_entering(args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The same arguments with another hidden state."""
    where = hidden_argument(args, kwargs)
    if isinstance(where, int):
        return (*args[:where], hidden, *args[where + 1 :]), kwargs
    return args, {**kwargs, where: hidden}


def leaving(output: Any) -> Tensor:
    """The hidden state in what a block hands on.

    Raises
    ------
    ModelError
        There is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return leaving(output[_key(output)])
    if isinstance(output, tuple | list) and output:
        return leaving(output[0])
    raise ModelError(f"a block hands on a {type(output).__name__} in which no hidden state was found")


def with_leaving(output: Any, hidden: Tensor) -> Any:
    """What a block hands on, with another hidden state."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, Mapping):
        key = _key(output)
        changed = {**output, key: with_leaving(output[key], hidden)}
        return changed if type(output) is dict else type(output)(**changed)
    first = with_leaving(output[0], hidden)
    rest = list(output[1:])
    if isinstance(output, list):
        return [first, *rest]
    return type(output)(first, *rest) if hasattr(output, "_fields") else (first, *rest)


def _key(output: Mapping[str, Any]) -> str:
    """Under which name an output object or dictionary holds the hidden state."""
    names = [name for name in NAMES if isinstance(output.get(name), Tensor)]
    names += [name for name, value in output.items() if _is_hidden(value)]
    if not names:
        raise ModelError(f"a block hands on {', '.join(map(str, output)) or 'nothing'}: no hidden state is among them")
    return names[0]


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3


def in_words(error: Exception) -> str:
    """Kind and message of an error in one line."""
    if isinstance(error, KeyError):
        return f"{error} is not known to it (a KeyError)"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
