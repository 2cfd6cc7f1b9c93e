"""One forward pass of a decoder as plain data, so that it can be run whole or block by block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """What to feed the decoder, and what to do with its hidden states.

    Attributes
    ----------
    inputs : dict of str to Tensor
        Keyword arguments of the decoder (the model without its head): ``input_ids`` [B, T], maybe ``position_ids``.
    receive : callable (layer, hidden)
        Given the residual states [B, T, D] of layers 0..L in order; layer 0 is the input of the first block.
    active : callable () -> context manager
        Entered around the decoder's forward, or around each block's where blocks run one at a time.
    """

    inputs: dict[str, Tensor]
    receive: Callable[[int, Tensor], None]
    active: Callable[[], AbstractContextManager[None]] = nullcontext
