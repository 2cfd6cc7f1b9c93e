"""Bytes of a shard: named arrays and a header, in the format of safetensors."""

from __future__ import annotations

import json
from typing import Any


def shard_bytes(tensors: dict[str, Any], metadata: dict[str, Any]) -> bytes:
    """Content of a shard file: ``tensors`` (numpy arrays or torch tensors by name) and ``metadata`` as JSON."""
    from safetensors.torch import save

    # one entry: safetensors writes several in an order that changes from process to process
    return save(_as_torch(tensors), {"xprobe": json.dumps(metadata, ensure_ascii=False)})


def _as_torch(tensors: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(value))
        return value.detach().cpu().contiguous()

    return {name: convert(value) for name, value in tensors.items()}
