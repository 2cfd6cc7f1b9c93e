"""``read_top``: the most probable token of every layer, in parts of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.families import tiny_model

from xprobe.lenses import reading
from xprobe.lenses.transport import from_maps
from xprobe.models.anatomy import inspect


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("row_bytes", [256 << 20, 4 * 5 * 32 * 3])
def test_top_tokens_and_log_probabilities_are_those_of_the_model(
    family: str, row_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gemma2 has a soft-cap. The second size reads three positions at a time."""
    monkeypatch.setattr(reading, "ROW_BYTES", row_bytes)
    model = tiny_model(family)
    head = inspect(model).head
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 7, 32, generator=generator)
    lookup = torch.randint(0, 160, (7, 2), generator=generator)
    lookup[2] = torch.tensor([-1, 5])
    maps = {layer: torch.randn(32, 32, generator=generator) for layer in (1, 2, 3)}
    found = reading.read_top(rows, lookup, head, transport=from_maps("jacobian", maps))
    with torch.inference_mode():
        moved = torch.stack([rows[layer] @ maps[layer].T if layer in maps else rows[layer] for layer in range(5)])
        logits = model.lm_head(model.model.norm(moved)).double()
        if cap := getattr(model.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        values = logits.log_softmax(-1)
    assert found.top.tolist() == values.argmax(-1).T.tolist()
    wanted = values.gather(2, lookup.clamp(min=0).expand(5, 7, 2)).transpose(0, 1).numpy().copy()
    wanted[2, :, 0] = np.nan
    assert np.allclose(found.log_probability, wanted, atol=1e-4, equal_nan=True)
    assert found.log_probability.dtype == np.float32
