"""What later stages will take: tokens are counted on the run's own prompts, before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.families import save_tiny_model

import xprobe
from xprobe.errors import UsageError
from xprobe.models import loading
from xprobe.qa.prompts import Prompt
from xprobe.stages import cost
from xprobe.stages.cost import Speed, stage_seconds
from xprobe.stages.opening import usable_prompts
from xprobe.stages.pairs import choose_pairs
from xprobe.stages.questions import read_questions

TOKENS_ALONE = Speed(1.0, 0.0, 0.0, 0.0, n_blocks=4, strategy="tree", batch_tokens=4096)
STUDY: dict[str, Any] = {"languages": ("en", "th"), "settings": ("en-x",), "limit": 6}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture(scope="module")
def prompts(tiny: Path) -> list[Prompt]:
    questions = read_questions(xprobe.StudyConfig(model=str(tiny), **STUDY))
    return usable_prompts(questions, loading.load_tokenizer(loading.resolve(str(tiny))), None)


def tokens(prompts: list[Prompt], stage: str, settings: Any, speed: Speed = TOKENS_ALONE) -> float:
    return stage_seconds({stage: settings}, prompts, "logit", 0, speed)[stage]


def test_answers_are_counted_at_their_longest_after_the_prompts(prompts: list[Prompt]) -> None:
    found = tokens(prompts, "answers", xprobe.AnswerSettings(7))
    assert found == pytest.approx(cost.GENERATED * 7 * len(prompts))
    assert tokens(prompts, "answers", xprobe.AnswerSettings(7), replace(TOKENS_ALONE, forward=100.0)) == pytest.approx(
        found + 100
    )
    rows = replace(TOKENS_ALONE, token=0.0, row=2.0)
    assert tokens(prompts, "answers", xprobe.AnswerSettings(7), rows) == 2 * 7 * len(prompts)


def test_relevance_shares_no_prompt_and_follows_its_limit(prompts: list[Prompt]) -> None:
    whole = tokens(prompts, "relevance", xprobe.RelevanceSettings())
    assert whole == pytest.approx(cost.BACKWARD * sum(prompt.length for prompt in prompts))
    first = {prompt.example.question_id: None for prompt in prompts}
    two = sum(prompt.length for prompt in prompts if prompt.example.question_id in list(first)[:2])
    assert tokens(prompts, "relevance", xprobe.RelevanceSettings(limit=2)) == pytest.approx(cost.BACKWARD * two)
    assert tokens(prompts, "relevance", xprobe.RelevanceSettings(limit=99)) == whole


def test_patches_run_what_lies_behind_them(prompts: list[Prompt]) -> None:
    settings = xprobe.PatchSettings(cross=0, controls=0)
    pairs = choose_pairs(prompts, settings, seed=0)
    behind = sum(
        1 + len(pair.given)
        + (own + len(pair.given) if own == pair.other.length - pair.other.spans["question"][1] else 0)
        for pair in pairs
        if (own := pair.own.length - pair.own.spans["question"][1])
    )  # fmt: skip
    assert tokens(prompts, "patching", settings) == pytest.approx(
        cost.PATCHED * behind * 5 / 2
    )  # 0 to 4 of 4 blocks, at five layers
    assert tokens(prompts, "patching", xprobe.PatchSettings()) > tokens(prompts, "patching", settings)


def test_every_lens_is_read_in_one_forward_pass(prompts: list[Prompt]) -> None:
    speed = replace(TOKENS_ALONE, forward=10.0, reading=3.0)
    assert tokens(prompts, "lenses", xprobe.LensesSettings(("regression:a.pt", "jacobian:b.pt")), speed) == 10 + 3 * 3


def test_the_oracle_counts_what_its_own_forecast_counts(tiny: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    study = xprobe.run(str(tiny), out=tmp_path / "run", probes=(), setting="en-x", languages=("en", "th"), limit=6)
    study = xprobe.evaluate(study, xprobe.AnswerSettings(4))
    for settings in (xprobe.OracleSettings(spans=False), xprobe.OracleSettings(limit=2, without_question=False)):
        known = xprobe.forecast_oracle(study, settings).tokens
        assert tokens(prompts, "oracle", settings) == pytest.approx(
            cost.REMOVED * known, rel=0.4
        )  # answers have other lengths
    assert tokens(prompts, "oracle", xprobe.OracleSettings()) > 3 * tokens(
        prompts, "oracle", xprobe.OracleSettings(spans=False)
    )


def test_a_stage_that_cannot_be_counted_is_left_out(prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any) -> float:
        raise UsageError("needs the package uniseg")

    monkeypatch.setitem(cost._SECONDS, "oracle", missing)
    stages = {"oracle": xprobe.OracleSettings(), "answers": xprobe.AnswerSettings(3)}
    assert list(stage_seconds(stages, prompts, "logit", 0, TOKENS_ALONE)) == ["answers"]
