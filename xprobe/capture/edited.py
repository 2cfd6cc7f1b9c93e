"""Runs requests with edits as padded batches of whole prompts: every block runs over every token.

``edited_tree`` does the same on a packed tree, where only what lies behind an edit is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xprobe.capture.edits import Edit, RandomStates, StatesOf, random_like
from xprobe.capture.requests import Request
from xprobe.capture.rows import Receiver, Rows
from xprobe.models.anatomy import Anatomy, input_device, watch_states
from xprobe.models.block_io import hidden_input, hidden_output, with_hidden_input, with_hidden_output
from xprobe.models.passes import pad


def with_sources(requests: Sequence[Request], part: Sequence[int]) -> list[int]:
    """``part`` and the requests whose states its edits take, by index; the latter last.

    Examples
    --------
    >>> from xprobe.capture.requests import Each
    >>> reads = {"last": Each((1,))}
    >>> one, other = Request((5, 6), reads, edits=(Edit(2, (1,), StatesOf(1, (1,))),)), Request((7, 8), reads)
    >>> with_sources([one, other], [0])
    [0, 1]
    """
    sources = (edit.states.request for i in part for edit in requests[i].edits if isinstance(edit.states, StatesOf))
    return list(dict.fromkeys([*part, *sources]))


def edit_sample(sample: Sequence[Request], anatomy: Anatomy) -> list[Request]:
    """Requests that show whether edits on the tree agree with plain runs: a state of another one, in the middle layer.

    Parameters
    ----------
    sample : sequence of Request
        Short ones without edits (``xprobe.capture.sharing.short_sample``).

    Returns
    -------
    list of Request
        Some of ``sample``, then each with two edits.
    """
    different = list({request.ids: request for request in sample}.values())[:2]
    middle = (anatomy.n_layers - 1) // 2
    found = list(different)
    for index, request in enumerate(different):
        other = different[1 - index] if len(different) > 1 else request
        last, theirs = len(request.ids) - 1, len(other.ids) - 1
        edits = [Edit(middle, (max(0, last - 2),), StatesOf(different.index(other), (theirs,)))]
        if middle + 1 < anatomy.n_layers:
            edits.append(Edit(middle + 1, (last,), RandomStates(0)))
        found.append(replace(request, edits=tuple(edits)))
    return found


def run_plain(model: Any, anatomy: Anatomy, requests: Sequence[Request], part: Sequence[int], into: Rows) -> None:
    """Runs ``part`` of ``requests``, some of them with edits, as a padded batch; writes their rows into ``into``."""
    members = with_sources(requests, part)
    place = {i: row for row, i in enumerate(members)}
    edits: dict[int, list[tuple[int, Edit]]] = {}
    for i in part:
        for edit in requests[i].edits:
            edits.setdefault(edit.layer, []).append((i, edit))

    def change(layer: int, hidden: Tensor) -> Tensor:
        if layer not in edits:
            return hidden
        changed = hidden.clone()
        for i, edit in edits[layer]:
            positions = list(edit.positions)
            own = hidden[place[i], positions]
            if isinstance(edit.states, StatesOf):
                changed[place[i], positions] = hidden[place[edit.states.request], list(edit.states.positions)]
            elif isinstance(edit.states, Tensor):
                changed[place[i], positions] = edit.states.to(own)
            else:
                changed[place[i], positions] = random_like(own, edit.states.seed)
        return changed

    receiver = Receiver(requests, part, lambda i, start, stop: [(i, start, stop)], into)
    ids = pad([requests[i].ids for i in members], input_device(model))
    with torch.inference_mode(), change_states(anatomy.blocks, change), watch_states(anatomy.blocks, receiver):
        model.base_model(input_ids=ids, use_cache=False)


@contextmanager
def change_states(blocks: Sequence[nn.Module], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Puts ``change(layer, hidden)`` in the place of the states of layers 0..L, in every pass inside the context.

    The hooks are removed on exit. A ``watch_states`` that is entered later sees the changed states.

    Examples
    --------
    >>> blocks = (nn.Identity(), nn.Identity())
    >>> with change_states(blocks, lambda layer, hidden: hidden + layer):
    ...     blocks[1](blocks[0](torch.zeros(1, 1, 2)))
    tensor([[[3., 3.]]])
    """

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return with_hidden_input(args, kwargs, change(0, hidden_input(args, kwargs)))

    def after(layer: int) -> Any:
        return lambda module, args, output: with_hidden_output(output, change(layer, hidden_output(output)))

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for layer, block in enumerate(blocks, 1):
            stack.callback(block.register_forward_hook(after(layer)).remove)
        yield
