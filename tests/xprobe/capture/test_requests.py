"""Callers name the rows of a request. A bad request is refused with its index, before the model runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.families import tiny_model

from xprobe.capture.engine import Engine
from xprobe.capture.layerwise import LayerwiseEngine
from xprobe.capture.plan import make_plan
from xprobe.capture.requests import Each, Group, Mean, Request
from xprobe.errors import UsageError, XprobeError
from xprobe.models.anatomy import inspect, watch_states
from xprobe.models.parity import TeacherForced
from xprobe.models.streaming.streamed import open_streamed


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


GOOD = Request((5, 6, 7), {"last": Each((2,))})
BAD = {
    "no ids": (Request((), {"last": Each((0,))}), "ids is empty, give at least one token id"),
    "negative id": (
        Request((5, -1), {"last": Each((1,))}),
        "ids[1] is -1, but token ids of this model are whole numbers",
    ),
    "id beyond the vocabulary": (
        Request((5, 160), {"last": Each((1,))}),
        "ids[1] is 160, but token ids of this model are whole numbers from 0 to 159",
    ),
    "id is a float": (Request((5, 6.0), {"last": Each((1,))}), "ids[1] is 6.0, but"),
    "id is a bool": (Request((5, True), {"last": Each((1,))}), "ids[1] is True, but"),
    "ids in two dimensions": (Request(((5, 6), (7, 8)), {"last": Each((1,))}), "ids[0] is (5, 6), but"),
    "ids are a tensor": (Request(torch.tensor([5, 6]), {"last": Each((1,))}), "ids is a Tensor, but must be a tuple"),
    "longer than the window": (
        Request((5,) * 65, {"last": Each((64,))}),
        "ids has 65 tokens, but the window of this model is 64 tokens",
    ),
    "no reads": (Request((5, 6), {}), "reads is empty, name at least one row to keep"),
    "reads is no mapping": (Request((5, 6), Each((1,))), "reads is Each(positions=(1,)), but must be a mapping"),
    "read is no read": (
        Request((5, 6), {"last": 1}),
        "read 'last' is 1, but must be Each(positions) or Mean(start, stop)",
    ),
    "no position": (Request((5, 6), {"last": Each(())}), "read 'last' has no positions"),
    "positions are one number": (
        Request((5, 6), {"last": Each(1)}),
        "read 'last' has the positions 1, but must have a tuple",
    ),
    "position after the ids": (
        Request((5, 6), {"last": Each((2,))}),
        "read 'last' has the position 2, but positions of its 2 tokens are 0 to 1",
    ),
    "negative position": (
        Request((5, 6), {"last": Each((-1,))}),
        "read 'last' has the position -1, but positions of its 2 tokens are 0 to 1",
    ),
    "position is a float": (
        Request((5, 6), {"last": Each((1.0,))}),
        "read 'last' has the position 1.0, but positions are whole numbers",
    ),
    "position is a bool": (Request((5, 6), {"last": Each((True,))}), "read 'last' has the position True, but"),
    "repeated position": (Request((5, 6), {"last": Each((1, 1))}), "read 'last' has the position 1 twice"),
    "mean of nothing": (
        Request((5, 6), {"last": Mean(1, 1)}),
        "read 'last' is Mean(start=1, stop=1), but needs whole numbers 0 <= start < stop <= 2",
    ),
    "mean beyond the ids": (Request((5, 6), {"last": Mean(0, 3)}), "read 'last' is Mean(start=0, stop=3), but"),
    "mean of a negative start": (Request((5, 6), {"last": Mean(-1, 2)}), "read 'last' is Mean(start=-1, stop=2), but"),
    "mean of a float": (Request((5, 6), {"last": Mean(0, 1.5)}), "read 'last' is Mean(start=0, stop=1.5), but"),
    "another kind of read": (Request((5, 6), {"last": Mean(0, 1)}), "reads last (Mean), "),
    "another name": (Request((5, 6), {"other": Each((0,))}), "reads other (Each), "),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_a_bad_request_is_refused_with_its_index_before_the_model_runs(engine, bad, message):
    runs = []
    hook = engine.model.base_model.register_forward_pre_hook(lambda *args: runs.append(1))
    calls = {
        "request 1": lambda: engine.capture([GOOD, bad]),
        "request 1 ": lambda: engine.choose_strategy([GOOD, bad]),
        "request 1 of group ''": lambda: engine.plan([Group("", (GOOD, bad))]),
    }
    try:
        for name, call in calls.items():
            with pytest.raises(UsageError) as error:
                call()
            assert str(error.value).startswith(name.strip())
            assert message in str(error.value)
    finally:
        hook.remove()
    assert not runs


@pytest.mark.parametrize("requests", [None, GOOD, "abc", {GOOD.ids: GOOD}, 5], ids=repr)
def test_something_else_than_a_list_of_requests_is_refused(engine, requests):
    for call in (engine.capture, engine.choose_strategy):
        with pytest.raises(UsageError, match="requests must be a list of Request, got"):
            call(requests)
    with pytest.raises(UsageError, match=r"request 1 must be a Request \(xprobe.capture.requests.Request\), got 'x'"):
        engine.capture([GOOD, "x"])


@pytest.mark.parametrize("kind", [UsageError, KeyError])
def test_rows_of_another_name_are_refused_with_the_names_that_there_are(engine, kind):
    rows = engine.capture([GOOD])
    for call in (rows.__getitem__, rows.first):
        with pytest.raises(kind, match=r"^no read is called 'z'; the requests read last$"):
            call("z")


def test_lists_ranges_and_integers_of_numpy_are_taken(engine):
    plain = engine.capture([GOOD])["last"].clone()
    for ids, positions in (([5, 6, 7], [2]), (range(5, 8), range(2, 3)), (tuple(np.arange(5, 8)), (np.int64(2),))):
        assert torch.equal(engine.capture([Request(ids, {"last": Each(positions)})])["last"], plain)


def test_a_caller_may_lift_the_window(engine):
    """Models that turn their angles by the length of the prompt run beyond the window of their configuration."""
    long = Request((5,) * 65, {"last": Each((64,))})
    limits = engine.limits
    engine.limits = replace(limits, window=None)
    try:
        assert engine.capture([long])["last"].shape[1] == 1
    finally:
        engine.limits = limits


def test_an_empty_sample_is_refused(engine):
    with pytest.raises(UsageError, match="the sample is empty"):
        engine.choose_strategy([])


@pytest.mark.parametrize("batch_tokens", [0, -1, 2.5, True, "many"])
def test_a_bad_number_of_batch_tokens_is_refused(engine, batch_tokens):
    with pytest.raises(UsageError, match=r"batch_tokens must be .*got"):
        Engine(engine.model, engine.anatomy, batch_tokens)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "the parity check has no prompts"),
        ([TeacherForced((), (5,))], "prompt 0: ids is empty"),
        ([TeacherForced((5, 6), (6,)), TeacherForced((5, 160), (6,))], r"prompt 1: ids\[1\] is 160, but"),
        ([TeacherForced((5, 6), ())], "prompt 0: targets is empty"),
        ([TeacherForced((5, 6), (-1,))], r"prompt 0: targets\[0\] is -1, but"),
        ([TeacherForced((5,), (6, 7))], "prompt 0: it has 2 targets, but only 1 of its ids can predict one"),
    ],
)
def test_bad_prompts_of_the_parity_check_are_refused(engine, prompts, message):
    with pytest.raises(UsageError, match=message):
        engine.check_parity(prompts)


def test_an_error_in_the_models_own_code_is_an_error_of_xprobe(engine):
    def fail(*args):
        raise ValueError("no such layer")

    hook = engine.model.base_model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(XprobeError, match="LlamaForCausalLM failed in its own code: ValueError: no such layer"):
            engine.capture([GOOD])
    finally:
        hook.remove()


def test_a_streamed_model_refuses_bad_requests_and_batch_tokens(tiny, tmp_path):
    streamed = open_streamed(str(tiny), "float32", "cpu")
    with pytest.raises(UsageError, match=r"batch_tokens must be .* got 0"):
        LayerwiseEngine(streamed, 0, tmp_path)
    runner = LayerwiseEngine(streamed, 100, tmp_path)
    bad = Request((5, -1), {"last": Each((1,))})
    plan = make_plan([Group("g", (bad,))], 100, "tree")
    calls = {
        "request 0: ids": lambda: runner.choose_strategy([bad]),
        "request 0 of group 'g': ids": lambda: runner.plan([Group("g", (bad,))]),
        "request 0: ids\\[1\\] is": lambda: list(runner.run(plan, {"g"})),
        "prompt 0: ids": lambda: runner.check_parity([TeacherForced((-1,), (5,))]),
    }
    for message, call in calls.items():
        with pytest.raises(UsageError, match=message):
            call()
    assert runner.bytes_read == 0


def test_rows_are_a_mapping_of_names(engine):
    rows = engine.capture([GOOD])
    assert "last" in rows
    assert "z" not in rows
    assert list(rows) == ["last"]
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((5, 6), {"last": Each((1,))}, group=3), "request 0: group must be text, got 3"),  # type: ignore[arg-type]
        (Request((5, 6), {3: Each((1,))}), "request 0: reads has the name 3, but names are text"),  # type: ignore[dict-item]
    ],
)
def test_groups_and_names_are_text(engine, request_, message):
    with pytest.raises(UsageError, match=message):
        engine.capture([request_])


def test_an_unknown_strategy_is_refused(engine):
    with pytest.raises(UsageError, match="unknown strategy 'nope'; known: tree, prefix, plain"):
        engine.strategy = "nope"
