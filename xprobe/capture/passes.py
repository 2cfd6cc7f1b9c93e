"""Forward passes over parts of requests: packed as a tree, or as a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from xprobe_kernels.transfer import upload

from xprobe.capture.plan import Strategy
from xprobe.capture.requests import Request
from xprobe.capture.rows import Receiver, Rows
from xprobe.capture.tree import make_tree
from xprobe.capture.tree_attention import Layout, packed_attention
from xprobe.models.anatomy import Anatomy, input_device, watch_states
from xprobe.models.passes import Pass, pad

# The length of a packed sequence is a multiple of this
MULTIPLE = 64


def make_pass(
    model: Any, requests: Sequence[Request], part: Sequence[int], into: Rows, strategy: Strategy, kernel: bool = False
) -> Pass:
    """The forward pass over ``part`` of ``requests``, as ``tree`` or ``plain``. It writes its rows into ``into``.

    ``kernel``: packed trees may use the attention kernel.
    """
    device = input_device(model)
    if strategy == "plain":
        ids = pad([requests[i].ids for i in part], device)
        return Pass({"input_ids": ids}, Receiver(requests, part, lambda i, start, stop: [(i, start, stop)], into))
    tree = make_tree([requests[i].ids for i in part]).padded(MULTIPLE)
    layout = Layout(tree, device, kernel)
    receiver = Receiver(
        requests, part, lambda i, start, stop: [(0, *piece) for piece in tree.pieces(i, start, stop)], into
    )
    inputs = {"input_ids": upload(torch.tensor([tree.ids]), device), "position_ids": layout.positions[None]}
    return Pass(inputs, receiver, partial(packed_attention, model, layout))


def run_pass(model: Any, anatomy: Anatomy, forward_pass: Pass) -> None:
    """Runs one forward pass of the decoder without its head."""
    with torch.inference_mode(), watch_states(anatomy.blocks, forward_pass.receive), forward_pass.active():
        model.base_model(**forward_pass.inputs, use_cache=False)
