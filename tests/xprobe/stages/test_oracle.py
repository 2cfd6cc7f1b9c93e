"""The stage "oracle": it finds planted evidence, its drops are those of the model, and it survives a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from support.planted_retrieval import GOLD, NONSENSE, retrieval_model, retrieval_set
from transformers import AutoModelForCausalLM, AutoTokenizer

import xprobe
from xprobe.errors import UsageError
from xprobe.events import Note, Step
from xprobe.qa.prompts import build_prompts
from xprobe.scoring.settings import ORACLE_COLUMNS
from xprobe.stages.evidence import LINES
from xprobe.stages.questions import read_questions

OPTIONS: dict[str, Any] = {
    "languages": ("en", "de"),
    "limit": 4,
    "bootstrap": 20,
    "permutations": 20,
    "probes": (),
}
SHORT = xprobe.AnswerSettings(max_new_tokens=4)


@pytest.fixture(scope="module")
def evaluated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("oracle") / "run"
    xprobe.run(str(tiny), setting=("en-x", "x-x"), out=out, **OPTIONS)
    xprobe.evaluate(out, SHORT)
    return out


@pytest.fixture(scope="module")
def found(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = shutil.copytree(evaluated, tmp_path_factory.mktemp("found") / "run")
    xprobe.oracle(out)
    return out


def copied(folder: Path, place: Path) -> Path:
    return shutil.copytree(folder, place / "run")


def steps_of(events: list[Any]) -> list[Step]:
    return [event for event in events if isinstance(event, Step) and event.stage == "oracle"]


# -- planted models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["retrieves", "does not retrieve"])
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, xprobe.Study]:
    folder = tmp_path_factory.mktemp("planted")
    model = retrieval_model(folder / "model", retrieves=request.param)
    data = retrieval_set(folder / "data")
    options = {**OPTIONS, "limit": None, "data": str(data), "template": "plain"}
    study = xprobe.run(str(model), setting=("en-x", "x-x"), out=folder / "run", **options)
    xprobe.evaluate(study, SHORT)
    return request.param, xprobe.oracle(study)


def test_a_model_that_retrieves_and_says_nonsense_has_an_oracle_of_1(planted: tuple[bool, xprobe.Study]) -> None:
    retrieves, study = planted
    assert set(study.answers["answer"]) == {" ".join([NONSENSE] * 4)}
    assert study.answers["f1"].max() == 0
    own = study.oracle.query("target == 'own' and question")
    summary = study.manifest.stages["oracle"].results["settings"]["x-x"]
    assert len(own) == 2 * 2 * 12
    if retrieves:
        assert set(own["evidence"]) == {" ".join(GOLD)}
        assert own["f1"].min() == 1
        assert own["sentence_hit"].all()
        assert summary["own"]["f1"] == {"value": 1.0, "lo": 1.0, "hi": 1.0}
        assert summary["oracle_minus_f1"]["value"] == 1
    else:
        assert own["f1"].mean() <= own["chance_f1"].mean() + 0.1
        assert summary["own"]["f1"]["value"] == pytest.approx(own.query("setting == 'x-x'")["f1"].mean())
        assert summary["own"]["sentence_hit"]["value"] < 0.7
    assert summary["own"]["random_f1"]["value"] < 0.2
    assert summary["random_sentence"]["value"] == pytest.approx(1 / 3)


def test_evidence_that_does_not_depend_on_the_question_shows_in_the_control(planted: tuple[bool, xprobe.Study]) -> None:
    """Neither model reads the question."""
    retrieves, study = planted
    without = study.oracle.query("target == 'own' and not question")
    summary = study.manifest.stages["oracle"].results["settings"]["en-x"]["own"]
    if retrieves:
        assert set(without["evidence"]) == {" ".join(GOLD)}
        assert summary["f1_without_question"]["value"] == 1
    else:
        assert without["f1"].mean() <= without["chance_f1"].mean() + 0.1


# -- a tiny random model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [True, False])
@pytest.mark.parametrize("removal", ["delete", "replace"])
def test_drops_are_those_of_the_model(
    tiny: Path, evaluated: Path, tmp_path: Path, removal: str, question: bool
) -> None:
    out = copied(evaluated, tmp_path)
    study = xprobe.oracle(out, xprobe.OracleSettings(removal=removal, limit=1))
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    questions = read_questions(study.manifest.study)
    prompts, _ = build_prompts(questions.examples, tokenizer, questions.template, None)
    table = study.oracle.query("target == 'gold' and question == @question")
    for row in table.iloc[:3].itertuples():
        prompt = next(
            one for one in prompts
            if (one.example.setting, one.example.language, one.example.question_id)
            == (row.setting, row.language, row.question_id)
        )  # fmt: skip
        first = prompt.spans["context"][0]
        hidden = {
            first + i
            for i, (start, stop) in enumerate(prompt.context_offsets)
            if start < row.stop and stop > row.start and start < stop
        }
        asked = set() if question else set(range(*prompt.spans["question"]))
        kept = [(i, token) for i, token in enumerate(prompt.ids[: prompt.length]) if i not in asked]
        whole = [token for _, token in kept]
        if removal == "delete":
            without = [token for i, token in kept if i not in hidden]
        else:
            filler = tokenizer.encode("_", add_special_tokens=False)[-1]
            without = [filler if i in hidden else token for i, token in kept]
        values = []
        for ids in (whole, without):
            with torch.inference_mode():
                logits = model(torch.tensor([[*ids, *prompt.targets]])).logits[0].double().log_softmax(-1)
            values.append(sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(prompt.targets)))
        assert row.log_probability == pytest.approx(values[0], abs=1e-3)
        assert row.drop == pytest.approx(values[0] - values[1], abs=1e-3)
        assert prompt.example.context[row.start : row.stop] == row.evidence


def test_the_table_and_the_manifest_hold_what_is_promised(found: Path) -> None:
    study = xprobe.load_study(found)
    table = study.oracle
    assert tuple(table.columns) == ORACLE_COLUMNS
    assert len(table) == len(study.answers) * 2 * 2
    entry = study.manifest.stages["oracle"]
    assert entry.results["definition"] == 1
    assert entry.executions[0].strategy == "tree"
    summary = entry.results["settings"]["en-x"]
    rows = table.query("setting == 'en-x' and target == 'gold' and question")
    assert summary["gold"]["f1"]["value"] == pytest.approx(rows["f1"].mean())
    assert summary["languages"]["de"]["n"] == 4
    answers = study.answers.query("setting == 'en-x'")["f1"].mean()
    assert summary["answer_f1"]["value"] == pytest.approx(answers)
    assert summary["oracle_minus_f1"]["value"] == pytest.approx(summary["own"]["f1"]["value"] - answers)
    line = json.loads((found / LINES).read_text().splitlines()[0])
    assert line["searches"][0]["drops"]
    assert "step" not in (found / LINES).read_text()[:2000]


def test_another_normaliser_needs_no_model(found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = copied(found, tmp_path)
    before = xprobe.load_study(out).oracle
    monkeypatch.setattr("xprobe.evaluation._open_model", lambda *arguments: pytest.fail("the model was opened"))
    after = xprobe.oracle(out, xprobe.OracleSettings(normaliser="squad"))
    assert after.oracle["evidence"].equals(before["evidence"])
    assert set(after.oracle["normaliser"]) == {"squad"}


def test_a_larger_limit_keeps_what_was_found(evaluated: Path, found: Path, tmp_path: Path) -> None:
    out = copied(evaluated, tmp_path)
    few = xprobe.oracle(out, xprobe.OracleSettings(limit=2)).oracle
    assert few["question_id"].nunique() == 2
    events: list[Any] = []
    xprobe.oracle(out, progress=events.append)
    steps = steps_of(events)
    assert steps[0].done == len(few) // 4
    assert steps[-1].done == steps[-1].total == 16
    exact = ["setting", "language", "question_id", "target", "question", "evidence", "f1", "sentence"]
    pd.testing.assert_frame_equal(xprobe.load_study(out).oracle[exact], xprobe.load_study(found).oracle[exact])


def test_an_oracle_of_other_answers_is_removed(found: Path, tmp_path: Path) -> None:
    out = shutil.copytree(found, tmp_path / "copy")
    events: list[Any] = []
    tokens = xprobe.load_study(out).manifest.stages["answers"].results["max_new_tokens"]
    same = xprobe.evaluate(out, xprobe.AnswerSettings(tokens, normaliser="squad"), progress=events.append)
    assert "oracle" in same.manifest.stages  # the answers are the same
    other = xprobe.evaluate(out, xprobe.AnswerSettings(max_new_tokens=2), progress=events.append)
    assert "oracle" not in other.manifest.stages
    assert not (out / "oracle.parquet").exists()
    assert any("the stage 'oracle' was computed for other answers: compute it again" in str(event) for event in events)


def test_sentences_alone_cost_less_and_are_kept_apart(found: Path, tmp_path: Path) -> None:
    out = copied(found, tmp_path)
    whole = xprobe.forecast_oracle(out)
    part = xprobe.forecast_oracle(out, xprobe.OracleSettings(spans=False))
    assert part.removals < whole.removals / 4
    study = xprobe.oracle(out, xprobe.OracleSettings(spans=False, without_question=False))
    assert study.oracle["question"].all()
    context = json.loads((out / LINES).read_text().splitlines()[0])["context"]
    assert study.oracle["evidence"].iloc[0] in context
    assert study.oracle["evidence"].str.len().min() > 20
    again = xprobe.oracle(out)  # the spans are still there
    pd.testing.assert_frame_equal(again.oracle, xprobe.load_study(found).oracle)


def test_a_forecast_comes_first_and_is_near_what_is_run(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(evaluated, tmp_path)
    forecast = xprobe.forecast_oracle(out)
    assert not (out / LINES).exists()
    from xprobe.capture.engine import Engine

    texts: list[Any] = []
    measure = Engine.log_probabilities
    monkeypatch.setattr(
        Engine, "log_probabilities", lambda self, some, *rest: texts.extend(some) or measure(self, some, *rest)
    )
    events: list[Any] = []
    xprobe.oracle(out, progress=events.append)
    notes = [event for event in events if isinstance(event, Note) and str(event).startswith("the oracle: 16 answers")]
    assert len(notes) == 1
    assert notes[0].important
    assert events.index(notes[0]) < events.index(steps_of(events)[0])
    assert forecast.examples == 16
    assert forecast.removals == pytest.approx(len(texts), rel=0.25)
    assert forecast.tokens > forecast.states_tokens > 0
    assert forecast.to_dict()["seconds"] > 0


def test_a_killed_search_goes_on_and_gives_the_same_tables(evaluated: Path, found: Path, tmp_path: Path) -> None:
    out = copied(evaluated, tmp_path)
    code = (
        "import sys, time, xprobe\n"
        "from xprobe.capture.engine import Engine\n"
        "measure, calls = Engine.log_probabilities, []\n"
        "def slow(self, texts, *rest):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 4: print('ready', flush=True); time.sleep(60)\n"
        "    return measure(self, texts, *rest)\n"
        "Engine.log_probabilities = slow\n"
        "xprobe.oracle(sys.argv[1], batch_tokens=512)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [json.loads(line) for line in (out / LINES).read_text().splitlines()]
    assert any("step" in line for line in kept)
    events: list[Any] = []
    study = xprobe.oracle(out, batch_tokens=512, progress=events.append)
    assert steps_of(events)[0].done == sum("step" not in line for line in kept) > 0
    whole = xprobe.oracle(copied(evaluated, tmp_path / "whole"), batch_tokens=512)
    pd.testing.assert_frame_equal(study.oracle, whole.oracle)
    assert (out / LINES).read_text() == (whole.path / LINES).read_text()


def test_answers_are_generated_first_where_the_run_has_none(tiny: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "languages": ("en",), "limit": 2}
    study = xprobe.run(str(tiny), out=tmp_path / "run", **options)
    with pytest.raises(UsageError, match=r"has no oracle: xprobe.oracle\("):
        _ = study.oracle
    with pytest.raises(UsageError, match=r"has no answers yet: xprobe\.evaluate"):
        xprobe.forecast_oracle(study)
    after = xprobe.oracle(study, xprobe.OracleSettings(spans=False))
    assert len(after.answers) == 2
    assert len(after.oracle) == 8


def test_a_stop_between_answers_and_searches_keeps_the_answers(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model is loaded once for both."""
    from xprobe.capture.engine import Engine
    from xprobe.models import loading

    options = {**OPTIONS, "languages": ("en",), "limit": 2}
    study = xprobe.run(str(tiny), out=tmp_path / "run", **options)
    loads: list[Any] = []
    load = loading.load
    monkeypatch.setattr(loading, "load", lambda *given, **named: loads.append(1) or load(*given, **named))
    with monkeypatch.context() as patch:

        def stop(self: Any, texts: Any, *rest: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(Engine, "log_probabilities", stop)
        with pytest.raises(KeyboardInterrupt):
            xprobe.oracle(study, xprobe.OracleSettings(spans=False))
    assert len(loads) == 1
    assert len(xprobe.load_study(study.path).answers) == 2
    assert len(xprobe.oracle(study, xprobe.OracleSettings(spans=False)).oracle) == 8


def test_steps_of_other_settings_stay_when_a_search_ends(evaluated: Path, tmp_path: Path) -> None:
    from xprobe.runs.lines import append_lines

    out = copied(evaluated, tmp_path)
    append_lines(out / LINES, [{"key": "of other settings", "step": "s", "values": [1.0]}])
    xprobe.oracle(out, xprobe.OracleSettings(limit=1, spans=False))
    lines = [json.loads(line) for line in (out / LINES).read_text().splitlines()]
    assert [line["key"] for line in lines if "step" in line] == ["of other settings"]


def test_an_answer_without_tokens_hangs_on_nothing(evaluated: Path, tmp_path: Path) -> None:
    from xprobe.runs.lines import read_lines, rewrite_lines
    from xprobe.stages.generation import LINES as ANSWER_LINES

    out = copied(evaluated, tmp_path)
    lines = read_lines(out / ANSWER_LINES)
    lines[0]["answers"][0] |= {"ids": [], "answer": "", "tokens": 0, "stopped": True}
    rewrite_lines(out / ANSWER_LINES, lines)
    table = xprobe.oracle(out, xprobe.OracleSettings(limit=4)).oracle
    blank = table[(table["target"] == "own") & (table["evidence"] == "")]
    assert len(blank) == 2  # with and without the question
    assert set(blank["f1"]) == {0.0}
    assert blank["drop"].isna().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": "delete"}, "settings must be an OracleSettings, got 'delete'"),
        ({"backend_": 1}, "unknown option 'backend_'"),
        (
            {"removal": 1},
            r"removal is a field of OracleSettings: pass xprobe.OracleSettings\(removal=...\) as settings",
        ),
        ({"stream": True}, "a streamed model cannot be searched for evidence"),
        ({"settings": xprobe.OracleSettings(normaliser="mlqa"), "device": "cuda:77"}, "cuda:77"),
    ],
)
def test_bad_arguments_are_refused(evaluated: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    out = copied(evaluated, tmp_path)
    with pytest.raises(UsageError, match=message):
        xprobe.oracle(out, **arguments)
    assert not (out / LINES).exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("limit", 0, "limit must be a whole number of at least 1, got 0"),
        ("spans", "no", "spans must be True or False, got 'no'"),
        ("normaliser", "bleu", "unknown normaliser 'bleu'"),
        ("removal", "mask", "unknown removal 'mask'; known: delete, replace"),
    ],
)
def test_bad_settings_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        xprobe.OracleSettings(**{field: value})
