"""Patches of a single prompt are those of plain hooks, and what cannot be patched is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import xprobe
from xprobe import PromptEdit
from xprobe.errors import UsageError
from xprobe.models.anatomy import inspect, watch_states

PROMPT, SOURCE = "who built the old tower", "who sold many of the boats"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("prompts") / "model")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answers_of(tokenizer: Any) -> list[str]:
    """Two texts that begin with different tokens."""
    words = ["tower", "boats", "many", "sold", "old"]
    first = {tokenizer(word, add_special_tokens=False)["input_ids"][0]: word for word in words}
    return list(first.values())[:2]


def by_hand(model: Any, ids: list[int], layer: int, position: int, state: torch.Tensor) -> torch.Tensor:
    def write(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, position] = state
        return output

    hook = inspect(model).blocks[layer - 1].register_forward_hook(write)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    hook.remove()
    return logits


def test_it_is_what_plain_hooks_give(folder: Path, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    answers = answers_of(tokenizer)
    targets = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in answers]
    ids, source = (tokenizer(text)["input_ids"] for text in (PROMPT, SOURCE))
    states: list[torch.Tensor] = []
    with torch.inference_mode(), watch_states(inspect(model).blocks, lambda layer, hidden: states.append(hidden[0])):
        model(torch.tensor([source]))
    edits = [
        PromptEdit(2, -1, SOURCE),
        [PromptEdit(3, 1, SOURCE, source_positions=-2)],
        PromptEdit(1, [2], states=torch.ones(1, 32)),
        PromptEdit(4, -1, SOURCE),
    ]
    found = xprobe.patch_prompt(str(folder), PROMPT, edits, answers=answers)
    wanted = [
        by_hand(model, ids, 2, len(ids) - 1, states[2][-1]),
        by_hand(model, ids, 3, 1, states[3][-2]),
        by_hand(model, ids, 1, 2, torch.ones(32)),
        by_hand(model, ids, 4, len(ids) - 1, states[4][-1]),
    ]
    for run, logits in enumerate(wanted):
        assert found.table.loc[run, answers].tolist() == pytest.approx(logits[targets].tolist(), abs=1e-4)
        text, value = found.table.loc[run, "top"][0]
        assert (text, value) == (tokenizer.decode([int(logits.argmax())]), pytest.approx(float(logits.max()), abs=1e-3))
    assert found.table.loc["before", "effect"] == 0.0
    assert found.table.loc[3, "effect"] == pytest.approx(1.0, abs=1e-3)
    assert found.table["effect"].isna().tolist() == [False, False, False, True, False]
    assert found.table.loc[1, "token"] == found.tokens[1]
    assert "before" in repr(found)
    assert "<table" in found._repr_html_()


def test_a_model_in_memory_gives_the_same_and_stays_as_it_was(folder: Path, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    edits = [PromptEdit(layer, -1, seed=layer) for layer in range(5)]
    named = xprobe.patch_prompt(str(folder), PROMPT, edits, answers=answers_of(tokenizer))
    model.train()
    held = xprobe.patch_prompt(model, PROMPT, edits, answers=answers_of(tokenizer), tokenizer=tokenizer)
    assert model.training
    model.eval()
    assert held.table[answers_of(tokenizer)].to_numpy() == pytest.approx(
        named.table[answers_of(tokenizer)].to_numpy(), abs=1e-4
    )


def test_many_runs_share_the_beginning(folder: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    edits = [PromptEdit(layer, position, SOURCE) for layer in range(5) for position in range(-3, 0)]
    plain = xprobe.patch_prompt(str(folder), PROMPT, edits, answers=answers_of(loaded[1]))
    monkeypatch.setattr("xprobe.single_prompt.patch.PLAIN_TOKENS", 60)
    shared = xprobe.patch_prompt(str(folder), PROMPT, edits, answers=answers_of(loaded[1]))
    columns = answers_of(loaded[1])
    assert shared.table[columns].to_numpy() == pytest.approx(plain.table[columns].to_numpy(), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, r"the prompt '' has no tokens"),
        ({"prompt": 5}, "prompt must be"),
        ({"edits": "x"}, "edits must be a list of PromptEdit, got 'x'"),
        ({"edits": [5]}, r"edits\[0\] must be a PromptEdit"),
        ({"edits": [[]]}, r"edits\[0\] must be a PromptEdit"),
        ({"edits": [PromptEdit(9, -1, SOURCE)]}, "layer must be a whole number from 0 to 4, got 9"),
        ({"edits": [PromptEdit(1, 99, SOURCE)]}, r"edits\[0\] has the position 99, but 'who built"),
        (
            {"edits": [PromptEdit(1, -1, SOURCE, source_positions=-99)]},
            r"edits\[0\] has the position -99, but 'who sold",
        ),
        ({"edits": [PromptEdit(1, -1, states=torch.ones(7))]}, r"states must be floating-point numbers \[1, 32\]"),
        ({"answers": ["tower", "tower"]}, "the answers 'tower' and 'tower' begin with the same token"),
        ({"answers": "tower"}, "answers must be a list of texts, got 'tower'"),
        ({"answers": [1]}, r"answers must be a list of texts, got \[1\]"),
        ({"answers": ["layer"]}, "the answer 'layer' has the name of a column"),
        ({"answers": [""]}, "the answer '' has no tokens"),
        ({"top": 0}, "top must be a whole number of at least 1"),
        ({"top": 99}, "top must be a whole number of at most 32"),
        ({"tokenizer": object()}, "tokenizer belongs to a model in memory"),
        ({"model": "/no/such/model"}, "/no/such/model"),
    ],
)
def test_bad_arguments_are_refused(folder: Path, arguments: dict[str, Any], message: str) -> None:
    given = {"model": str(folder), "prompt": PROMPT, "edits": [PromptEdit(1, -1, SOURCE)]} | arguments
    with pytest.raises(xprobe.XprobeError, match=message):
        xprobe.patch_prompt(**given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of source, states and seed, got none"),
        ({"source": "x", "seed": 1}, "got source and seed"),
        ({"source": 5}, "source must be"),
        ({"states": [1.0]}, "states must be a Tensor, got list"),
        ({"seed": 2**70}, "seed must be a whole number from 0"),
        ({"source": "x", "source_positions": 1.5}, "source_positions must be a whole number or several, got 1.5"),
        ({"seed": 1, "source_positions": 1}, "source_positions is for a source"),
    ],
)
def test_bad_edits_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PromptEdit(1, -1, **arguments)
