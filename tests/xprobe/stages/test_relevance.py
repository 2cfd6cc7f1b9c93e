"""The stage "relevance": planted depths, agreement with the runner, and what a killed process keeps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.planted_retrieval import reading_model, retrieval_set
from transformers import AutoModelForCausalLM, AutoTokenizer

import xprobe
from xprobe.attribution.relevance import relevance
from xprobe.attribution.settings import GROUPS, RELEVANCE_COLUMNS, RELEVANCE_LAYER_COLUMNS, RULES
from xprobe.errors import UsageError
from xprobe.events import Step
from xprobe.models.anatomy import inspect
from xprobe.phases.depth import major_relevance_depth, relevance_shares
from xprobe.qa.prompts import build_prompts
from xprobe.stages.questions import read_questions
from xprobe.stages.relevance import LINES, token_groups

OPTIONS: dict[str, Any] = {"languages": ("en", "de"), "limit": 4, "bootstrap": 20, "permutations": 20, "probes": ()}


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("relevance") / "run"
    xprobe.run(str(tiny), setting=("en-x", "x-x"), out=out, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def attributed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = shutil.copytree(finished, tmp_path_factory.mktemp("attributed") / "run")
    xprobe.attribute(out)
    return out


def copied(folder: Path, place: Path) -> Path:
    return shutil.copytree(folder, place / "run")


def steps_of(events: list[Any]) -> list[Step]:
    return [event for event in events if isinstance(event, Step)]


@pytest.mark.parametrize(("question_block", "answer_block"), [(2, 6), (3, 9), (7, 4)])
def test_planted_depths_are_found(tmp_path: Path, question_block: int, answer_block: int) -> None:
    """A block reads words: they matter up to its input, the layer before it, and at no later layer."""
    model = reading_model(tmp_path / "model", question_block, answer_block)
    data = retrieval_set(tmp_path / "data", ("en",), paragraphs=3)
    options = {**OPTIONS, "limit": None, "languages": ("en",), "data": str(data), "template": "plain"}
    study = xprobe.run(str(model), setting="en-x", out=tmp_path / "run", **options).attribute()
    table = study.relevance.set_index(["question_id", "group"])
    found = study.manifest.stages["relevance"].results["settings"]["en-x"]
    assert found["mrd"]["question"]["value"] == question_block - 1
    assert found["mrd"]["answer"]["value"] == answer_block - 1
    assert found["gap"]["value"] == answer_block - question_block
    assert set(table.xs("question", level="group")["mrd"]) == {question_block - 1.0}
    curves = study.table("relevance_by_layer.parquet").query("language == 'all'").set_index(["group", "layer"])["value"]
    assert curves["question"][question_block - 1] > 0.01
    assert curves["question"][question_block] == pytest.approx(0, abs=1e-6)
    assert curves["answer"][answer_block] == pytest.approx(0, abs=1e-6)
    assert found["conservation"]["median"] == pytest.approx([1.0] * len(found["conservation"]["median"]), abs=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_tables_hold_what_the_runner_computes(tiny: Path, finished: Path, tmp_path: Path, rule: str) -> None:
    study = xprobe.attribute(copied(finished, tmp_path), xprobe.RelevanceSettings(rule=rule, limit=2))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    questions = read_questions(study.manifest.study)
    prompts, _ = build_prompts(questions.examples, tokenizer, questions.template, None)
    table = study.relevance.set_index(["setting", "language", "question_id", "group"])
    assert tuple(study.relevance.columns) == RELEVANCE_COLUMNS
    curves = study.table("relevance_by_layer.parquet")
    assert tuple(curves.columns) == RELEVANCE_LAYER_COLUMNS
    chosen = [
        prompt for prompt in prompts
        if (prompt.example.setting, prompt.example.language, prompt.example.question_id, "question") in table.index
    ]  # fmt: skip
    assert len(chosen) == 2 * 2 * 2
    shares = []
    for prompt in chosen:
        (found,) = relevance(model, inspect(model), [(prompt.ids[: prompt.length], prompt.targets)], rule)
        values, groups = found.values.double().numpy(), token_groups(prompt)
        assert len(groups) == values.shape[1]
        key = (prompt.example.setting, prompt.example.language, prompt.example.question_id)
        row = table.loc[(*key, "question")]
        members = slice(*prompt.spans["question"])
        weights = np.abs(values[1:, members]).sum(0)
        depths = major_relevance_depth(values)[members]
        assert row["tokens"] == len(depths)
        assert row["mrd"] == pytest.approx((depths * weights).sum() / weights.sum(), rel=1e-3)
        assert row["attributed"] == "logit"
        assert row["y"] == pytest.approx(found.attributed, rel=1e-3, abs=1e-4)
        if key[0] == "en-x":
            shares.append(relevance_shares(values, groups, len(GROUPS))[:, 0])
    own = curves.query("setting == 'en-x' and language == 'all' and group == 'question'")
    assert own["value"].to_numpy() == pytest.approx(np.mean(shares, 0), abs=1e-3)


def test_a_second_call_needs_no_model_and_rules_are_kept_apart(
    attributed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(attributed, tmp_path)
    before = xprobe.load_study(out).relevance
    other = xprobe.attribute(out, xprobe.RelevanceSettings(rule="gradient")).relevance
    assert set(other["rule"]) == {"gradient"}
    monkeypatch.setattr("xprobe.evaluation._open_model", lambda *arguments: pytest.fail("the model was opened"))
    pd.testing.assert_frame_equal(xprobe.attribute(out).relevance, before)
    few = xprobe.attribute(out, xprobe.RelevanceSettings(limit=1))
    assert few.relevance["question_id"].nunique() == 1
    assert few.manifest.stages["relevance"].results["limit"] == 1


def test_a_killed_attribution_goes_on_and_gives_the_same_tables(
    finished: Path, attributed: Path, tmp_path: Path
) -> None:
    out = copied(finished, tmp_path)
    code = (
        "import sys, time, xprobe\n"
        "from xprobe.events import Step\n"
        "import xprobe.stages.relevance as stage\n"
        "stage.WRITTEN = 3\n"
        "def slow(event):\n"
        "    if isinstance(event, Step) and event.done: print(event.done, flush=True); time.sleep(60)\n"
        "xprobe.attribute(sys.argv[1], progress=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stdout.readline() == b"3\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    events: list[Any] = []
    study = xprobe.attribute(out, progress=events.append)
    assert steps_of(events)[0].done == 3
    assert steps_of(events)[-1].done == 16
    whole = xprobe.load_study(attributed).relevance
    exact = ["setting", "language", "question_id", "group", "tokens"]
    pd.testing.assert_frame_equal(study.relevance[exact], whole[exact])
    pd.testing.assert_frame_equal(study.relevance, whole, rtol=1e-3)
    assert len((out / LINES).read_text().splitlines()) == 16


def test_each_depth_is_weighted_by_the_relevance_that_it_counts() -> None:
    """A token whose positive part is rounding has a positive depth of rounding: it must not count."""
    from xprobe.attribution.relevance import Relevance
    from xprobe.qa.prompts import Prompt
    from xprobe.qa.records import Example
    from xprobe.stages.relevance import _line

    example = Example("en-x", "en", "q1", "p1", "en", "Ada sold 40", "How many", "40", 9)
    prompt = Prompt(example, (1, 2, 3), 2, {"question": (0, 2), "context": (0, 0), "answer_in_context": (0, 0)})
    values = torch.tensor([[8.0, 0.0], [-5.0, 0.0], [-5.0, 1.0], [0.0, 0.0], [1e-9, 0.0]])
    found = _line(prompt, Relevance(values, 1.0))["groups"]["question"]
    assert found["mrd_positive"] == pytest.approx(2.0, abs=1e-6)
    assert found["mrd"] == pytest.approx((2 * 10 + 2 * 1) / 11)
    assert found["mrd_with_embeddings"] == pytest.approx((2 * 18 + 2 * 1) / 19)


def test_characters_of_several_tokens_are_readable() -> None:
    from xprobe.stages.relevance import readable_tokens

    pieces = [b" a", "\u95ee".encode()[:1], "\u95ee".encode()[1:], b"?", b"\xff", b"b"]

    class Bytes:
        def decode(self, ids: list[int], **options: Any) -> str:
            return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")

    assert readable_tokens(Bytes(), list(range(6))) == [" a", "\u95ee", "+", "?", "\ufffd", "b"]


def test_shares_of_all_groups_sum_to_one(attributed: Path) -> None:
    curves = xprobe.load_study(attributed).table("relevance_by_layer.parquet")
    sums = curves.groupby(["setting", "language", "layer"])["value"].sum()
    assert sums.to_numpy() == pytest.approx(1.0, abs=1e-5)


def test_one_example_is_shown_token_by_token(attributed: Path) -> None:
    study = xprobe.load_study(attributed)
    row = study.relevance.iloc[0]
    name = f"{row['setting']}/{row['language']}/{row['question_id']}"
    found = xprobe.attribute_example(attributed, name)
    assert found.values.shape == (study.manifest.model.n_blocks + 1, len(found.tokens))
    assert found.conserved.tolist() == pytest.approx([1.0] * len(found.conserved), abs=1e-3)
    assert found.groups.count("question") == study.relevance.query("group == 'question'").iloc[0]["tokens"]
    with pytest.raises(UsageError, match=r"has no example 'en-x/xx/q'; the first is en-x/"):
        xprobe.attribute_example(attributed, "en-x/xx/q")


def test_a_model_in_memory_is_attributed_without_dropout_and_left_in_training(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    options = {**OPTIONS, "languages": ("en",), "limit": 2}
    study = xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "run", **options)
    row = study.examples.iloc[0]
    name = f"{row['setting']}/{row['language']}/{row['question_id']}"
    still = xprobe.attribute_example(study, name, model=model.eval(), tokenizer=tokenizer)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    found = xprobe.attribute_example(study, name, model=model.train(), tokenizer=tokenizer)
    assert np.array_equal(found.values, still.values)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": "cp"}, "settings must be a RelevanceSettings, got 'cp'"),
        ({"backend_": 1}, "unknown option 'backend_'"),
        ({"rule": 1}, r"rule is a field of RelevanceSettings: pass xprobe.RelevanceSettings\(rule=...\) as settings"),
        ({"stream": True}, "a streamed model cannot be attributed"),
    ],
)
def test_bad_arguments_are_refused(finished: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    out = copied(finished, tmp_path)
    with pytest.raises(UsageError, match=message):
        xprobe.attribute(out, **arguments)
    assert not (out / LINES).exists()
    with pytest.raises(UsageError, match=r"has no relevance: xprobe\.attribute\("):
        _ = xprobe.load_study(out).relevance
