"""One forward pass of a decoder as plain data, so that it can be run whole or block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from xprobe_kernels.transfer import upload


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


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [B, T], padded on the right with id 0, to be run *without* an attention mask.

    A causal model's states at real positions cannot see what comes later, so no mask is needed; and a mask can hurt:
    rows that it leaves with nothing to attend to become NaN in some attention implementations, and spread.
    """
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return upload(ids, device)
