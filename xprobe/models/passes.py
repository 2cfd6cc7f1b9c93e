"""One forward pass of a decoder as data. The engine runs it through the whole model or block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from xprobe_kernels.transfer import upload


@dataclass(frozen=True, eq=False)
class Pass:
    """The inputs of a forward pass, and the function that gets its hidden states.

    Attributes
    ----------
    inputs : dict of str to Tensor
        Keyword arguments of the decoder (the model without its head): ``input_ids`` [B, T], optionally
        ``position_ids``.
    receive : callable (layer, hidden)
        Called with the residual states [B, T, D] of layers 0..L in order. Layer 0 is the input of the first block.
    active : callable () -> context manager
        A context around the forward pass of the decoder. If blocks run one at a time, it is entered for each block.

    Examples
    --------
    >>> item = Pass({"input_ids": torch.tensor([[5, 6, 7]])}, lambda layer, hidden: print(layer, hidden.shape))
    >>> with item.active():
    ...     item.receive(0, torch.zeros(1, 3, 8))
    0 torch.Size([1, 3, 8])
    """

    inputs: dict[str, Tensor]
    receive: Callable[[int, Tensor], None]
    active: Callable[[], AbstractContextManager[None]] = nullcontext


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [B, T], padded on the right with id 0. Run them *without* an attention mask.

    In a causal model the states of real tokens do not depend on the padding after them, so no mask is needed. A mask
    can do harm: a row that may attend to nothing becomes NaN in some implementations of attention, and the NaN spreads.

    Examples
    --------
    >>> pad([[5, 6, 7], [8]], torch.device("cpu"))
    tensor([[5, 6, 7],
            [8, 0, 0]])
    """
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return upload(ids, device)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter of the model gets a gradient inside the context."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
