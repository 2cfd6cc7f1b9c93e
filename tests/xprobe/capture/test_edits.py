"""Edited runs give the states of full forward passes in which plain hooks replace the states."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.families import FAMILIES, random_ids, tiny_model
from torch import Tensor

from xprobe.capture.edits import Edit, RandomStates, StatesOf, random_like
from xprobe.capture.engine import Engine
from xprobe.capture.requests import Each, Mean, Request, group_requests
from xprobe.capture.tree_decoding import merge_parts
from xprobe.errors import UsageError
from xprobe.models.anatomy import inspect

STRATEGIES = ["tree", "prefix", "plain"]


def by_hand(model: Any, blocks: Any, ids: Sequence[int], writes: dict[int, list[tuple[int, Tensor]]]) -> Tensor:
    """States [L + 1, T, D] of one prompt alone; ``writes``: by layer, (position, state)."""
    states: list[Tensor] = []

    def written(layer: int, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for position, state in writes.get(layer, []):
            hidden[0, position] = state
        states.append(hidden[0])
        return hidden

    def first(module: Any, args: tuple, kwargs: dict) -> Any:
        if args:
            return (written(0, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": written(0, kwargs["hidden_states"])}

    def later(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return written(layer, output)
            return (written(layer, output[0]), *output[1:])

        return hook

    with ExitStack() as stack, torch.inference_mode():
        stack.callback(blocks[0].register_forward_pre_hook(first, with_kwargs=True).remove)
        for layer, block in enumerate(blocks, 1):
            stack.callback(block.register_forward_hook(later(layer)).remove)
        model(torch.tensor([list(ids)]), use_cache=False)
    return torch.stack(states)


def pages() -> list[tuple[int, ...]]:
    """Four prompts on two pages of other lengths, with questions of other lengths and one ending."""
    one, other = random_ids(2, 20, seed=1).tolist()
    questions = random_ids(4, 6, seed=2).tolist()
    tail = [7, 8, 9]
    return [
        (*one, *questions[0], *tail),
        (*one, *questions[1][:3], *tail),
        (*other[:11], *questions[2], *tail),
        (*one, *questions[3][:5], *tail),
    ]


def cases(layers: int, width: int) -> list[Request]:
    """The prompts as they are, then edits of all kinds."""
    prompts = pages()
    given = torch.randn(2, width, generator=torch.Generator().manual_seed(3))

    def reads(ids: Sequence[int]) -> dict[str, Any]:
        return {"each": Each((3, len(ids) - 3, len(ids) - 1)), "mean": Mean(len(ids) - 5, len(ids))}

    requests = [Request(ids, reads(ids), "page") for ids in prompts]
    top, middle = layers - 1, layers // 2
    edits: list[tuple[int, list[Edit]]] = [
        *((0, [Edit(layer, (28,), StatesOf(1, (25,)))]) for layer in range(layers)),  # the last state of another one
        (1, [Edit(middle, (23, 24, 25), StatesOf(0, (26, 27, 28)))]),  # all that follows the question
        (0, [Edit(middle, range(20, 26), StatesOf(3, (20, 21, 22, 23, 24, 24)))]),
        (2, [Edit(1, (4, 9), given), Edit(middle, (12,), RandomStates(5))]),
        (2, [Edit(0, (0,), RandomStates(6))]),
        (3, [Edit(top, (2, 27), given)]),
        (3, [Edit(middle, (27,), StatesOf(2, (19,))), Edit(top, (26,), StatesOf(0, (0,)))]),
    ]
    return [*requests, *(Request(prompts[i], reads(prompts[i]), "page", tuple(own)) for i, own in edits)]


def expected(model: Any, blocks: Any, requests: Sequence[Request]) -> list[Tensor]:
    plain = {request.ids: by_hand(model, blocks, request.ids, {}) for request in requests}
    found = []
    for request in requests:
        writes: dict[int, list[tuple[int, Tensor]]] = {}
        for edit in sorted(request.edits, key=lambda edit: edit.layer):
            if isinstance(edit.states, StatesOf):
                states = plain[requests[edit.states.request].ids][edit.layer, list(edit.states.positions)]
            elif isinstance(edit.states, Tensor):
                states = edit.states
            else:  # the norm is that of the state as the edits below have left it
                before = by_hand(model, blocks, request.ids, writes)[edit.layer, list(edit.positions)]
                states = random_like(before, edit.states.seed)
            writes.setdefault(edit.layer, []).extend(zip(edit.positions, states, strict=True))
        found.append(by_hand(model, blocks, request.ids, writes))
    return found


def check(engine: Engine, blocks: Any, tolerance: float = 2e-5) -> None:
    requests = cases(engine.anatomy.n_layers, engine.anatomy.head.width)
    rows = engine.capture(requests)
    wanted = expected(engine.model, blocks, requests)
    for i, (request, states) in enumerate(zip(requests, wanted, strict=True)):
        each = rows["each"][:, rows.offsets["each"][i] : rows.offsets["each"][i + 1]]
        scale = float(states.abs().max())
        torch.testing.assert_close(
            each, states[:, list(request.reads["each"].positions)], rtol=0, atol=tolerance * scale
        )
        mean = request.reads["mean"]
        torch.testing.assert_close(
            rows["mean"][:, i], states[:, mean.start : mean.stop].mean(1), rtol=0, atol=tolerance * scale
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_plain_hooks_in_full_passes(family: str) -> None:
    model = tiny_model(family)
    engine = Engine(model, inspect(model), 4096)
    check(engine, engine.anatomy.blocks)
    assert all("edits" not in warning for warning in engine.report().warnings)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_strategies_and_sizes_of_a_pass_give_the_same(strategy: str, batch_tokens: int) -> None:
    model = tiny_model("llama")
    engine = Engine(model, inspect(model), batch_tokens)
    engine.strategy = strategy
    check(engine, engine.anatomy.blocks)


@pytest.mark.parametrize("batch_tokens", [60, 4096])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_selected_edits_are_run_and_the_choice_sees_the_rows_without_edits(
    strategy: Any, batch_tokens: int
) -> None:
    model = tiny_model("llama")
    anatomy = inspect(model)
    engine = Engine(model, anatomy, batch_tokens)
    engine.strategy = strategy
    requests = cases(anatomy.n_layers, anatomy.head.width)
    everything = engine.capture(requests)
    unedited = {i for i, request in enumerate(requests) if not request.edits}
    wanted = {i for i in range(len(requests)) if i not in unedited and i % 2}
    seen: list[set[int]] = []

    def select(rows: Any, ran: Any) -> set[int]:
        seen.append(set(ran))
        for i in ran:  # their rows are there
            torch.testing.assert_close(rows["each"][:, 3 * i : 3 * i + 3], everything["each"][:, 3 * i : 3 * i + 3])
        return wanted

    found = engine.capture(requests, select=select)
    assert seen
    assert seen[-1] <= unedited
    assert all(before <= after for before, after in pairwise(seen))
    for name, count in (("each", 3), ("mean", 1)):
        rows = [count * i + row for i in unedited | wanted for row in range(count)]
        torch.testing.assert_close(found[name][:, rows], everything[name][:, rows], rtol=0, atol=2e-5)


def test_a_request_alone_is_edited_too() -> None:
    model = tiny_model("llama")
    engine = Engine(model, inspect(model), 4096)
    request = Request((5, 6, 7, 8), {"last": Each((3,))}, edits=[Edit(2, [2], RandomStates(1))])
    rows = engine.capture([request])
    (states,) = expected(model, engine.anatomy.blocks, [request])
    torch.testing.assert_close(rows["last"][:, 0], states[:, 3], rtol=0, atol=1e-5)


def test_rows_of_the_last_layer_alone_are_the_same() -> None:
    model = tiny_model("qwen2")
    engine = Engine(model, inspect(model), 4096)
    requests = cases(engine.anatomy.n_layers, engine.anatomy.head.width)
    every, last = engine.capture(requests), engine.capture(requests, last_layer=True)
    assert last.first_layer == engine.anatomy.n_layers - 1
    torch.testing.assert_close(last["each"][0], every["each"][-1])


def test_the_model_is_as_it_was() -> None:
    model = tiny_model("llama")
    engine = Engine(model, inspect(model), 4096)
    ids = torch.tensor([pages()[0]])
    before = model(ids).logits
    requests = cases(engine.anatomy.n_layers, engine.anatomy.head.width)
    engine.capture(requests)
    assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(block) for block in engine.anatomy.blocks)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in engine.anatomy.blocks)


def test_a_failing_pass_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = Engine(model, inspect(model), 4096)
    engine.strategy = "tree"

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr("xprobe.capture.edited_tree.merge_parts", fail)
    engine._edits_on_tree = True
    with pytest.raises(RuntimeError, match="no"):
        engine.capture(cases(engine.anatomy.n_layers, engine.anatomy.head.width))
    assert not any("forward" in vars(block) or block._forward_hooks for block in engine.anatomy.blocks)
    assert model.config._attn_implementation != "xprobe_tree"


def test_where_the_tree_disagrees_edits_are_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    notes: list[str] = []
    engine = Engine(model, inspect(model), 4096, notes.append)

    def wrong(out: Tensor, *args: Any) -> None:
        merge_parts(out, *args)
        out *= 1.5

    monkeypatch.setattr("xprobe.capture.edited_tree.merge_parts", wrong)
    check(engine, engine.anatomy.blocks)
    assert any("edits are run with padded batches of whole prompts" in note for note in notes)


def test_only_the_blocks_above_an_edit_run_and_only_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = Engine(model, inspect(model), 4096)
    engine.strategy, engine._edits_on_tree = "tree", True
    sizes: list[list[int]] = [[] for _ in engine.anatomy.blocks]
    for place, block in enumerate(engine.anatomy.blocks):
        norm = block.input_layernorm
        monkeypatch.setattr(
            norm, "forward", lambda x, own=norm.forward, to=sizes[place]: (to.append(x.shape[1]), own(x))[1]
        )
    one, other = pages()[:2]
    plain = [Request(ids, {"last": Each((len(ids) - 1,))}) for ids in (one, other)]
    edited = [Request(one, plain[0].reads, edits=(Edit(2, (28,), StatesOf(1, (25,))),))] * 5
    engine.capture([*plain, *edited])
    assert [own[1:] for own in sizes] == [[], [], *[[5]] * (len(sizes) - 2)]


LAST = {"last": Each((2,))}


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([5], "request 0, edit 0 must be an Edit"),
        (Edit(0, (1,), RandomStates(0)), "request 0: edits must be a tuple of Edit"),
        ([Edit(-1, (1,), RandomStates(0))], "layer must be a whole number from 0 to 4, got -1"),
        ([Edit(5, (1,), RandomStates(0))], "layer must be a whole number from 0 to 4, got 5"),
        ([Edit(True, (1,), RandomStates(0))], "layer must be a whole number"),
        ([Edit(1, (), RandomStates(0))], "positions must be a tuple of whole numbers, at least one"),
        ([Edit(1, (3,), RandomStates(0))], "position 3 is not one of its 3 tokens, which are 0 to 2"),
        ([Edit(1, (-1,), RandomStates(0))], "position -1 is not one of its 3 tokens"),
        ([Edit(1, (1, 1), RandomStates(0))], "holds a position twice"),
        ([Edit(1, (1,), RandomStates(0)), Edit(1, (2, 1), torch.zeros(2, 32))], "layer 1, position 1 is edited twice"),
        ([Edit(1, (1,), torch.zeros(2, 32))], r"states must be floating-point numbers \[1, 32\]"),
        ([Edit(1, (1,), torch.zeros(1, 32, dtype=torch.int64))], r"got int64 \[1, 32\]"),
        ([Edit(1, (1,), torch.full((1, 32), float("nan")))], "states hold NaN or infinity"),
        ([Edit(1, (1,), StatesOf(7, (1,)))], "StatesOf.request must be the index of a request, 0 to 1, got 7"),
        ([Edit(1, (1,), StatesOf(0, (1,)))], "takes states of request 0, which has edits itself"),
        ([Edit(1, (1,), StatesOf(1, (9,)))], "StatesOf: position 9 is not one of its 3 tokens"),
        ([Edit(1, (1,), StatesOf(1, (0, 1)))], "1 positions get the states of 2"),
        ([Edit(1, (1,), "zero")], "states must be a Tensor, StatesOf or RandomStates, got 'zero'"),
        ([Edit(1, (1,), RandomStates(0.5))], "RandomStates.seed must be a whole number, got 0.5"),
    ],
)
def test_bad_edits_are_refused(edits: Any, message: str) -> None:
    model = tiny_model("llama")
    engine = Engine(model, inspect(model), 4096)
    with pytest.raises(UsageError, match=message):
        engine.capture([Request((5, 6, 7), LAST, edits=edits), Request((5, 6, 8), LAST)])


def test_a_plan_has_no_edits() -> None:
    model = tiny_model("llama")
    engine = Engine(model, inspect(model), 4096)
    request = Request((5, 6, 7), LAST, "page", (Edit(1, (1,), RandomStates(0)),))
    with pytest.raises(UsageError, match="request 0 of group 'page' has edits"):
        engine.plan(group_requests([request]))
