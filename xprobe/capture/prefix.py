"""A key/value cache of a common beginning. Batches share it: it is neither copied nor changed by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from xprobe_kernels.transfer import upload

from xprobe.capture.tree_attention import NotShareable
from xprobe.models.anatomy import input_device


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


class _Shared(DynamicLayer):
    """Keys and values [1, H, P, d] of one layer. Only the batch that adds tokens sees them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.beginning = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = (shared.expand(key_states.shape[0], -1, -1, -1) for shared in self.beginning)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)
