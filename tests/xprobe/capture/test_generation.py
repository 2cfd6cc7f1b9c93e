"""Generated tokens are those of the model's own ``generate``, in every family and strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILIES, random_ids, tiny_model
from transformers import GenerationConfig

from xprobe.capture.engine import Engine
from xprobe.capture.generation import Generated, generate_on_tree
from xprobe.capture.requests import Each, Request
from xprobe.capture.tree import make_tree
from xprobe.capture.tree_decoding import parts_of
from xprobe.errors import UsageError
from xprobe.models.anatomy import inspect

NEW = 9


def shared_prompts() -> list[list[int]]:
    """Eight prompts of different lengths: pages of 20 tokens, on them questions, one of which another one continues."""
    pages = random_ids(2, 20, seed=1).tolist()
    questions = random_ids(4, 9, seed=2).tolist()
    prompts = [[*page, *question[: 5 + i]] for page in pages for i, question in enumerate(questions)]
    return [*prompts, [*prompts[0], 17, 18], random_ids(1, 3, seed=4)[0].tolist(), prompts[0]]


def expected(model: Any, ids: list[int], most: int = NEW, stop: tuple[int, ...] = ()) -> Generated:
    """By the model's own ``generate``, one prompt at a time."""
    config = GenerationConfig(
        max_new_tokens=most, do_sample=False, repetition_penalty=1.0, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, eos_token_id=list(stop) or None,
    )  # fmt: skip
    result = model.generate(torch.tensor([ids], device=model.device), generation_config=config)
    new = result.sequences[0, len(ids) :].tolist()
    values = [float(step[0].log_softmax(-1)[token]) for step, token in zip(result.logits, new, strict=True)]
    return Generated.from_tokens(new, values, set(stop))


def assert_same(found: list[Generated], wanted: list[Generated]) -> None:
    assert [one.ids for one in found] == [one.ids for one in wanted]
    assert [one.stopped for one in found] == [one.stopped for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=2e-4)


def without_end(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_the_models_own_generate(family: str) -> None:
    model = without_end(tiny_model(family))
    engine = Engine(model, inspect(model), 4096)
    engine.choose_strategy([Request(tuple(ids), {"last": Each((len(ids) - 1,))}) for ids in shared_prompts()])
    assert_same(engine.generate(shared_prompts(), NEW, ()), [expected(model, ids) for ids in shared_prompts()])


@pytest.mark.parametrize("strategy", ["tree", "prefix", "plain"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_strategies_and_sizes_of_a_pass_give_the_same_tokens(strategy: str, batch_tokens: int) -> None:
    model = without_end(tiny_model("llama"))
    engine = Engine(model, inspect(model), batch_tokens)
    engine.strategy = strategy
    assert_same(engine.generate(shared_prompts(), NEW, ()), [expected(model, ids) for ids in shared_prompts()])


@pytest.mark.parametrize("strategy", ["tree", "plain"])
def test_an_answer_ends_before_its_first_stop_token(strategy: str) -> None:
    model = without_end(tiny_model("llama"))
    engine = Engine(model, inspect(model), 4096)
    engine.strategy = strategy
    free = engine.generate(shared_prompts(), NEW, ())
    stop = (free[0].ids[3], free[4].ids[0])
    found = engine.generate(shared_prompts(), NEW, stop)
    assert_same(found, [expected(model, ids, stop=stop) for ids in shared_prompts()])
    assert found[4].ids == ()
    assert found[4].stopped
    assert found[0].ids == free[0].ids[: free[0].ids.index(next(t for t in free[0].ids if t in stop))]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("block", [1, 8, 30, 1000])
def test_blocks_of_any_size_give_the_same_tokens(family: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With soft-caps, windows and sinks, and with segments read in one product."""
    monkeypatch.setattr("xprobe.capture.tree_decoding.BLOCK", block)
    model = without_end(tiny_model(family))
    found = generate_on_tree(model, inspect(model), shared_prompts(), [NEW] * len(shared_prompts()), ())
    assert_same(found, [expected(model, ids) for ids in shared_prompts()])


@pytest.mark.parametrize(("family", "checked"), [("llama", 4), ("gemma2", 1), ("gpt_oss", 100)])
def test_the_kernel_gives_the_same_tokens(family: str, checked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU in Triton's interpreter; ``checked``: the host looks at the tokens after so many steps."""
    monkeypatch.setattr("xprobe.capture.generation.CHECKED", checked)
    monkeypatch.setattr("xprobe.capture.generation.CHECKED_ON_CPU", checked)
    model = without_end(tiny_model(family)).to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = [*shared_prompts()[:4], *shared_prompts()[8:]]
    limits = [6 - i % 3 for i in range(len(prompts))]
    free = [expected(model, ids, most) for ids, most in zip(prompts, limits, strict=True)]
    stop = (free[0].ids[3], free[2].ids[0], free[4].ids[1])
    found = generate_on_tree(model, inspect(model), prompts, limits, stop, kernel=True)
    assert_same(found, [Generated.from_tokens(one.ids, one.log_probabilities, stop) for one in free])


def test_parts_hold_each_token_of_each_prompt_once() -> None:
    prompts = shared_prompts()
    tree = make_tree(prompts, node_cost=1)
    for block in (1, 4, 16, 64, 1000):
        held: list[list[int]] = [[] for _ in prompts]
        for part in parts_of(tree, block):
            for row, i in enumerate(part.members):
                tokens = torch.arange(part.start, part.stop)
                held[i] += (tokens if part.mask is None else tokens[part.mask[row]]).tolist()
        for i, ids in enumerate(prompts):
            assert sorted(held[i]) == sorted(tree.index(i, position) for position in range(len(ids)))


def test_a_repetition_penalty_of_the_models_configuration_is_not_used() -> None:
    model = without_end(tiny_model("llama"))
    wanted = [expected(model, ids) for ids in shared_prompts()]
    model.generation_config.repetition_penalty = 5.0
    for strategy in ("tree", "plain"):
        engine = Engine(model, inspect(model), 4096)
        engine.strategy = strategy
        assert_same(engine.generate(shared_prompts(), NEW, ()), wanted)


def test_a_prompt_near_the_end_of_the_window_gets_fewer_tokens() -> None:
    model = without_end(tiny_model("llama"))
    engine = Engine(model, inspect(model), 4096)
    window = engine.limits.window
    assert window is not None
    long = random_ids(1, window - 2, seed=5)[0].tolist()
    for strategy in ("tree", "plain"):
        engine.strategy = strategy
        assert [len(one.ids) for one in engine.generate([long, long[:5]], NEW, ())] == [2, NEW]
    with pytest.raises(UsageError, match=f"prompt 0 fills the model's window of {window} tokens"):
        engine.generate([[*long, 11, 12]], NEW, ())


@pytest.mark.parametrize(
    ("prompts", "most", "message"),
    [
        ([[]], 4, "prompt 0: ids is empty"),
        ([[5], [5, 99999]], 4, r"prompt 1: ids\[1\] is 99999"),
        ([[5]], 0, "max_new_tokens must be a whole number of at least 1, got 0"),
        ([[5]], [2.5], "max_new_tokens must be"),
    ],
)
def test_bad_arguments_are_refused(prompts: Any, most: Any, message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match=message):
        Engine(model, inspect(model), 4096).generate(prompts, most, ())
