"""A study end to end on a tiny model: results, files, resume, refusals."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from support.families import save_tiny_model
from support.runs import parity

import xprobe
from xprobe.errors import DataError, ModelError, RunFolderError, UsageError, XprobeError
from xprobe.events import Finished, Note, Stage, Step
from xprobe.lenses import reading
from xprobe.models import loading
from xprobe.qa.parallel import load_data
from xprobe.runs.folder import RunFolder
from xprobe.stages import states

FULL = {"setting": ("en-x", "x-x"), "batch_tokens": 500, "languages": ("en", "th", "zh"), "limit": 6, "bootstrap": 100}
PLAIN = {**FULL, "probes": ()}  # for what has nothing to do with probes
SMALL = {**PLAIN, "setting": "en-x"}


@pytest.fixture(scope="module")
def study(tiny, tmp_path_factory):
    return xprobe.run(str(tiny), out=tmp_path_factory.mktemp("study") / "run", **FULL)


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_example_has_a_row_and_every_layer_its_figures(study):
    assert len(study.examples) == 2 * 3 * 6 == study.manifest.counts.examples
    assert study.settings == ("en-x", "x-x")
    for setting in study.settings:
        table = study[setting].stability
        assert list(table.index) == [0, 1, 2, 3, 4]
        assert table["readiness"].between(0, 1).all()
        assert (table["rank"] >= 1).all()
        assert table["kl"].iloc[-1] == pytest.approx(0, abs=1e-5)


def test_tables_are_tidy_and_complete(study):
    layers = pd.read_parquet(study.path / "layers.parquet")
    assert list(layers.columns) == ["setting", "layer", "language", "signal", "value", "lo", "hi", "n"]
    assert not layers.duplicated(["setting", "layer", "language", "signal"]).any()
    assert set(layers["signal"]) == {
        "stability", "agreement_en", "phase2", "readiness", "log_probability", "rank", "entropy", "kl",
        *(f"{name}{part}" for name in ("encoding", "encoding_question")
          for part in ("", "_control", "_selectivity", "_top1", "_margin",
                       "_probed", "_probed_control", "_probed_selectivity")),
    }  # fmt: skip
    assert set(layers["language"]) == {"all", "en", "th", "zh"}
    bounded = layers.dropna(subset=["value", "lo", "hi"])
    assert (bounded["lo"] <= bounded["value"] + 1e-9).all()
    assert (bounded["value"] <= bounded["hi"] + 1e-9).all()


def test_signals_equal_a_hand_written_logit_lens(study, tiny):
    """One example, from text to numbers, with nothing but transformers."""
    loaded = loading.load(loading.resolve(str(tiny)))
    model, tokenizer = loaded.model, loaded.tokenizer
    record = load_data("builtin", ["en"]).records["en"]["p01q1"]
    prompt = (
        "Read the text and answer the question with the exact words of the text, as short as possible.\n\n"
        f"Text: {record.context}\n\nQuestion: {record.question}\nAnswer:"
    )
    ids, answer = tokenizer(prompt)["input_ids"], tokenizer(" " + record.answer)["input_ids"]
    with torch.inference_mode():
        out = model(torch.tensor([ids + answer]), output_hidden_states=True)
        states = [*out.hidden_states[:-1]]
        at = slice(len(ids) - 1, len(ids) + len(answer) - 1)
        logits = [model.lm_head(model.model.norm(state[0, at])) for state in states] + [out.logits[0, at]]
    gold = torch.tensor(answer)[:, None]
    log_p = [float(z.log_softmax(-1).gather(1, gold).mean()) for z in logits]
    ranks = [1 + (z > z.gather(1, gold)).sum(-1) for z in logits]
    ready = [float((1 - rank.log2() / np.log2(model.config.vocab_size)).mean()) for rank in ranks]

    row = study.examples.query("setting == 'en-x' and language == 'en' and question_id == 'p01q1'").iloc[0]
    assert row["log_probability_last"] == pytest.approx(log_p[-1], abs=1e-4)
    assert row["answer_tokens"] == len(answer)
    arrays, metadata = RunFolder(study.path).read_shard("en-x.en.a000p000.safetensors")
    place = next(i for i, e in enumerate(metadata["examples"]) if (e["language"], e["question_id"]) == ("en", "p01q1"))
    rows = slice(*arrays["offsets"][place : place + 2])
    assert (arrays["logit"] - arrays["logsumexp"])[rows].mean(0).tolist() == pytest.approx(log_p, abs=1e-4)
    assert arrays["rank"][rows].T.tolist() == [rank.tolist() for rank in ranks]
    assert row["readiness_last"] == pytest.approx(ready[-1], abs=1e-6)
    assert arrays["targets"][rows].tolist() == answer
    wanted = torch.stack([state[0, len(ids) - 1] for state in states]).numpy()
    assert np.allclose(arrays["prompt_end"][place][:-1], wanted, atol=1e-5)


def test_a_study_that_is_read_equals_the_one_that_was_computed(study):
    again = xprobe.load_study(study.path)
    assert again.manifest == study.manifest
    assert again.to_dict() == study.to_dict()
    for setting in study.settings:
        pd.testing.assert_frame_equal(again[setting].stability, study[setting].stability)
        assert f"SettingResult({setting}: examples 18, boundary" in repr(again[setting])
        assert "<table" in again[setting]._repr_html_()
    assert "Study(" in repr(again)
    assert again._repr_html_().count("<table") == 2


def test_a_run_with_several_settings_needs_the_name_of_one(study):
    for name in ("alpha", "boundary", "stability"):
        with pytest.raises(UsageError, match=r'holds 2 settings: choose study\["en-x"\] or study\["x-x"\]'):
            getattr(study, name)
    with pytest.raises(UsageError, match="holds no setting 'x-y'; it holds en-x, x-x"):
        study["x-y"]
    assert [result.setting for result in study.values()] == ["en-x", "x-x"]


def test_a_study_is_a_mapping_from_settings_to_their_results(study):
    assert "x-x" in study
    assert "x-y" not in study
    assert len(study) == 2
    assert list(study) == list(study.keys()) == ["en-x", "x-x"]
    assert study.get("fr-x") is None
    with pytest.raises(KeyError, match=r"^this run holds no setting 'fr-x'; it holds en-x, x-x$"):
        study["fr-x"]
    assert study == study
    assert study in {study}
    assert [setting for setting, result in study.items() if result.setting == setting] == ["en-x", "x-x"]
    assert dict(study)["x-x"].alpha == study["x-x"].alpha


def test_the_json_object_has_the_promised_shape(study):
    value = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    names = {
        "run_dir",
        "model",
        "lens",
        "settings",
        "phase_definition",
        "parity_error",
        "counts",
        "seconds",
        "warnings",
    }
    assert names == set(value)
    assert value["phase_definition"] == 1
    assert list(value["settings"]) == ["en-x", "x-x"]
    for result in value["settings"].values():
        assert {"alpha", "boundary", "n", "languages"} <= set(result)
        assert set(result["boundary"]) == {"value", "lo", "hi"}
        assert [layer["layer"] for layer in result["layers"]] == [0, 1, 2, 3, 4]
        assert {"phase", "stability", "stability_lo", "stability_hi", "readiness", "log_probability", "rank",
                "entropy", "encoding", "encoding_selectivity"} <= set(result["layers"][0])  # fmt: skip


def test_the_same_run_gives_the_same_bytes(study, tiny, tmp_path):
    again = xprobe.run(str(tiny), out=tmp_path / "run", **FULL)
    mine, theirs = files(study.path), files(again.path)
    assert set(mine) == set(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == ["manifest.json"]  # times and places


def test_an_interrupted_run_is_resumed_where_it_stopped(study, tiny, tmp_path, monkeypatch):
    calls = []
    real = states.start_reading

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    out = tmp_path / "run"
    monkeypatch.setattr(states, "start_reading", failing)
    with pytest.raises(KeyboardInterrupt):
        xprobe.run(str(tiny), out=out, **FULL)
    assert len(list((out / "shards").iterdir())) == 2
    with pytest.raises(RunFolderError, match="not finished"):
        xprobe.load_study(out)
    resumed = xprobe.run(str(tiny), out=out, resume=True, **FULL)
    groups = len(list((out / "shards").iterdir()))
    assert len(calls) == 3 + groups - 2  # the two finished groups were not computed again
    mine, theirs = files(study.path), files(resumed.path)
    assert [name for name in mine if mine[name] != theirs[name]] == ["manifest.json"]


def test_an_error_of_progress_is_raised_unchanged_and_its_counts_are_right(tiny, tmp_path):
    counts = []

    def stopping(event):
        if isinstance(event, Step) and event.stage == "forward and lens":
            counts.append(event.done)
            if event.done:
                raise RuntimeError("mine")

    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match=r"^mine$"):
        xprobe.run(str(tiny), out=out, progress=stopping, **PLAIN)
    shards = [RunFolder(out).read_shard(name)[1] for name in RunFolder(out).finished_shards()]
    assert counts == [0, sum(len(metadata["examples"]) for metadata in shards)]


@pytest.mark.parametrize("status", ["running", "done"])
def test_a_damaged_shard_is_computed_again(tiny, tmp_path, status):
    out = tmp_path / "run"
    xprobe.run(str(tiny), out=out, **SMALL)
    if status == "running":
        manifest = json.loads((out / "manifest.json").read_text())
        (out / "manifest.json").write_text(json.dumps({**manifest, "status": status}))
    shard = sorted((out / "shards").iterdir())[0]
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    xprobe.run(str(tiny), out=out, resume=True, **SMALL)
    assert shard.read_bytes() == good


def test_resuming_a_finished_run_loads_no_model(study, tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    first = xprobe.run(str(tiny), out=out, **SMALL)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded"))
    second = xprobe.run(str(tiny), out=out, resume=True, **SMALL)
    assert second.to_dict() == first.to_dict()


def notes_of_resuming(tiny, out, **options):
    events = []
    xprobe.run(str(tiny), out=out, resume=True, progress=events.append, **options)
    return [event.text for event in events if isinstance(event, Note)]


def test_options_that_a_finished_run_cannot_use_are_noted(study, tiny):
    assert notes_of_resuming(tiny, study.path, **FULL)[1:] == []
    changed = notes_of_resuming(tiny, study.path, **{**FULL, "batch_tokens": 64, "stream": True})
    assert changed[1:] == ["the run is finished, so these options were not used: batch_tokens=64, stream=True"]


def test_shards_that_belong_to_no_group_are_noted_and_left_alone(tiny, tmp_path):
    out = tmp_path / "run"
    xprobe.run(str(tiny), out=out, **SMALL)
    extra = out / "shards" / "x-x.en.p0.safetensors"
    extra.write_bytes(b"of another setting")
    assert notes_of_resuming(tiny, out, **SMALL)[-1] == (
        f"{out / 'shards'} holds shards that this run does not use, remove them: {extra.name}"
    )
    assert extra.exists()


def test_resume_with_another_configuration_names_the_difference(study, tiny, tmp_path):
    with pytest.raises(UsageError, match=r"limit was 6 and is now 5"):
        xprobe.run(str(tiny), out=study.path, resume=True, **{**FULL, "limit": 5})
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="other bytes"):
        xprobe.run(str(other), out=study.path, resume=True, **FULL)


def test_resume_with_another_wording_of_the_same_template_file_is_refused(tiny, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('prompt = "{context}\\n{question}"')
    xprobe.run(str(tiny), out=tmp_path / "run", languages="en", limit=1, probes=(), template=str(path))
    path.write_text('prompt = "{context}\\n\\n{question}"')
    with pytest.raises(UsageError, match="wording of the template"):
        xprobe.run(str(tiny), out=tmp_path / "run", resume=True, languages="en", limit=1, probes=(), template=str(path))


def test_a_tokenizer_of_another_model_is_refused(tiny, tmp_path):
    from support.families import tiny_tokenizer

    folder = tmp_path / "mixed"
    loaded = loading.load(loading.resolve(str(tiny)))
    loaded.model.save_pretrained(folder)
    tiny_tokenizer("byte_bpe_large").save_pretrained(folder)
    with pytest.raises(ModelError, match="do not belong together"):
        xprobe.run(str(folder), out=tmp_path / "run", languages="en", limit=1, probes=())


def test_damaged_weights_are_refused(tiny, tmp_path):
    folder = tmp_path / "damaged"
    loaded = loading.load(loading.resolve(str(tiny)))
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="NaN or infinity at layer 2: its weights are damaged"):
        xprobe.run(str(folder), out=tmp_path / "run", languages="en", limit=1, probes=())


def test_values_that_are_not_finite_never_reach_a_shard(tiny, tmp_path, monkeypatch):
    real = reading.Reading.values

    def broken(self):
        values = real(self)
        values.logsumexp[0, 1] = np.nan
        return values

    monkeypatch.setattr(reading.Reading, "values", broken)
    with pytest.raises(XprobeError, match="NaN or infinity"):
        xprobe.run(str(tiny), out=tmp_path / "run", languages="en", limit=1, probes=())
    assert not any((tmp_path / "run" / "shards").iterdir())


def test_a_manifest_that_lacks_entries_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 2, "status": "done"}')
    with pytest.raises(RunFolderError, match="entry study must be an object, is missing"):
        xprobe.load_study(tmp_path)


def test_a_folder_with_other_content_is_never_written_to(study, tiny, tmp_path):
    with pytest.raises(UsageError, match="not empty"):
        xprobe.run(str(tiny), out=study.path, **FULL)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="no run to resume"):
        xprobe.run(str(tiny), out=tmp_path, resume=True, **SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_one_language_has_no_stability(tiny, tmp_path):
    study = xprobe.run(str(tiny), out=tmp_path / "run", languages="en", limit=4, probes=())
    assert study.stability["stability"].isna().all()
    assert study.alpha["value"] is None
    assert study.to_dict()["settings"]["en-x"]["layers"][0]["stability"] is None


@pytest.mark.parametrize("family", ["llama", "mpt"])  # MPT calls its window max_seq_len
def test_examples_longer_than_the_window_are_counted_and_left_out(family, tmp_path):
    model = save_tiny_model(tmp_path / "short", family, window=600)
    study = xprobe.run(str(model), out=tmp_path / "run", setting="x-x", languages=("en", "th"), limit=6, probes=())
    counts = study.manifest.counts
    assert counts.skipped == {"longer than the model's window": 12 - counts.examples}
    assert 0 < counts.examples < 12
    assert len(study.manifest.left_out["examples"]) == 12 - counts.examples


def test_a_window_too_short_for_every_example_is_an_error(tmp_path):
    model = save_tiny_model(tmp_path / "short", window=32)
    with pytest.raises(DataError, match="window"):
        xprobe.run(str(model), out=tmp_path / "run", limit=2)
    assert not (tmp_path / "run").exists()


def test_rows_can_be_left_out_of_the_shards(tiny, tmp_path):
    study = xprobe.run(str(tiny), out=tmp_path / "run", languages="en", limit=1, store_rows=False)
    arrays, _ = RunFolder(study.path).read_shard("en-x.en.a000p000.safetensors")
    assert set(arrays) == {"logit", "logsumexp", "rank", "entropy", "kl", "offsets", "targets"}
    assert "encoding" not in study.stability
    assert study.probes.empty


def test_a_failure_in_the_middle_says_what_is_kept(tiny, tmp_path, monkeypatch):
    calls = []
    real = states.start_reading

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory: tried to allocate 1 TiB")
        return real(*args, **kwargs)

    monkeypatch.setattr(states, "start_reading", failing)
    with pytest.raises(XprobeError, match=r"9 of 18 examples are kept .* --resume"):
        xprobe.run(str(tiny), out=tmp_path / "run", **SMALL)


def test_stages_are_reported_in_order(tiny, tmp_path):
    seen = []
    xprobe.run(str(tiny), out=tmp_path / "run", progress=seen.append, **{**SMALL, "probes": ("language",)})
    begun, *seen, finished = seen
    assert (begun.folder, begun.config["study"]["probes"]) == (str(tmp_path / "run"), ["language"])
    assert finished == Finished(str(tmp_path / "run"))
    stages = list(dict.fromkeys(event.stage if isinstance(event, Step) else str(event) for event in seen))
    assert [type(event) for event in seen[:3]] == [Stage, Stage, Note]
    assert stages[:2] == ["loading the model", "building prompts"]
    assert re.fullmatch(r"shared beginnings save \d+% of \d+ tokens", stages[2])
    assert stages[3:] == ["forward and lens", "signals", "phases and tables", "probes"]
    assert [e.done for e in seen if isinstance(e, Step) and e.stage == "forward and lens"] == [0, 9, 18]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_passes_parity(tiny, tmp_path, dtype):
    study = xprobe.run(str(tiny), out=tmp_path / "run", languages=("en", "de"), limit=2, probes=(), dtype=dtype)
    assert study.manifest.model.dtype == dtype
    assert parity(study) < 0.1
    arrays, _ = RunFolder(study.path).read_shard("en-x.en.a000p000.safetensors")
    assert np.isfinite(arrays["prompt_end"]).all()


def test_pickled_weights_are_refused_unless_asked_for(tiny, tmp_path):
    folder = tmp_path / "pickled"
    loaded = loading.load(loading.resolve(str(tiny)))
    loaded.tokenizer.save_pretrained(folder)
    loaded.model.config.save_pretrained(folder)
    torch.save(loaded.model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="--allow-pickle"):
        xprobe.run(str(folder), out=tmp_path / "run", limit=1)
    study = xprobe.run(str(folder), out=tmp_path / "run", languages="en", limit=1, probes=(), allow_pickle=True)
    assert parity(study) < 1e-4


def test_unknown_options_are_named():
    with pytest.raises(UsageError, match="limitt"):
        xprobe.run("x", limitt=3)
