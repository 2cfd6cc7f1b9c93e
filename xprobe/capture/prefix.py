"""A key/value cache of a common beginning. Batches share it: it is neither copied nor changed by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from xprobe_kernels.transfer import upload

from xprobe.capture.passes import make_pass, run_pass
from xprobe.capture.plan import prefix_length
from xprobe.capture.requests import Request
from xprobe.capture.rows import Receiver, Rows
from xprobe.capture.tree_attention import NotShareable
from xprobe.models.anatomy import Anatomy, input_device, watch_states
from xprobe.models.passes import pad


def shared_cache(model: Any, ids: list[int]) -> Any:
    """Runs the decoder over one beginning and returns its key/value cache, for any number of batches.

    Raises
    ------
    NotShareable
        The model's cache holds something other than keys and values.
    """
    cache = DynamicCache()
    model.base_model(input_ids=upload(torch.tensor([ids]), input_device(model)), past_key_values=cache, use_cache=True)
    layers: list[Any] = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.shape[-2] != len(ids):
            raise NotShareable("a cache that is not keys and values of every token")
        layers.append(_Shared(keys, values))
    cache.layers = layers
    return cache


def run_on_prefix(model: Any, anatomy: Anatomy, requests: Sequence[Request], part: Sequence[int], into: Rows) -> None:
    """Runs ``part`` of ``requests`` as a padded batch on a cache of their common beginning, where that pays."""
    shared = prefix_length([requests[i] for i in part])
    if shared == 0:
        run_pass(model, anatomy, make_pass(model, requests, part, into, "plain"))
        return
    cache = shared_cache(model, list(requests[part[0]].ids[:shared]))
    ids = pad([requests[i].ids[shared:] for i in part], input_device(model))
    receiver = Receiver(requests, part, lambda place, start, stop: [(place, start - shared, stop - shared)], into)
    with watch_states(anatomy.blocks, receiver):
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)


class _Shared(DynamicLayer):
    """Keys and values [1, H, P, d] of one layer. Only the batch that adds tokens sees them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.beginning = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = (shared.expand(key_states.shape[0], -1, -1, -1) for shared in self.beginning)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)
