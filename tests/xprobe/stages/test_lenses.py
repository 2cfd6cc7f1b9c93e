"""The stage "lenses": planted readings, the run's own numbers again, and what a killed process keeps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.families import save_tiny_model
from support.planted import DECOYS, N_BLOCKS, planted_model, planted_set, planted_template
from support.planted_latent import latent_model, latent_set, latent_shares, latent_template
from transformers import AutoModelForCausalLM, AutoTokenizer

import xprobe
from xprobe.errors import ModelError, UsageError
from xprobe.events import Step
from xprobe.models.anatomy import inspect, watch_states
from xprobe.phases.lens_tables import LENS_COLUMNS, LENS_EXAMPLE_COLUMNS, LENS_LAYER_COLUMNS
from xprobe.qa.prompts import build_prompts
from xprobe.scoring.scripts import SCRIPTS
from xprobe.stages.lenses import LINES
from xprobe.stages.questions import read_questions

OPTIONS: dict[str, Any] = {
    "languages": ("en", "de", "th"), "bootstrap": 50, "permutations": 20, "probes": (), "template": "plain",
}  # fmt: skip
FIGURES = ("alpha", "boundary", "relative_boundary", "spread", "phased_fraction", "without_onset", "n")


def random_lens(path: Path, seed: int = 0, width: int = 32, blocks: int = 3) -> Path:
    generator = torch.Generator().manual_seed(seed)
    maps = {block: torch.randn(width, width, generator=generator).half() for block in range(blocks)}
    torch.save({"J": maps, "n_prompts": 1, "source_layers": list(maps), "d_model": width}, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, two lenses of it, and a run of it."""
    folder = tmp_path_factory.mktemp("lenses")
    model = save_tiny_model(folder / "model")
    random_lens(folder / "one.pt")
    random_lens(folder / "two.pt", seed=1)
    xprobe.run(str(model), setting=("en-x", "x-x"), limit=6, out=folder / "run", **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def names(place: Path) -> tuple[str, str]:
    return f"jacobian:{place / 'one.pt'}", f"jacobian:{place / 'two.pt'}"


@pytest.fixture(scope="module")
def read(place: Path, names: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = shutil.copytree(place / "run", tmp_path_factory.mktemp("read") / "run")
    xprobe.read_lenses(out, xprobe.LensesSettings(names))
    return out


def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def results(study: xprobe.Study) -> dict[str, Any]:
    return study.manifest.stages["lenses"].results


def curve(study: xprobe.Study, lens: str, setting: str, signal: str, language: str = "all") -> np.ndarray:
    table = study.table("lenses_by_layer.parquet")
    chosen = (table["lens"] == lens) & (table["setting"] == setting) & (table["signal"] == signal)
    return table[chosen & (table["language"] == language)].sort_values("layer")["value"].to_numpy()


# -- planted readings -------------------------------------------------------------------------------------------------


def early_lens(path: Path, model: Path, languages: list[str], first: int) -> Path:
    """A lens whose maps add, from layer ``first`` on, the token that follows: what the model adds in a later block."""
    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    n = len(vocabulary)
    width = AutoModelForCausalLM.from_pretrained(model).config.hidden_size
    reading = torch.eye(width)
    for language in languages:
        chain = [f"{language}cue", *(f"{language}{step}" for step in ("first", "second", "third"))]
        for here, following in pairwise(chain):
            reading[n + vocabulary[following], vocabulary[here]] = 1.0
    maps = {block: reading if block + 1 >= first else torch.eye(width) for block in range(N_BLOCKS - 1)}
    torch.save({"J": maps, "n_prompts": 1, "source_layers": list(maps), "d_model": width}, path)
    return path


def test_a_planted_lens_reads_the_answer_at_its_own_layer(tmp_path: Path) -> None:
    """The logit lens finds where the model writes the answer, the planted lens where its maps begin. All is exact."""
    onset, first = {"en": 6, "de": 7, "th": 7}, 3
    model = planted_model(tmp_path / "model", onset)
    data, template = planted_set(tmp_path / "data", list(onset)), planted_template(tmp_path, list(onset))
    lens = f"jacobian:{early_lens(tmp_path / 'early.pt', model, list(onset), first)}"
    run = xprobe.run(
        str(model), data=str(data), setting="x-x", out=tmp_path / "run", **{**OPTIONS, "template": str(template)}
    )
    study = run.read_lenses(xprobe.LensesSettings(lens))  # as xprobe.read_lenses(run, ...)
    table = study.lenses.set_index(["lens", "language"])
    for language, layer in onset.items():
        for name, wanted in (("logit", layer), (lens, first)):
            row = table.loc[(name, language)]
            assert list(row[["boundary", "boundary_lo", "boundary_hi", "onset_mean"]]) == [wanted] * 4
        assert list(table.loc[(lens, language)][["onset_shift", "onset_shift_lo"]]) == [first - layer] * 2
        below = 1 - np.log2(1 + len(DECOYS)) / np.log2(len(AutoTokenizer.from_pretrained(model)))
        layers = np.arange(N_BLOCKS + 1)
        for name, wanted in (("logit", layer), (lens, first)):
            readiness = curve(study, name, "x-x", "readiness", language)
            assert readiness == pytest.approx(np.where(layers < wanted, below, 1.0))
    assert table.loc[("logit", "all"), "stability"] < table.loc[(lens, "all"), "stability"] == 1.0
    assert table.loc[(lens, "all"), "onset_shift"] == pytest.approx(first - np.mean(list(onset.values())))
    assert table.loc[("logit", "all"), "onset_shift"] == 0


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    latent_model(folder / "model", english=3, own=6)
    latent_set(folder / "data")
    latent_template(folder)
    return folder


def run_latent(folder: Path, out: Path, **options: Any) -> xprobe.Study:
    options = {**OPTIONS, "template": str(folder / "latent.toml"), "setting": "x-x", **options}
    return xprobe.read_lenses(xprobe.run(str(folder / "model"), data=str(folder / "data"), out=out, **options))


def test_a_planted_latent_language_is_found(latent: Path, tmp_path: Path) -> None:
    """English from layer 3 on, the own language from layer 6 on; below, the number that wins by the constant."""
    study = run_latent(latent, tmp_path / "run", languages=("en", "de", "ru", "zh"))
    layers = np.arange(9)
    number, english, own = layers < 3, (layers >= 3) & (layers < 6), layers >= 6
    for language, script in (("ru", "cyrillic"), ("zh", "han")):
        assert curve(study, "logit", "x-x", "script_none", language).tolist() == (number * 1.0).tolist()
        assert curve(study, "logit", "x-x", "script_latin", language).tolist() == (english * 1.0).tolist()
        assert curve(study, "logit", "x-x", f"script_{script}", language).tolist() == (own * 1.0).tolist()
        share = curve(study, "logit", "x-x", "latent_share", language)
        assert share == pytest.approx(np.select([number, english, own], latent_shares()), abs=1e-4)
        two = [curve(study, "logit", "x-x", f"latent_{name}", language) for name in ("english", "own")]
        assert share == pytest.approx(np.exp(two[1]) / (np.exp(two[0]) + np.exp(two[1])), abs=1e-5)
    table = study.table("lenses_by_layer.parquet")
    assert set(table[table["signal"] == "latent_share"]["language"]) == {"all", "ru", "zh"}  # de: the same token
    assert set(table[(table["signal"] == "latent_share") & (table["language"] == "all")]["n"]) == {16}
    row = study.lenses.set_index("language").loc["ru"]
    assert (row["script_25"], row["script_50"], row["script_75"]) == ("none", "latin", "cyrillic")
    assert [row[f"script_share_{depth}"] for depth in (25, 50, 75)] == [1.0] * 3


def test_the_english_answer_is_found_where_the_run_has_read_it(latent: Path, tmp_path: Path) -> None:
    """A limited run reads English for the order of its questions. Any other run without it warns."""
    whole = run_latent(latent, tmp_path / "whole", languages=("en", "ru"))
    limited = run_latent(latent, tmp_path / "limited", languages=("ru",), limit=8)
    assert curve(limited, "logit", "x-x", "latent_share") == pytest.approx(
        curve(whole, "logit", "x-x", "latent_share", "ru"), abs=1e-5
    )
    without = run_latent(latent, tmp_path / "without", languages=("ru", "zh"))
    assert any("latent language is left out" in warning for warning in without.manifest.stages["lenses"].warnings)
    assert not without.table("lenses_by_layer.parquet")["signal"].str.startswith("latent").any()
    assert without.lenses["latent_share_50"].isna().all()


# -- the same numbers by another way ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_every_lens_gives_what_a_run_under_it_gives(family: str, tmp_path: Path) -> None:
    """gemma2 has a soft-cap, both Gemmas norms with an offset. A run's own lens is one of those that are read."""
    model = save_tiny_model(tmp_path / "model", family)
    lens = f"jacobian:{random_lens(tmp_path / 'j.pt')}"
    options = {**OPTIONS, "setting": ("en-x", "x-x"), "limit": 6}
    plain = xprobe.run(str(model), out=tmp_path / "plain", **options)
    other = xprobe.run(str(model), lens=lens, out=tmp_path / "other", **options)
    studies = (
        xprobe.read_lenses(plain, xprobe.LensesSettings(lens)),
        xprobe.read_lenses(other, xprobe.LensesSettings(["logit"])),
    )
    for study, own in zip(studies, ("logit", lens), strict=True):
        found = results(study)
        assert (found["own"], next(iter(found["lenses"]))) == (own, own)
        assert found["difference_from_run"] == pytest.approx({"readiness": 0, "log_probability": 0}, abs=1e-5)
        for name, run in (("logit", plain), (lens, other)):
            by_layer = study.table("lenses_by_layer.parquet").query("lens == @name")
            examples = study.table("lenses_by_example.parquet").query("lens == @name")
            assert examples["onset"].tolist() == run.examples["onset"].tolist()
            assert examples["phased"].tolist() == run.examples["phased"].tolist()
            keys = ["setting", "layer", "language", "signal"]
            both = run.layers.merge(by_layer, on=keys, suffixes=("", "_again"))
            signals = {"readiness", "log_probability", "rank", "entropy", "kl", "stability", "phase2", "agreement_en"}
            assert set(both["signal"]) == signals
            assert len(both) == run.layers["signal"].isin(signals).sum()
            for column in ("value", "lo", "hi", "n"):
                assert np.allclose(both[column], both[f"{column}_again"], atol=1e-5, equal_nan=True), (name, column)
            for setting, summary in run.manifest.stages["phases"].results["settings"].items():
                again = found["settings"][setting][name]
                assert {key: again[key] for key in FIGURES} == {key: summary[key] for key in FIGURES}
                assert again["languages"]["th"]["boundary"] == summary["languages"]["th"]["boundary"]


def test_scripts_and_latent_language_are_what_plain_hooks_give(read: Path, names: tuple[str, str], place: Path) -> None:
    study = xprobe.load_study(read)
    assert tuple(study.lenses.columns) == LENS_COLUMNS
    assert tuple(study.table("lenses_by_layer.parquet").columns) == LENS_LAYER_COLUMNS
    assert tuple(study.table("lenses_by_example.parquet").columns) == LENS_EXAMPLE_COLUMNS
    model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    maps = torch.load(place / "one.pt", weights_only=True)["J"]
    questions = read_questions(study.manifest.study)
    prompts, _ = build_prompts(questions.examples, tokenizer, questions.template, None)
    own = [prompt for prompt in prompts if (prompt.example.setting, prompt.example.language) == ("x-x", "th")]
    english = {
        prompt.example.question_id: prompt.targets[0]
        for prompt in prompts
        if (prompt.example.setting, prompt.example.language) == ("x-x", "en")
    }
    blocks, pairs, scripts = inspect(model).blocks, [], []
    for prompt in own:
        states: list[torch.Tensor] = []
        with torch.inference_mode(), watch_states(blocks, lambda layer, hidden, to=states: to.append(hidden[0, -1])):
            model(torch.tensor([prompt.ids[: prompt.length]]))
        with torch.inference_mode():
            rows = [
                state @ maps[layer - 1].float().T if layer - 1 in maps else state for layer, state in enumerate(states)
            ]
            values = torch.stack([model.lm_head(model.model.norm(row)).double().log_softmax(-1) for row in rows])
        tokens = [english[prompt.example.question_id], prompt.targets[0]]
        assert tokens[0] != tokens[1]
        pairs.append(values[:, tokens].numpy())
        texts = [tokenizer.decode([token]) for token in values.argmax(-1).tolist()]
        scripts.append([text.isascii() and any(c.isalpha() for c in text) for text in texts])
    for index, name in enumerate(("latent_english", "latent_own")):
        wanted = np.mean(pairs, axis=0)[:, index]
        assert curve(study, names[0], "x-x", name, "th") == pytest.approx(wanted, abs=1e-3)
    assert curve(study, names[0], "x-x", "script_latin", "th") == pytest.approx(np.mean(scripts, axis=0))


def test_shares_of_scripts_add_up_to_one(read: Path) -> None:
    table = xprobe.load_study(read).table("lenses_by_layer.parquet")
    shares = table[table["signal"].str.startswith("script_")]
    assert set(shares["signal"]) <= {f"script_{name}" for name in SCRIPTS}
    totals = shares.groupby(["lens", "setting", "language", "layer"])["value"].sum()
    assert len(totals) == 3 * 2 * 4 * 5
    assert totals.to_numpy() == pytest.approx(1.0)


def test_a_streamed_model_reads_the_same(place: Path, names: tuple[str, str], read: Path, tmp_path: Path) -> None:
    streamed = xprobe.read_lenses(copied(place / "run", tmp_path), xprobe.LensesSettings(names), stream=True)
    ours, theirs = streamed.table("lenses_by_layer.parquet"), xprobe.load_study(read).table("lenses_by_layer.parquet")
    for name in ("readiness", "log_probability", "latent_share"):
        mine, own = (table[table["signal"] == name]["value"].to_numpy() for table in (ours, theirs))
        assert np.allclose(mine, own, atol=1e-4)
    assert not list(streamed.path.glob(".rows-*"))


# -- lines that are kept ----------------------------------------------------------------------------------------------


def test_a_second_call_needs_no_model_and_a_new_lens_leaves_the_others_alone(
    read: Path, names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(read, tmp_path)
    events: list[Any] = []
    third = f"jacobian:{random_lens(tmp_path / 'three.pt', seed=2)}"
    more = xprobe.read_lenses(out, xprobe.LensesSettings([*names, third]), progress=events.append)
    steps = [event for event in events if isinstance(event, Step) and event.stage == "lenses"]
    assert (steps[0].done, steps[0].total, steps[-1].done) == (3 * 36, 4 * 36, 4 * 36)
    assert list(dict.fromkeys(more.lenses["lens"])) == ["logit", *names, third]
    monkeypatch.setattr("xprobe.evaluation._open_model", lambda *arguments: pytest.fail("the model was opened"))
    few = xprobe.read_lenses(out, xprobe.LensesSettings(names[0], limit=2))
    assert few.table("lenses_by_example.parquet")["question_id"].nunique() == 2
    assert results(few)["limit"] == 2
    assert list(dict.fromkeys(few.lenses["lens"])) == [
        "logit",
        *[n for n in (*names, third) if n != names[0]],
        names[0],
    ]
    again = xprobe.read_lenses(out)
    shown = again.lenses.set_index(["lens", "setting", "language"])
    before = xprobe.load_study(read).lenses.set_index(["lens", "setting", "language"])
    pd.testing.assert_frame_equal(shown.loc[before.index], before)
    (tmp_path / "three.pt").unlink()
    events.clear()
    less = xprobe.read_lenses(out, progress=events.append)
    assert set(less.lenses["lens"]) == {"logit", *names}
    assert any(third in getattr(event, "text", "") for event in events)


def test_a_killed_stage_goes_on_and_gives_the_same_files(
    place: Path, names: tuple[str, str], read: Path, tmp_path: Path
) -> None:
    out = copied(place / "run", tmp_path)
    code = (
        "import sys, time, xprobe\n"
        "from xprobe.events import Step\n"
        "def slow(event):\n"
        "    if isinstance(event, Step) and event.stage == 'lenses' and event.done:\n"
        "        print(event.done, flush=True); time.sleep(60)\n"
        "xprobe.read_lenses(sys.argv[1], xprobe.LensesSettings(sys.argv[2:]), progress=slow)\n"
    )
    command = [sys.executable, "-c", code, str(out), *names]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None
    done = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (out / LINES).open("a") as file:
        file.write('{"half a li')
    events: list[Any] = []
    study = xprobe.read_lenses(out, xprobe.LensesSettings(names), progress=events.append)
    steps = [event for event in events if isinstance(event, Step) and event.stage == "lenses"]
    assert steps[0].done == done < steps[0].total
    pd.testing.assert_frame_equal(study.lenses, xprobe.load_study(read).lenses)
    for name in (LINES, "lenses.parquet", "lenses_by_layer.parquet", "lenses_by_example.parquet"):
        assert (out / name).read_bytes() == (read / name).read_bytes(), name


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_lens_that_does_not_fit_is_refused_before_the_model_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(place / "run", tmp_path)
    monkeypatch.setattr("xprobe.stages.lenses.open_prompts", lambda *arguments: pytest.fail("the model was loaded"))
    torch.save({"J": {0: torch.eye(8)}, "n_prompts": 1, "source_layers": [0], "d_model": 8}, tmp_path / "narrow.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    one = f"jacobian:{place / 'one.pt'}"
    shutil.copy(place / "one.pt", tmp_path / "same.pt")
    for lenses, error, message in (
        (f"jacobian:{tmp_path / 'narrow.pt'}", ModelError, "has width 8, the model has width 32: it is of"),
        (f"jacobian:{random_lens(tmp_path / 'deep.pt', blocks=5)}", ModelError, "is of a model of 5 blocks or more"),
        (f"jacobian:{tmp_path / 'text.pt'}", ModelError, "is damaged, no such file, or would run code"),
        (f"regression:{place / 'one.pt'}", ModelError, "holds a jacobian lens, not a regression lens"),
        ("jacobian:none.pt", UsageError, "there is no file none.pt"),
        ([one, f"jacobian:{tmp_path / 'same.pt'}"], UsageError, "are the same lens: leave out one"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            xprobe.read_lenses(out, xprobe.LensesSettings(lenses))
    assert not (out / LINES).exists()
    with pytest.raises(UsageError, match=r"was read by its own lens alone: xprobe\.read_lenses\("):
        _ = xprobe.load_study(out).lenses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lenses": "focus"}, "unknown lens 'focus'"),
        ({"lenses": "jacobian"}, "needs a file"),
        ({"lenses": 5}, "lenses must be a text or a list of texts, got 5"),
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        xprobe.LensesSettings(**arguments)


def test_other_bytes_of_the_runs_own_lens_are_refused(place: Path, tmp_path: Path) -> None:
    file = random_lens(tmp_path / "own.pt")
    study = xprobe.run(
        str(place / "model"), lens=f"jacobian:{file}", limit=2, setting="en-x", out=tmp_path / "run", **OPTIONS
    )
    random_lens(file, seed=9)
    with pytest.raises(UsageError, match="has other bytes than it had when the run was made"):
        xprobe.read_lenses(study, xprobe.LensesSettings("logit"))
