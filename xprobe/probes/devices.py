"""scikit-learn on another device than the CPU, through its array API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray

from xprobe.errors import UsageError


@contextmanager
def array_api(device: str) -> Iterator[None]:
    """Switches scikit-learn's array API on where ``device`` is not the CPU, for this thread and this block alone.

    Raises
    ------
    UsageError
        The environment variable ``SCIPY_ARRAY_API`` is not set.

    Examples
    --------
    >>> with array_api("cpu"):
    ...     sklearn.get_config()["array_api_dispatch"]
    False
    """
    if device == "cpu":
        yield
        return
    try:
        with sklearn.config_context(array_api_dispatch=True):
            yield
    except RuntimeError as error:
        if "SCIPY_ARRAY_API" not in str(error):
            raise
        raise UsageError(
            f"probes on {device} need the environment variable SCIPY_ARRAY_API=1, set before Python starts"
        ) from error


def to_device(values: NDArray, device: str) -> Any:
    """The array itself on the CPU, else a float32 tensor on ``device``.

    Examples
    --------
    >>> to_device(np.array([1.0, 2.0]), "cpu").tolist()
    [1.0, 2.0]
    """
    if device == "cpu":
        return values
    import torch

    return torch.as_tensor(np.ascontiguousarray(values), dtype=torch.float32, device=device)


def to_numpy(values: Any) -> NDArray:
    """A numpy array of an array or tensor.

    Examples
    --------
    >>> to_numpy(np.array([1.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()
