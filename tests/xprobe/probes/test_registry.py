"""A probe of your own is trained beside the others and scored with its control; a wrong one is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.naive_bayes import GaussianNB
from xprobe_cli.main import main

import xprobe
from xprobe.config import BUILT_IN_PROBES, DEFAULT_PROBES
from xprobe.errors import ProbeError, UsageError
from xprobe.events import Note, Step
from xprobe.probes import ACCURACY, ROC_AUC, Probe, register, unregister
from xprobe.probes.classification import language_probe
from xprobe.probes.registry import labels_of
from xprobe.probes.settings import ProbeSettings
from xprobe.study import train_probes

OPTIONS = {"languages": ("en", "de", "th"), "limit": 12, "bootstrap": 20, "permutations": 20}

# Is the question written in Latin letters? The script can be read off nearly any state.
SCRIPT = Probe(
    "script",
    "whether the question is in a Latin script",
    lambda settings: language_probe(settings.n_components, settings.C, settings.seed),
    lambda examples: (examples["language"] != "th").to_numpy(),
    metric=ROC_AUC,
)


@contextmanager
def registered(probe: Probe = SCRIPT) -> Iterator[Probe]:
    register(probe)
    try:
        yield probe
    finally:
        unregister(probe.name)


def files(out):
    return {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    xprobe.run(str(tiny), out=out, probes=("language",), **OPTIONS)
    return out


@pytest.fixture(scope="module")
def finished_with_script(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("script") / "run"
    with registered():
        xprobe.run(str(tiny), out=out, probes=("language", "script"), **OPTIONS)
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def out_with_script(finished_with_script, tmp_path):
    """A run with a probe that is not registered in this process any more."""
    return shutil.copytree(finished_with_script, tmp_path / "run")


def resume(tiny, out, progress=None):
    return xprobe.run(str(tiny), out=out, probes=("language", "script"), resume=True, progress=progress, **OPTIONS)


# -- training -------------------------------------------------------------------------------------------------------


def test_a_probe_of_your_own_is_trained_beside_the_others(out):
    before = xprobe.load_study(out).probes
    with registered():
        study = train_probes(out, ["script"])
    table = study.probes.set_index(["probe", "state", "layer"])
    own = table.loc["script"]
    assert set(own["metric"]) == {"roc_auc"}
    assert (own["baseline"] == 0.5).all()
    assert own["score"].max() > 0.95
    assert np.allclose(own["selectivity"], own["score"] - own["control"])
    kept = study.probes[study.probes["probe"] == "language"].reset_index(drop=True)
    assert kept.equals(before)
    assert study.manifest.stages["probes"].results["trained"]["script"]["seed"] == 0


def test_a_study_can_ask_for_it(finished_with_script):
    study = xprobe.load_study(finished_with_script)
    assert set(study.probes["probe"]) == {"language", "script"}
    assert study.manifest.study.probes == ("language", "script")


def test_registering_changes_no_default():
    with registered():
        assert xprobe.StudyConfig().probes == DEFAULT_PROBES


def test_the_default_probes_are_built_in():
    assert set(DEFAULT_PROBES) <= set(BUILT_IN_PROBES)


def test_an_estimator_with_other_first_steps_gets_the_states_themselves(out):
    widths = []

    class Recorder(GaussianNB):
        def fit(self, X, y):
            widths.append(X.shape[1])
            return super().fit(X, y)

    with registered(Probe("recorder", "", lambda settings: Recorder(), lambda e: e["language"].to_numpy())):
        study = train_probes(out, ["recorder"])
    assert set(widths) == {study.manifest.model.width}


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (replace(SCRIPT, labels=lambda examples: (examples["language"] == "en").to_numpy()), "labels"),
        (replace(SCRIPT, estimator=lambda settings: language_probe(2)), "estimator"),
        (replace(SCRIPT, metric=ACCURACY), "metric"),
        (SCRIPT, None),
    ],
    ids=["other labels", "another estimator", "another metric", "the same"],
)
def test_a_warning_says_that_another_probe_of_the_same_name_replaced_the_scores(out_with_script, other, what):
    notes = []
    with registered(other):
        study = train_probes(out_with_script, ["script"], progress=notes.append)
    expected = f"probe 'script' is not the one of this name that the run had before: it has another {what}"
    assert (expected in study.manifest.warnings) == (expected in [str(note) for note in notes]) == (what is not None)
    assert len(study.manifest.warnings) == (what is not None)


def test_other_settings_alone_do_not_make_another_probe(out_with_script):
    with registered():
        study = train_probes(out_with_script, ["script"], ProbeSettings(n_components=3))
    assert not study.manifest.warnings


# -- failures -------------------------------------------------------------------------------------------------------


def fails(*arguments):
    raise ArithmeticError("no luck")


FAILING = {
    "labels": (replace(SCRIPT, labels=fails), r"probe 'script' failed \(labels, .*\): ArithmeticError: no luck"),
    "estimator": (replace(SCRIPT, estimator=fails), r"probe 'script' failed \(setting en-x, state prompt_end, layer 0"),
    "metric": (replace(SCRIPT, metric=replace(ROC_AUC, score=fails)), r"'script' failed \(setting en-x, .* fold 1\)"),
    "a column that is missing": (
        replace(SCRIPT, labels=lambda e: e["colour"]),
        r"probe 'script' failed \(labels, from the columns setting, language, .*first_token_correct\): KeyError",
    ),
}


@pytest.mark.parametrize(("probe", "message"), FAILING.values(), ids=FAILING)
def test_a_probe_that_fails_leaves_the_run_as_it_was(out, probe, message):
    before = files(out)
    with registered(probe), pytest.raises(ProbeError, match=message) as caught:
        train_probes(out, ["language", "script"])
    assert isinstance(caught.value.__cause__, ArithmeticError | KeyError)
    assert files(out) == before


def test_a_run_whose_probe_fails_is_resumed_when_the_probe_is_mended(tiny, tmp_path, finished_with_script):
    out = tmp_path / "run"
    options = {"out": out, "probes": ("language", "script"), **OPTIONS}
    with registered(replace(SCRIPT, estimator=fails)), pytest.raises(ProbeError, match="probe 'script' failed"):
        xprobe.run(str(tiny), **options)
    shards = files(out / "shards")
    with registered():
        study = xprobe.run(str(tiny), resume=True, **options)
    assert files(out / "shards") == shards
    assert study.probes.equals(xprobe.load_study(finished_with_script).probes)


# -- runs in a process that does not know their probe ---------------------------------------------------------------


def test_a_run_is_read_and_resumed_where_its_probe_is_not_registered(out_with_script, tiny):
    before = files(out_with_script)
    study = xprobe.load_study(out_with_script)
    assert set(study.probes["probe"]) == {"language", "script"}
    assert len(study["en-x"].probes.loc["script"]) > 0
    assert study["en-x"].summary["n"] == 36
    resume(tiny, out_with_script)
    after = files(out_with_script)
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json"}


def test_other_probes_of_the_run_are_trained_where_its_probe_is_not_registered(out_with_script, capsys):
    before = xprobe.load_study(out_with_script).probes
    assert main(["probe", str(out_with_script), "--probe", "language", "--json"]) == 0
    assert capsys.readouterr().err == ""
    pd.testing.assert_frame_equal(xprobe.load_study(out_with_script).probes, before)


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_new_run_with_an_unknown_probe_is_refused(tiny, tmp_path, capsys, options):
    with pytest.raises(UsageError, match=r"unknown probe 'script'; .* register it as the script did"):
        xprobe.run(str(tiny), out=tmp_path / "run", probes=("script",))
    arguments = ["run", str(tiny), "--probes", "script", "--out", str(tmp_path / "run"), *options]
    assert main(arguments) == 2
    assert "xprobe.probes.register" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_an_unknown_probe_is_refused(out, capsys):
    known = ", ".join(BUILT_IN_PROBES)
    with pytest.raises(UsageError, match=rf"unknown probe 'syntax'; available: {known}\. .* register it"):
        train_probes(out, ["syntax"])
    with pytest.raises(UsageError, match="no probe given"):
        train_probes(out, [])
    assert main(["probe", str(out), "--probe", "syntax"]) == 2
    assert known in capsys.readouterr().err.replace("'", "")


def test_an_interrupted_run_is_refused_as_it_is_until_its_probe_is_registered(tiny, tmp_path, finished_with_script):
    def stop(event):
        if isinstance(event, Step) and event.stage == "probes":
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with registered(), pytest.raises(KeyboardInterrupt):
        xprobe.run(str(tiny), out=out, probes=("language", "script"), progress=stop, **OPTIONS)
    before = files(out)
    with pytest.raises(UsageError, match=r"unknown probe 'script'; .* register it as the script did"):
        resume(tiny, out)
    assert main(["run", "--out", str(out), "--resume"]) == 2
    assert files(out) == before
    with registered():
        study = resume(tiny, out)
    assert study.probes.equals(xprobe.load_study(finished_with_script).probes)


def test_a_lost_table_of_layers_is_written_again_without_the_probe(out_with_script, tiny):
    before = files(out_with_script)
    (out_with_script / "layers.parquet").unlink()
    study = resume(tiny, out_with_script)
    after = files(out_with_script)
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json"}
    assert study.manifest.warnings == []


@pytest.mark.parametrize("settings", [ProbeSettings(), ProbeSettings(folds=2, seed=3)], ids=["usual", "others"])
def test_a_lost_table_of_probes_gets_the_rows_that_can_be_trained_and_a_warning(
    out_with_script, tiny, settings, capsys
):
    with registered():
        before = train_probes(out_with_script, ["script"], settings).probes
    (out_with_script / "probes.parquet").unlink()
    notes = []
    study = resume(tiny, out_with_script, notes.append)
    assert study.probes.equals(before[before["probe"] == "language"].reset_index(drop=True))
    assert list(study.manifest.stages["probes"].results["trained"]) == ["language"]
    (warning,) = study.manifest.warnings
    assert Note(warning) in notes
    assert "probe 'script' is not registered here: its rows could not be written again" in warning
    assert main(["run", "--out", str(out_with_script), "--resume"]) == 0
    assert warning in capsys.readouterr().err
    with registered():
        study = eval(warning.rpartition("then call ")[2])
    assert study.probes.equals(before)
    assert study.manifest.warnings == []


def test_a_damaged_shard_is_computed_again_and_the_scores_of_the_probe_stay(out_with_script, tiny):
    before = xprobe.load_study(out_with_script)
    next((out_with_script / "shards").iterdir()).write_bytes(b"nothing")
    study = resume(tiny, out_with_script)
    assert study.probes.equals(before.probes)
    assert study.examples.equals(before.examples)


def test_training_another_probe_recovers_a_lost_table_too(out_with_script, capsys):
    (out_with_script / "probes.parquet").write_bytes(b"")
    assert main(["probe", str(out_with_script), "--probe", "alignment"]) == 0
    study = xprobe.load_study(out_with_script)
    assert set(study.probes["probe"]) == {"alignment", "language"}
    assert study.manifest.warnings[0] in capsys.readouterr().err


def test_a_run_with_no_other_probe_is_recovered_without_scores(tiny, tmp_path):
    out = tmp_path / "run"
    with registered():
        before = xprobe.run(str(tiny), out=out, probes=("script",), **OPTIONS)
    (out / "probes.parquet").unlink()
    study = xprobe.run(str(tiny), out=out, probes=("script",), resume=True, **OPTIONS)
    assert study.probes.empty
    assert list(study.probes) == list(before.probes)
    assert study.layers.equals(before.layers)
    assert "'script'" in study.manifest.warnings[0]


# -- what cannot be registered --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [5, None, "", " ", "a,b", "a b", "none", "all", "-a", "2nd", "é", "a\n"])
def test_a_name_that_cannot_be_typed_as_an_option_is_refused(name):
    with pytest.raises(UsageError, match=r"a probe cannot be called .*: a name begins with a letter"):
        register(replace(SCRIPT, name=name))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("description", None, "probe 'script': description must be text, got None"),
        ("estimator", GaussianNB(), r"probe 'script': estimator must be a function .*, got GaussianNB\(\)"),
        ("labels", None, "probe 'script': labels must be a function .*, got None"),
        ("labels", "language", "probe 'script': labels must be a function .*, got 'language'"),
        ("metric", "accuracy", "probe 'script': metric must be a Metric .*, got 'accuracy'"),
        ("name", "language", "a probe 'language' is there already"),
    ],
)
def test_a_part_that_cannot_be_used_is_refused(part, value, message):
    with pytest.raises(UsageError, match=message):
        register(replace(SCRIPT, **{part: value}))
    assert "script" not in xprobe.config.PROBES


@pytest.mark.parametrize("thing", ["script", None, GaussianNB()])
def test_something_else_than_a_probe_is_refused(thing):
    with pytest.raises(UsageError, match=r"register takes a Probe \(xprobe.probes.Probe\), got"):
        register(thing)


def test_only_a_registered_probe_can_be_removed():
    with pytest.raises(UsageError, match="probe 'language' is built in: it cannot be removed"):
        unregister("language")
    with registered(), pytest.raises(UsageError, match="no probe 'scirpt' is registered; registered: script"):
        unregister("scirpt")


# -- labels ---------------------------------------------------------------------------------------------------------

EXAMPLES = pd.DataFrame({"language": ["en", "de", "th", "en"]}, index=[7, 4, 9, 2])


def with_labels(labels):
    return replace(SCRIPT, labels=labels)


def test_a_series_is_aligned_with_the_examples_by_its_index():
    expected = labels_of(SCRIPT, EXAMPLES).tolist()
    in_another_order = with_labels(lambda examples: (examples["language"] != "th").sort_index())
    assert labels_of(in_another_order, EXAMPLES).tolist() == expected
    assert labels_of(with_labels(lambda examples: examples["language"] != "th"), EXAMPLES).tolist() == expected
    assert labels_of(with_labels(lambda examples: expected), EXAMPLES).tolist() == expected


@pytest.mark.parametrize("index", [range(4), [7, 4, 9, 9], list("abcd")])
def test_a_series_with_another_index_is_refused(index):
    with pytest.raises(
        UsageError, match=r"probe 'script' .*gave a Series with another index than the data frame it got"
    ):
        labels_of(with_labels(lambda examples: pd.Series(1, index=index)), EXAMPLES)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda examples: examples["language"].to_numpy()[:-1], r"an array of shape \(3,\)"),
        (lambda examples: examples["language"].iloc[:-1], r"an array of shape \(3,\)"),
        (lambda examples: examples[["language"]], r"an array of shape \(4, 1\)"),
        (lambda examples: "en", r"an array of shape \(\)"),
        (lambda examples: [1.0, 2.0, float("nan"), 3.0], r"none \(None or NaN\) for 1"),
        (lambda examples: examples["language"].replace("en", None), r"none \(None or NaN\) for 2"),
    ],
    ids=["too few", "a series with too few", "a table", "one for all", "NaN", "None"],
)
def test_labels_that_are_not_one_for_each_example_are_refused(labels, message):
    with pytest.raises(UsageError, match=f"probe 'script' must give one label for each of 4 examples, gave {message}"):
        labels_of(with_labels(labels), EXAMPLES)


def test_a_labels_function_that_changes_its_table_changes_nothing_for_other_probes() -> None:
    examples = pd.DataFrame({"language": ["en", "th"], "answer_tokens": [2, 1]})
    before = examples.copy()

    def labels(table: pd.DataFrame) -> pd.Series:
        table["language"] = "xx"
        table.sort_values("answer_tokens", inplace=True)
        return table["answer_tokens"] > 1

    probe = Probe("mine", "whether the answer is long", lambda settings: GaussianNB(), labels)
    assert labels_of(probe, examples).tolist() == [True, False]
    pd.testing.assert_frame_equal(examples, before)
