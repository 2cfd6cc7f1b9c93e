"""The stage "answers": it generates as the model does, keeps every line, scores without the model, survives a kill."""

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
from support.families import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import xprobe
from xprobe.errors import UsageError
from xprobe.events import Note, Step
from xprobe.qa.prompts import build_prompts
from xprobe.qa.stopping import stop_tokens
from xprobe.qa.templates import load_template
from xprobe.scoring.settings import ANSWER_COLUMNS
from xprobe.stages.generation import LINES
from xprobe.stages.questions import read_questions

OPTIONS: dict[str, Any] = {
    "languages": ("en", "de", "th"),
    "limit": 6,
    "bootstrap": 20,
    "permutations": 20,
    "probes": (),
}
SHORT = xprobe.AnswerSettings(max_new_tokens=6)


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "run"
    xprobe.run(str(tiny), setting=("en-x", "x-x"), out=out, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def evaluated(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "run")
    xprobe.evaluate(out, SHORT)
    return out


def copied(folder: Path, place: Path) -> Path:
    return shutil.copytree(folder, place / "run")


def test_answers_are_those_of_the_models_own_generate(tiny: Path, evaluated: Path) -> None:
    study = xprobe.load_study(evaluated)
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    questions = read_questions(study.manifest.study)
    prompts, _ = build_prompts(questions.examples, tokenizer, questions.template, None)
    stop = stop_tokens(tokenizer, questions.template, model.generation_config)
    table = study.answers.set_index(["setting", "language", "question_id"])
    assert len(table) == len(prompts)
    for prompt in prompts[::5]:
        ids = list(prompt.ids[: prompt.length])
        new: list[int] = []
        total = 0.0
        while len(new) < 6:
            with torch.inference_mode():
                values = model(torch.tensor([[*ids, *new]])).logits[0, -1].log_softmax(-1)
            token = int(values.argmax())
            if token in stop:
                break
            new.append(token)
            total += float(values[token])
        row = table.loc[(prompt.example.setting, prompt.example.language, prompt.example.question_id)]
        assert row["answer"] == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert row["log_probability"] == pytest.approx(total, abs=1e-3)
        assert row["tokens"] == len(new)


def test_the_log_probability_of_the_gold_answer_is_that_of_teacher_forcing(tiny: Path, evaluated: Path) -> None:
    study = xprobe.load_study(evaluated)
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    questions = read_questions(study.manifest.study)
    (prompt,), _ = build_prompts(questions.examples[-1:], tokenizer, questions.template, None)
    with torch.inference_mode():
        values = model(torch.tensor([prompt.ids])).logits[0].log_softmax(-1)
    expected = sum(float(values[p, t]) for p, t in zip(prompt.answer_positions, prompt.targets, strict=True))
    table = study.answers.set_index(["setting", "language", "question_id"])
    row = table.loc[(prompt.example.setting, prompt.example.language, prompt.example.question_id)]
    assert row["gold_log_probability"] == pytest.approx(expected, abs=1e-3)


def test_the_table_and_the_manifest_hold_what_is_promised(evaluated: Path) -> None:
    study = xprobe.load_study(evaluated)
    assert tuple(study.answers.columns) == ANSWER_COLUMNS
    assert set(study.answers["normaliser"]) == {"xprobe"}
    entry = study.manifest.stages["answers"]
    assert entry.results["max_new_tokens"] == 6
    assert entry.results["threshold"] == 0.5
    assert set(entry.results["settings"]) == {"en-x", "x-x"}
    assert set(entry.results["settings"]["x-x"]["languages"]) == {"en", "de", "th"}
    assert entry.executions[0].strategy == "tree"
    assert set(entry.results["settings"]["en-x"]["correlations"]) == {
        *("onset", "sharpness", "late_readiness", "gold_log_probability")
    }
    curves = study.table("answers_by_layer.parquet")
    layers = study.manifest.model.n_blocks + 1
    assert len(curves) == 2 * layers * 3 * 2  # settings, layers, signals, outcomes
    both = curves.query("setting == 'x-x' and signal == 'readiness' and layer == 2")
    assert both["n"].sum() == (study.answers["setting"] == "x-x").sum()
    weighted = (both["value"].fillna(0) * both["n"]).sum() / both["n"].sum()
    whole = study.layers.query("setting == 'x-x' and signal == 'readiness' and layer == 2 and language == 'all'")
    assert weighted == pytest.approx(float(whole["value"].iloc[0]))
    mean = study.answers.query("setting == 'en-x'")["f1"].mean()
    assert entry.results["settings"]["en-x"]["f1"]["value"] == pytest.approx(mean)


def test_another_normaliser_scores_the_same_answers_without_the_model(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(evaluated, tmp_path)
    before = xprobe.load_study(out)
    table = before.answers
    monkeypatch.setattr("xprobe.evaluation._open_model", lambda *arguments: pytest.fail("the model was opened"))
    notes: list[Any] = []
    after = xprobe.evaluate(
        before, xprobe.AnswerSettings(max_new_tokens=6, normaliser="squad", threshold=0.3), progress=notes.append
    )
    assert after.answers["answer"].equals(table["answer"])
    assert set(after.answers["normaliser"]) == {"squad"}
    assert after.manifest.stages["answers"].results["threshold"] == 0.3
    assert after.manifest.stages["answers"].executions == before.manifest.stages["answers"].executions
    assert any(isinstance(note, Note) and LINES in str(note) for note in notes)
    again = xprobe.evaluate(out, SHORT)
    pd.testing.assert_frame_equal(again.answers, table)


def test_only_missing_or_damaged_lines_are_generated_again(evaluated: Path, tmp_path: Path) -> None:
    out = copied(evaluated, tmp_path)
    lines = (out / LINES).read_text().splitlines()
    damaged = lines[1].replace('"stopped": false', '"stopped": true', 1).replace('"tokens": 6', '"tokens": 5', 1)
    assert damaged != lines[1]
    (out / LINES).write_text("\n".join([lines[0], damaged, *lines[2:-1], lines[-1][:40]]))
    steps: list[Step] = []
    xprobe.evaluate(out, SHORT, progress=lambda event: steps.append(event) if isinstance(event, Step) else None)
    total = len(xprobe.load_study(out).answers)
    lost = [len(json.loads(lines[place])["answers"]) for place in (1, -1)]
    assert steps[0].done == total - sum(lost)
    assert steps[-1].done == steps[-1].total == total
    assert (out / LINES).read_text().splitlines() == lines
    pd.testing.assert_frame_equal(xprobe.load_study(out).answers, xprobe.load_study(evaluated).answers)


def test_another_number_of_tokens_makes_other_answers_beside_the_first(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(evaluated, tmp_path)
    study = xprobe.load_study(out).evaluate(xprobe.AnswerSettings(max_new_tokens=2))
    assert study.answers["tokens"].max() <= 2
    assert len((out / LINES).read_text().splitlines()) == 2 * len(study.manifest.groups)
    monkeypatch.setattr("xprobe.evaluation._open_model", lambda *arguments: pytest.fail("the model was opened"))
    again = xprobe.evaluate(out, SHORT)  # the longer answers are still there
    pd.testing.assert_frame_equal(again.answers, xprobe.load_study(evaluated).answers)


def test_a_killed_evaluation_goes_on_and_gives_the_same_tables(finished: Path, evaluated: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    code = (
        "import sys, time, xprobe\n"
        "from xprobe.events import Step\n"
        "def slow(event):\n"
        "    if isinstance(event, Step) and event.done: print(event.done, flush=True); time.sleep(60)\n"
        "xprobe.evaluate(sys.argv[1], xprobe.AnswerSettings(max_new_tokens=6), progress=slow, batch_tokens=700)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None
    kept = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps: list[Step] = []
    study = xprobe.evaluate(
        out, SHORT, batch_tokens=700, progress=lambda event: steps.append(event) if isinstance(event, Step) else None
    )
    assert 0 < kept < steps[-1].total
    assert steps[0].done == kept
    table = study.answers
    exact = [name for name in ANSWER_COLUMNS if name != "log_probability"]
    pd.testing.assert_frame_equal(table[exact], xprobe.load_study(evaluated).answers[exact])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": "squad"}, "settings must be an AnswerSettings, got 'squad'"),
        ({"backend_": 1}, "unknown option 'backend_'"),
        (
            {"max_new_tokens": 1},
            r"max_new_tokens is a field of AnswerSettings: pass xprobe.AnswerSettings\(max_new_tokens=...\) as",
        ),
        ({"stream": True}, "a streamed model cannot generate answers"),
        ({"settings": xprobe.AnswerSettings(normaliser="mlqa")}, "'mlqa' is defined for .* not for 'th'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    finished: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    out = copied(finished, tmp_path)
    with pytest.raises(UsageError, match=message):
        xprobe.evaluate(out, **arguments)
    assert not (out / LINES).exists()
    with pytest.raises(UsageError, match=r"has no answers: xprobe.evaluate\("):
        _ = xprobe.load_study(out).answers


def test_another_model_at_the_runs_place_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    xprobe.run(str(model), out=tmp_path / "run", **{**OPTIONS, "languages": ("en",), "limit": 2})
    shutil.rmtree(model)
    save_tiny_model(tmp_path / "model", seed=1)
    with pytest.raises(UsageError, match=r"cannot add to the run in .*: model .* has other bytes"):
        xprobe.evaluate(tmp_path / "run", SHORT)
    shutil.rmtree(model)
    with pytest.raises(UsageError, match="no model lies at"):
        xprobe.evaluate(tmp_path / "run", SHORT)


def test_a_model_in_memory_is_passed_again(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    options = {**OPTIONS, "languages": ("en",), "limit": 2}
    study = xprobe.run(model, tokenizer=tokenizer, out=tmp_path / "run", **options)
    with pytest.raises(UsageError, match=r"made with a model in memory: pass it \(model=, tokenizer=\)"):
        xprobe.evaluate(study, SHORT)
    assert len(xprobe.evaluate(study, SHORT, model=model, tokenizer=tokenizer).answers) == 2


def test_plain_prompts_end_at_a_line_break_and_chats_at_the_end_of_a_turn(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    stops = stop_tokens(tokenizer, load_template("plain"))
    assert tokenizer.eos_token_id in stops
    assert {"\n" in tokenizer.decode([token]) for token in stops - {tokenizer.eos_token_id}} == {True}
    assert all(token in stops for token in range(len(tokenizer)) if "\n" in tokenizer.decode([token]))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ends = stop_tokens(tokenizer, load_template("auto"))
    assert ends == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
