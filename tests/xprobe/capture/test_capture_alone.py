"""The engine as other people's scripts use it: ``capture`` alone, without any other call."""

from __future__ import annotations

import pytest
import torch
from support.families import tiny_model

from xprobe.capture.engine import Engine
from xprobe.capture.requests import Each, Request
from xprobe.models.anatomy import inspect, watch_states

BEGINNING = tuple(range(10, 30))
PROMPTS = [BEGINNING + tuple(range(start, start + 9)) for start in (60, 70, 80)]


def last(ids: tuple[int, ...]) -> Request:
    return Request(ids, {"last": Each((len(ids) - 1,))})


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "lfm2", "gpt_neo", "falcon", "mpt"])
@pytest.mark.parametrize("together", [True, False])
def test_captured_rows_are_those_of_the_model_without_any_other_call(family, together) -> None:
    model = tiny_model(family)
    anatomy = inspect(model)
    expected = []
    for ids in PROMPTS:
        states: list[torch.Tensor] = []
        with torch.no_grad(), watch_states(anatomy.blocks, lambda _, h, kept=states: kept.append(h[0, -1].clone())):
            model(torch.tensor([ids]))
        expected.append(torch.stack(states))
    engine = Engine(model, anatomy, 4096)
    requests = [last(ids) for ids in PROMPTS]
    parts = [requests] if together else [[request] for request in requests]
    found = torch.cat([engine.capture(part)["last"] for part in parts], 1)  # kept over later calls
    assert torch.allclose(found, torch.stack(expected, 1), rtol=1e-4, atol=1e-5)
