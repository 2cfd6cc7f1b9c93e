"""The stage "patching": planted boundaries, agreement with patches by hand, and what a killed process keeps."""

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
from support.families import save_tiny_model
from support.planted_causes import causes_model, causes_set
from transformers import AutoModelForCausalLM, AutoTokenizer

import xprobe
from xprobe.capture import edited_tree
from xprobe.capture.edits import random_like
from xprobe.errors import DataError, UsageError
from xprobe.events import Step
from xprobe.models.anatomy import inspect, watch_states
from xprobe.phases.patch_settings import CONTROLS, PATCHES, PATCHING_COLUMNS, PATCHING_LAYER_COLUMNS
from xprobe.qa.prompts import build_prompts
from xprobe.stages.pairs import choose_pairs
from xprobe.stages.patching import LINES
from xprobe.stages.questions import read_questions

OPTIONS: dict[str, Any] = {
    "languages": ("en", "de"), "bootstrap": 50, "permutations": 20, "probes": (), "template": "plain",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patching")
    model = save_tiny_model(folder / "model")
    xprobe.run(str(model), setting=("en-x", "x-x"), limit=12, out=folder / "run", **OPTIONS)
    return folder / "run"


@pytest.fixture(scope="module")
def patched(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = shutil.copytree(finished, tmp_path_factory.mktemp("patched") / "run")
    xprobe.patch(out)
    return out


def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize(("question_block", "answer_block"), [(2, 5), (1, 2), (3, 4)])
def test_planted_causes_are_found(tmp_path: Path, question_block: int, answer_block: int) -> None:
    model = causes_model(tmp_path / "model", question_block, answer_block)
    data = causes_set(tmp_path / "data")
    run = xprobe.run(str(model), data=str(data), setting="en-x", out=tmp_path / "run", **OPTIONS)
    study = run.patch()  # as xprobe.patch(run)
    found = study.manifest.stages["patching"].results["settings"]["en-x"]
    exact = {"value": answer_block, "lo": answer_block, "hi": answer_block}
    for pairs in ("same", "cross"):
        assert found[pairs]["told_apart"] == 1.0
        assert found[pairs]["answer_boundary"] == exact
        assert found[pairs]["gain_boundary"] == exact
        assert found[pairs]["question_boundary"] == dict.fromkeys(("value", "lo", "hi"), question_block)
        assert set(found[pairs]["languages"]) == {"en", "de"}
    assert set(found["cross"]["language_pairs"]) == {"de>en", "en>de"}
    curves = study.table("patching_by_layer.parquet").query("measure == 'effect' and language == 'all'")
    curves = curves.set_index(["pairs", "kind", "layer"])["value"].sort_index()
    layers = np.arange(answer_block + 2)
    for pairs in ("same", "cross"):
        assert curves[pairs, "answer"].to_numpy() == pytest.approx((layers >= answer_block) * 1.0, abs=1e-5)
        assert curves[pairs, "question"].to_numpy() == pytest.approx((layers < question_block) * 1.0, abs=1e-5)
    assert curves["same", "same_question"].to_numpy() == pytest.approx(0 * layers, abs=1e-5)  # one code, two languages


def test_a_model_that_does_not_use_the_question_has_no_boundary(tmp_path: Path) -> None:
    model = causes_model(tmp_path / "model", 2, 4, reads=False)
    data = causes_set(tmp_path / "data")
    study = xprobe.patch(xprobe.run(str(model), data=str(data), setting="en-x", out=tmp_path / "run", **OPTIONS))
    for found in study.manifest.stages["patching"].results["settings"]["en-x"].values():
        assert (found["n"], found["told_apart"], found["contrast"]["value"]) == (0, 0.0, 0.0)
        for name in ("answer_boundary", "gain_boundary", "question_boundary"):
            assert found[name] == {"value": None, "lo": None, "hi": None}
    assert study.table("patching_by_layer.parquet")["value"].isna().all()


def run_by_hand(model: Any, ids: list[int], layer: int, positions: list[int], states: torch.Tensor) -> torch.Tensor:
    """Log-probabilities after the last token of a full forward pass with other states at one layer."""
    blocks = inspect(model).blocks

    def write(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[0, positions] = states
        return hidden

    if layer == 0:
        hook = blocks[0].register_forward_pre_hook(lambda module, args: (write(args[0]), *args[1:]))
    else:
        hook = blocks[layer - 1].register_forward_hook(lambda module, args, output: write(output))
    try:
        with torch.inference_mode():
            return model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)
    finally:
        hook.remove()


def states_by_hand(model: Any, ids: list[int]) -> list[torch.Tensor]:
    states: list[torch.Tensor] = []
    with torch.inference_mode(), watch_states(inspect(model).blocks, lambda layer, hidden: states.append(hidden[0])):
        model(torch.tensor([ids]), use_cache=False)
    return states


def test_the_table_holds_what_plain_hooks_give(patched: Path) -> None:
    study = xprobe.load_study(patched)
    assert tuple(study.patching.columns) == PATCHING_COLUMNS
    assert tuple(study.table("patching_by_layer.parquet").columns) == PATCHING_LAYER_COLUMNS
    name = study.manifest.model.location
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    questions = read_questions(study.manifest.study)
    prompts, _ = build_prompts(questions.examples, tokenizer, questions.template, None)
    by_key = {(p.example.setting, p.example.language, p.example.question_id): p for p in prompts}
    rows = study.patching.dropna()
    seen = set()
    for (kind, _), some in rows.groupby(["kind", "setting"]):
        row = some[some["layer"] == 2].iloc[-1]
        own = by_key[row["setting"], row["language"], row["question_id"]]
        other = by_key[row["setting"], row["other_language"], row["other_question_id"]]
        assert own.example.context == other.example.context
        given = list(own.targets[: row["given"]])
        assert given == list(other.targets[: row["given"]])
        targets = [own.targets[row["given"]], other.targets[row["given"]]]
        assert targets[0] != targets[1]
        ids = [*own.ids[: own.length], *given]
        at = len(ids) - 1
        own_states = states_by_hand(model, ids)[2]
        before = run_by_hand(model, ids, 2, [at], own_states[[at]])
        assert [row["own_before"], row["other_before"]] == pytest.approx(before[targets].tolist(), abs=1e-4)
        if kind == "question":
            tail = len(ids) - own.spans["question"][1]
            theirs = [*other.ids[: other.length], *given]
            places = list(range(len(theirs) - tail, len(theirs)))
            found = run_by_hand(model, theirs, 2, places, own_states[-tail:])
        else:
            if kind == "random":
                pair = next(
                    pair for pair in choose_pairs(prompts, xprobe.PatchSettings(), study.manifest.study.seed)
                    if pair.own is own and pair.other is other
                )  # fmt: skip
                states = random_like(own_states[[at]], pair.controls["random"])
            else:
                source = by_key[row["setting"], row["source_language"], row["source_question_id"]]
                states = states_by_hand(model, [*source.ids[: source.length], *given])[2][[-1]]
            found = run_by_hand(model, ids, 2, [at], states)
        assert [row["own"], row["other"]] == pytest.approx(found[targets].tolist(), abs=1e-4)
        seen.add(kind)
    assert seen == {*PATCHES, *CONTROLS}


def test_ends_of_the_curves_are_exact(patched: Path) -> None:
    """The last state of the last layer is the answer; below all layers the last token is the same for all questions."""
    rows = xprobe.load_study(patched).patching.dropna()
    answer, question = (rows[rows["kind"] == kind] for kind in ("answer", "question"))
    top = rows["layer"].max()
    for own, layer, column in ((answer, 0, "before"), (answer, top, "outright"), (question, 0, "outright"),
                               (question, top, "before")):  # fmt: skip
        some = own[own["layer"] == layer]
        for side in ("own", "other"):
            assert some[side].to_numpy() == pytest.approx(some[f"{side}_{column}"].to_numpy(), abs=1e-4)


def test_pairs_that_the_model_does_not_tell_apart_are_not_patched(
    finished: Path, patched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Curves and summaries are those of a run that patches every pair."""
    rows = xprobe.load_study(patched).patching
    own, outright = (rows[f"other_{name}"] - rows[f"own_{name}"] for name in ("before", "outright"))
    apart = outright > own
    assert 0.2 < apart.mean() < 0.9
    for side in ("own", "other"):
        assert (rows[side].notna() == apart).all()
    out = copied(finished, tmp_path)
    monkeypatch.setattr("xprobe.stages.patching._told_apart", lambda before, outright: True)
    every = xprobe.patch(out)
    assert every.patching.notna().all(axis=None)
    some, every_pair = rows[apart], every.patching[apart]
    pd.testing.assert_frame_equal(some, every_pair, atol=1e-5, rtol=1e-5)
    curves = [study.table("patching_by_layer.parquet") for study in (xprobe.load_study(patched), every)]
    pd.testing.assert_frame_equal(*curves, rtol=1e-3)  # ratios of small differences


def test_only_wanted_patches_are_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    behind = edited_tree._run_behind

    def counting(model: Any, anatomy: Any, requests: Any, some: list[int], *rest: Any) -> None:
        ran.append(len(some))
        behind(model, anatomy, requests, some, *rest)

    monkeypatch.setattr(edited_tree, "_run_behind", counting)
    rows = xprobe.patch(copied(finished, tmp_path)).patching
    top = rows["layer"].max()
    needed = rows["own"].notna() & ((rows["layer"] < top) | (rows["kind"] == "random"))
    check = sum(ran) - int(needed.sum())  # the check of edits on the tree runs a few
    assert 0 <= check <= 4


def test_learned_positions_are_warned_of_because_a_state_brings_its_position_along(
    patched: Path, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", "gpt2", seed=2)
    study = xprobe.patch(xprobe.run(str(model), setting="en-x", limit=12, out=tmp_path / "run", **OPTIONS))
    (warning,) = study.manifest.stages["patching"].warnings
    assert warning.startswith("a patch at layer 0 moves the answer (T(0) = ")
    assert "this model adds positions to its states" in warning
    assert xprobe.load_study(patched).manifest.stages["patching"].warnings == []  # rotary angles are in no state


def test_a_second_call_needs_no_model_and_settings_are_kept_apart(
    patched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(patched, tmp_path)
    before = xprobe.load_study(out).patching
    few = xprobe.patch(out, xprobe.PatchSettings(cross=0, controls=0, limit=4))
    assert set(few.patching["kind"]) == set(PATCHES)
    assert set(few.patching["pairs"]) == {"same"}
    assert few.patching["question_id"].nunique() <= 4
    monkeypatch.setattr("xprobe.evaluation._open_model", lambda *arguments: pytest.fail("the model was opened"))
    pd.testing.assert_frame_equal(xprobe.patch(out).patching, before)


def test_a_killed_stage_goes_on_and_gives_the_same_tables(finished: Path, patched: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    code = (
        "import sys, time, xprobe\n"
        "from xprobe.events import Step\n"
        "import xprobe.stages.patching as stage\n"
        "def slow(event):\n"
        "    if isinstance(event, Step) and event.stage == 'patching' and event.done:\n"
        "        print(event.done, flush=True); time.sleep(60)\n"
        "xprobe.patch(sys.argv[1], progress=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None
    done = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (out / LINES).open("a") as file:
        file.write('{"half a li')
    events: list[Any] = []
    study = xprobe.patch(out, progress=events.append)
    steps = [event for event in events if isinstance(event, Step) and event.stage == "patching"]
    assert steps[0].done == done < steps[0].total
    pd.testing.assert_frame_equal(study.patching, xprobe.load_study(patched).patching)
    assert (out / LINES).read_bytes() == (patched / LINES).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": 5}, "settings must be a PatchSettings, got 5"),
        ({"backend_": 1}, "unknown option 'backend_'"),
        ({"limit": 1}, r"limit is a field of PatchSettings: pass xprobe.PatchSettings\(limit=...\) as settings"),
        ({"stream": True}, "a streamed model cannot be patched"),
    ],
)
def test_bad_arguments_are_refused(finished: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    out = copied(finished, tmp_path)
    with pytest.raises(UsageError, match=message):
        xprobe.patch(out, **arguments)
    assert not (out / LINES).exists()
    with pytest.raises(UsageError, match=r"has no patches: xprobe\.patch\("):
        _ = xprobe.load_study(out).patching


def test_one_question_on_each_paragraph_cannot_be_patched(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    model = xprobe.load_study(finished).manifest.model.location
    xprobe.run(model, setting="en-x", paragraphs=2, questions_per_paragraph=1, out=out, **OPTIONS)
    with pytest.raises(DataError, match="no two questions on one paragraph"):
        xprobe.patch(out)
