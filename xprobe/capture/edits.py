"""Edits: other states in the place of a request's own, at one layer. What lies behind them is computed anew.

An edit writes where a read only looks. The new states are those of another request (activation patching; Vig et al.
2020, Meng et al. 2022), random ones, or any that the caller gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xprobe.errors import UsageError
from xprobe.models.token_limits import is_whole, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xprobe.capture.requests import Request


@dataclass(frozen=True)
class StatesOf:
    """The states of another request of the same call, at the layer of the edit.

    Parameters
    ----------
    request : int
        Its index in the list of requests. It has no edits itself.
    positions : tuple of int
        As many as the edit has. A list or a range becomes a tuple.

    Examples
    --------
    >>> StatesOf(1, range(4, 6)).positions
    (4, 5)
    """

    request: int
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.positions, list | range):
            object.__setattr__(self, "positions", tuple(self.positions))


@dataclass(frozen=True)
class RandomStates:
    """Random directions with the norms of the states that they replace.

    Parameters
    ----------
    seed : int
        The same seed gives the same directions at every layer.
    """

    seed: int


@dataclass(frozen=True, eq=False)
class Edit:
    """Other states at some positions of one layer.

    Parameters
    ----------
    layer : int
        0 to L: layer 0 is the input of the first block, layer l the output of block l.
    positions : tuple of int
        A list or a range becomes a tuple.
    states : Tensor [n, D], StatesOf or RandomStates
        One state for each position, before the final norm.

    Examples
    --------
    >>> Edit(3, [7], StatesOf(1, [9])).states
    StatesOf(request=1, positions=(9,))
    """

    layer: int
    positions: tuple[int, ...]
    states: Tensor | StatesOf | RandomStates

    def __post_init__(self) -> None:
        if isinstance(self.positions, list | range):
            object.__setattr__(self, "positions", tuple(self.positions))


def check_edits(requests: Sequence[Request], layers: int, width: int, names: Sequence[str] | None = None) -> None:
    """Refuses edits that cannot be made. The requests passed ``check_requests``.

    Parameters
    ----------
    layers : int
        L + 1.
    width : int
        D.
    names : sequence of str, optional
        What the messages call the requests; ``request 0``, ``request 1``, ... by default.

    Raises
    ------
    UsageError
        The message names the request, the edit, the value and what is allowed.

    Examples
    --------
    >>> from xprobe.capture.requests import Each, Request
    >>> request = Request((5, 6), {"last": Each((1,))}, edits=(Edit(9, (1,), RandomStates(0)),))
    >>> check_edits([request], layers=3, width=8)
    Traceback (most recent call last):
    ...
    xprobe.errors.UsageError: request 0, edit 0: layer must be a whole number from 0 to 2, got 9
    """
    for index, request in enumerate(requests):
        name = names[index] if names else f"request {index}"
        if not isinstance(request.edits, tuple):
            raise UsageError(f"{name}: edits must be a tuple of Edit, got {show(request.edits)}")
        taken: set[tuple[int, int]] = set()
        for number, edit in enumerate(request.edits):
            where = f"{name}, edit {number}"
            if not isinstance(edit, Edit):
                raise UsageError(f"{where} must be an Edit (xprobe.capture.edits.Edit), got {show(edit)}")
            if not is_whole(edit.layer) or not 0 <= edit.layer < layers:
                raise UsageError(
                    f"{where}: layer must be a whole number from 0 to {layers - 1}, got {show(edit.layer)}"
                )
            _check_positions(edit.positions, len(request.ids), where)
            if len(set(edit.positions)) < len(edit.positions):
                raise UsageError(f"{where}: positions holds a position twice: {show(edit.positions)}")
            if twice := [position for position in edit.positions if (edit.layer, position) in taken]:
                raise UsageError(f"{where}: the state at layer {edit.layer}, position {twice[0]} is edited twice")
            taken |= {(edit.layer, position) for position in edit.positions}
            _check_states(edit, requests, width, where)


def _check_positions(positions: object, count: int, where: str) -> None:
    if not isinstance(positions, tuple) or not positions or not all(map(is_whole, positions)):
        raise UsageError(f"{where}: positions must be a tuple of whole numbers, at least one, got {show(positions)}")
    outside = [position for position in positions if not 0 <= position < count]
    if outside:
        raise UsageError(f"{where}: position {outside[0]} is not one of its {count} tokens, which are 0 to {count - 1}")


def _check_states(edit: Edit, requests: Sequence[Request], width: int, where: str) -> None:
    states, count = edit.states, len(edit.positions)
    if isinstance(states, Tensor):
        if states.shape != (count, width) or not states.is_floating_point():
            raise UsageError(
                f"{where}: states must be floating-point numbers [{count}, {width}] (positions, width of the model), "
                f"got {str(states.dtype).removeprefix('torch.')} {list(states.shape)}"
            )
        if not bool(torch.isfinite(states).all()):
            raise UsageError(f"{where}: states hold NaN or infinity")
    elif isinstance(states, StatesOf):
        known = is_whole(states.request) and 0 <= states.request < len(requests)
        if not known:
            raise UsageError(
                f"{where}: StatesOf.request must be the index of a request, 0 to {len(requests) - 1}, got "
                f"{show(states.request)}"
            )
        source = requests[states.request]
        if source.edits:
            raise UsageError(f"{where} takes states of request {states.request}, which has edits itself")
        _check_positions(states.positions, len(source.ids), f"{where}: StatesOf")
        if len(states.positions) != count:
            raise UsageError(f"{where}: {count} positions get the states of {len(states.positions)}")
    elif not isinstance(states, RandomStates):
        raise UsageError(f"{where}: states must be a Tensor, StatesOf or RandomStates, got {show(states)}")
    elif not is_whole(states.seed):
        raise UsageError(f"{where}: RandomStates.seed must be a whole number, got {show(states.seed)}")


def random_like(states: Tensor, seed: int) -> Tensor:
    """Random directions with the norms of ``states`` [n, D], in their dtype and on their device.

    Examples
    --------
    >>> drawn = random_like(torch.tensor([[3.0, 4.0]]), seed=0)
    >>> round(float(drawn.norm()), 4), bool((drawn == random_like(torch.tensor([[3.0, 4.0]]), seed=0)).all())
    (5.0, True)
    """
    drawn = random_directions(len(states), states.shape[1], seed).to(states.device)
    return (drawn * states.double().norm(dim=-1, keepdim=True)).to(states.dtype)


def random_directions(count: int, width: int, seed: int) -> Tensor:
    """Random directions [count, width] of length 1 in fp64, in main memory: those of ``random_like``."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=-1, keepdim=True)
