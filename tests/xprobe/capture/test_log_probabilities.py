"""Log-probabilities of continuations are those of the model's own logits, in every family and strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILIES, random_ids, tiny_model

from xprobe.capture.engine import Engine
from xprobe.errors import UsageError
from xprobe.models.anatomy import inspect


def texts() -> list[tuple[list[int], list[int]]]:
    """Prompts on two pages, each with two continuations, one of a single token; and the same text twice."""
    pages = random_ids(2, 20, seed=1).tolist()
    ends = random_ids(3, 6, seed=2).tolist()
    answers = [[17, 18, 19, 21], [23]]
    found = [([*page, *end[: 3 + i]], answer) for page in pages for i, end in enumerate(ends) for answer in answers]
    return [*found, found[0]]


def expected(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + step, token]) for step, token in enumerate(answer))


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_the_models_own_logits(family: str) -> None:
    model = tiny_model(family)
    done: list[int] = []
    found = Engine(model, inspect(model), 4096).log_probabilities(texts(), done.append)
    assert found == pytest.approx([expected(model, *text) for text in texts()], abs=2e-4)
    assert sum(done) == len(texts())


@pytest.mark.parametrize("strategy", ["tree", "prefix", "plain"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_strategies_and_sizes_of_a_pass_give_the_same(strategy: str, batch_tokens: int) -> None:
    model = tiny_model("llama")
    engine = Engine(model, inspect(model), batch_tokens)
    engine.strategy = strategy
    assert engine.log_probabilities(texts()) == pytest.approx([expected(model, *text) for text in texts()], abs=2e-4)


def test_the_lens_reads_many_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = Engine(model, inspect(model), 4096)
    whole = engine.log_probabilities(texts())
    monkeypatch.setattr("xprobe.capture.generation.ROWS", 3)
    assert engine.log_probabilities(texts()) == pytest.approx(whole, abs=1e-5)


def test_rows_of_a_capture_are_left_alone() -> None:
    """Both use the engine's memory for rows."""
    from xprobe.capture.requests import Each, Request

    model = tiny_model("llama")
    engine = Engine(model, inspect(model), 4096)
    requests = [Request(tuple(prompt), {"answer": Each((1, 2, 3))}) for prompt, _ in texts()]
    rows = engine.capture_wave(requests)
    before = rows["answer"].clone()
    engine.log_probabilities(texts())
    assert torch.equal(rows["answer"], before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (([], [5]), "text 1 has an empty prompt or continuation"),
        (([5], []), "text 1 has an empty prompt or continuation"),
        (([5], [99999]), r"the continuation of text 1: ids\[0\] is 99999"),
        (([99999], [5]), r"text 1: ids\[0\] is 99999"),
    ],
)
def test_bad_texts_are_refused(text: Any, message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match=message):
        Engine(model, inspect(model), 4096).log_probabilities([([5], [6]), text])
