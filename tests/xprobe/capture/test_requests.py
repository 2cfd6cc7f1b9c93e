"""Requests: names and positions are the caller's; what cannot be captured together is refused by name."""

from __future__ import annotations

import pytest
import torch
from support.families import tiny_model

from xprobe.capture.engine import Engine
from xprobe.capture.requests import Each, Mean, Request
from xprobe.models.anatomy import inspect, watch_states


@pytest.fixture(scope="module")
def engine():
    model = tiny_model("llama", dtype=torch.float64)
    return Engine(model, inspect(model), 10_000)


def states(engine, ids) -> torch.Tensor:
    """All states [L + 1, T, D] of the model run over ``ids`` alone."""
    layers = []
    with torch.inference_mode(), watch_states(engine.anatomy.blocks, lambda layer, hidden: layers.append(hidden[0])):
        engine.model(input_ids=torch.tensor([ids]), use_cache=False)
    return torch.stack(layers)


def test_any_names_and_any_number_of_reads_give_the_rows_of_the_model(engine):
    one = Request(tuple(range(20, 32)), {"a": Each((11, 0, 5)), "b": Mean(2, 7), "c": Mean(0, 1)}, "x")
    other = Request((*range(20, 28), 90, 91), {"a": Each((9,)), "b": Mean(7, 10), "c": Mean(8, 9)}, "x")
    rows = engine.capture([one, other])
    first, second = states(engine, one.ids), states(engine, other.ids)
    wanted = {
        "a": torch.stack([first[:, 11], first[:, 0], first[:, 5], second[:, 9]], 1),
        "b": torch.stack([first[:, 2:7].mean(1), second[:, 7:10].mean(1)], 1),
        "c": torch.stack([first[:, 0], second[:, 8]], 1),
    }
    assert rows.offsets["a"].tolist() == [0, 3, 4]
    for name, values in wanted.items():
        assert torch.allclose(rows[name], values, rtol=0, atol=1e-12), name
    assert torch.equal(rows.first("a"), rows["a"][:, [0, 3]])
    part = rows.part(1, 2)
    assert torch.equal(part["a"], rows["a"][:, 3:])
    assert part.offsets["a"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([Request((), {"a": Mean(0, 1)})], "request 0 has no tokens"),
        ([Request((1, 2), {})], "request 0 has no reads"),
        ([Request((1, 2), {"a": Each((2,))})], "request 0 reads a at .* but has 2 tokens"),
        ([Request((1, 2), {"a": Each((-1,))})], "request 0 reads a"),
        ([Request((1, 2), {"a": Each(())})], "request 0 reads a"),
        ([Request((1, 2), {"a": Mean(1, 1)})], "request 0 reads a"),
        ([Request((1, 2), {"a": Mean(0, 3)})], "request 0 reads a"),
        (
            [Request((1, 2), {"a": Mean(0, 1)}), Request((1, 2), {"b": Mean(0, 1)})],
            r"request 1 reads b \(Mean\), the first request reads a \(Mean\): capture them in two calls",
        ),
        ([Request((1, 2), {"a": Mean(0, 1)}), Request((1, 2), {"a": Each((0,))})], r"request 1 reads a \(Each\)"),
    ],
)
def test_requests_that_cannot_be_captured_together_are_refused(engine, requests, message):
    with pytest.raises(ValueError, match=message):
        engine.capture(requests)
