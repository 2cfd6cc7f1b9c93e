"""The hidden state in the arguments and in the output of a decoder block; errors in a model's own code.

A block takes its hidden state as a positional argument or by keyword, under any name. It returns it as a tensor, as the
first entry of a tuple or list, or as an entry of a dictionary or output object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xprobe.errors import ModelCodeError, ModelError, XprobeError

NAMES = ("hidden_states", "hidden_state", "last_hidden_state", "hidden", "x", "inputs_embeds")


@contextmanager
def model_code_errors(model: Any) -> Iterator[None]:
    """Turns an exception in the code of ``model`` into a ModelCodeError.

    ``XprobeError``, ``MemoryError`` and ``RuntimeError`` (CUDA out of memory is one) pass unchanged.
    """
    try:
        yield
    except (XprobeError, MemoryError, RuntimeError):
        raise
    except Exception as error:  # a model's code may raise anything
        raise ModelCodeError(f"{type(model).__name__} failed in its own code: {describe_error(error)}") from error


def compute_logits(model: Any, ids: Tensor) -> Tensor:
    """Runs the model on a short prompt and returns its logits.

    Parameters
    ----------
    ids : Tensor [B, T], int64

    Returns
    -------
    Tensor [B, T, V]

    Raises
    ------
    ModelError
        The model's own code fails, or its output has no logits.
    """
    try:
        with torch.inference_mode():
            output = model(input_ids=ids, use_cache=False)
    except XprobeError:
        raise
    except Exception as error:  # a model's code may raise anything
        raise ModelError(
            f"{type(model).__name__} cannot be run on a short prompt of {ids.shape[-1]} tokens, its own code fails: "
            f"{describe_error(error)}"
        ) from error
    return extract_logits(model, output)


def extract_logits(model: Any, output: Any) -> Tensor:
    """The logits [B, T, V] in a model's output: a tensor, a tuple, a dictionary or an output object.

    Raises
    ------
    ModelError
        The output has no logits.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
        if logits is None and isinstance(output, tuple | list):
            logits = next((value for value in output if isinstance(value, Tensor) and value.ndim == 3), None)
    if not isinstance(logits, Tensor):
        raise ModelError(f"{type(model).__name__} gives no logits: xprobe reads models that predict the next token")
    return logits


def hidden_argument(args: tuple, kwargs: dict[str, Any]) -> int | str:
    """Index (positional) or name (keyword) of the argument that is the hidden state.

    Raises
    ------
    ModelError
        No argument is a tensor [batch, tokens, width].

    Examples
    --------
    >>> hidden = torch.zeros(1, 3, 8)
    >>> hidden_argument((hidden,), {"use_cache": False})
    0
    >>> hidden_argument((), {"use_cache": False, "hidden_states": hidden})
    'hidden_states'
    """
    for index, value in enumerate(args):
        if _is_hidden(value):
            return index
    names = [name for name in NAMES if _is_hidden(kwargs.get(name))]
    names += [name for name, value in kwargs.items() if _is_hidden(value)]
    if not names:
        arguments = ", ".join([type(value).__name__ for value in args] + sorted(kwargs)) or "nothing"
        raise ModelError(f"a block gets no hidden state [batch, tokens, width] (only {arguments})")
    return names[0]


def hidden_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden state in the arguments of a block."""
    key = hidden_argument(args, kwargs)
    return args[key] if isinstance(key, int) else kwargs[key]


def with_hidden_input(args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a block with another hidden state."""
    key = hidden_argument(args, kwargs)
    if isinstance(key, int):
        return (*args[:key], hidden, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: hidden}


def hidden_output(output: Any) -> Tensor:
    """The hidden state in the output of a block.

    Raises
    ------
    ModelError
        The output has no tensor.

    Examples
    --------
    >>> hidden = torch.zeros(1, 3, 8)
    >>> hidden_output((hidden, None)) is hidden
    True
    >>> hidden_output({"loss": None, "hidden_states": hidden}) is hidden
    True
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return hidden_output(output[_key(output)])
    if isinstance(output, tuple | list) and output:
        return hidden_output(output[0])
    raise ModelError(f"a block returns a {type(output).__name__} without a hidden state")


def with_hidden_output(output: Any, hidden: Tensor) -> Any:
    """The output of a block with another hidden state."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, Mapping):
        key = _key(output)
        changed = {**output, key: with_hidden_output(output[key], hidden)}
        return changed if type(output) is dict else type(output)(**changed)
    first = with_hidden_output(output[0], hidden)
    rest = list(output[1:])
    if isinstance(output, list):
        return [first, *rest]
    return type(output)(first, *rest) if hasattr(output, "_fields") else (first, *rest)


def _key(output: Mapping[str, Any]) -> str:
    """The name of the hidden state in a dictionary or output object."""
    names = [name for name in NAMES if isinstance(output.get(name), Tensor)]
    names += [name for name, value in output.items() if _is_hidden(value)]
    if not names:
        raise ModelError(f"a block returns {', '.join(map(str, output)) or 'nothing'}: none of them is a hidden state")
    return names[0]


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3


def describe_error(error: Exception) -> str:
    """The type and the message of an error in one line."""
    if isinstance(error, KeyError):
        return f"{error} is not known to it (a KeyError)"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
