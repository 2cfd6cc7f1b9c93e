"""Hidden states that probes are trained on: what ``train`` needs of them, and states held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray


class States(Protocol):
    """Hidden states of N examples at K layers, each D wide. ``xprobe.runs.states.StoredStates`` reads those of a run.

    Attributes
    ----------
    frame : DataFrame
        Describes the examples, one row each: setting, language, question_id, paragraph, and the columns that the
        probes' labels need.
    n_layers, width : int
        K and D.
    """

    @property
    def frame(self) -> pd.DataFrame: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def width(self) -> int: ...

    def layers(self, state: str, rows: NDArray[np.int64], limit: int) -> Iterator[tuple[range, NDArray[np.float32]]]:
        """Layer numbers and states [some layers, n, D] of the n examples in ``rows``, at most ``limit`` bytes at a
        time."""
        ...


@dataclass(frozen=True, eq=False)
class StatesInMemory:
    """Hidden states from elsewhere, for ``xprobe.probes.training.train``.

    Parameters
    ----------
    frame : DataFrame
        Describes the N examples; see ``States``.
    arrays : dict of str to float array [N, K, D]
        By the name of the state: ``prompt_end``, ``question_mean``.

    Examples
    --------
    >>> frame = pd.DataFrame({"language": ["en", "de"]})
    >>> states = StatesInMemory(frame, {"prompt_end": np.zeros((2, 3, 4), np.float32)})
    >>> states.n_layers, states.width
    (3, 4)
    >>> [(list(layers), array.shape) for layers, array in states.layers("prompt_end", np.array([1]), limit=0)]
    [([0, 1, 2], (3, 1, 4))]
    """

    frame: pd.DataFrame
    arrays: Mapping[str, NDArray[np.float32]]

    @property
    def n_layers(self) -> int:
        """K."""
        return next(iter(self.arrays.values())).shape[1]

    @property
    def width(self) -> int:
        """D."""
        return next(iter(self.arrays.values())).shape[2]

    def layers(self, state: str, rows: NDArray[np.int64], limit: int) -> Iterator[tuple[range, NDArray[np.float32]]]:
        """All layers at once: they are in memory."""
        yield range(self.n_layers), np.ascontiguousarray(self.arrays[state][rows].transpose(1, 0, 2))
