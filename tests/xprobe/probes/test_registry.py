"""Probes of one's own: registered, trained beside the others, scored with their control, and refused when wrong."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from sklearn.naive_bayes import GaussianNB
from xprobe_cli.main import main

import xprobe
from xprobe.errors import RunFolderError, UsageError
from xprobe.probes import ROC_AUC, Probe, register, unregister
from xprobe.probes.classification import language_probe
from xprobe.study import train_probes


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    xprobe.run(
        str(tiny), out=out, languages=("en", "de", "th"), limit=12, bootstrap=20, permutations=20, probes=("language",)
    )
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def script():
    """Is the question written in Latin letters? The script can be read off nearly any state."""
    new = Probe(
        "script",
        "whether the question is in a Latin script",
        lambda settings: language_probe(settings.n_components, settings.C, settings.seed),
        lambda examples: (examples["language"] != "th").to_numpy(),
        metric=ROC_AUC,
    )
    register(new)
    yield new
    unregister("script")


def test_a_probe_of_ones_own_is_trained_beside_the_others(out, script):
    before = xprobe.load_study(out).probes
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


def test_it_can_be_asked_for_when_the_study_runs(tiny, tmp_path, script):
    study = xprobe.run(str(tiny), out=tmp_path / "run", languages=("en", "th"), limit=4, probes=("script",))
    assert set(study.probes["probe"]) == {"script"}
    assert study.manifest.study.probes == ("script",)


def test_registering_changes_no_default(script):
    assert xprobe.StudyConfig().probes == ("alignment", "language", "correctness")


def test_an_estimator_with_another_beginning_sees_the_states_themselves(out):
    widths = []

    class Spy(GaussianNB):
        def fit(self, X, y):
            widths.append(X.shape[1])
            return super().fit(X, y)

    spy = Probe("spy", "which language, without components", lambda settings: Spy(), lambda e: e["language"].to_numpy())
    register(spy)
    try:
        study = train_probes(out, ["spy"])
    finally:
        unregister("spy")
    assert set(widths) == {study.manifest.model.width}


def test_a_run_with_a_probe_that_is_not_registered_can_be_read_and_says_what_training_needs(out, script, tmp_path):
    train_probes(out, ["script"])
    unregister("script")
    study = xprobe.load_study(out)
    assert set(study.probes["probe"]) == {"language", "script"}
    assert set(train_probes(out, ["language"]).probes["probe"]) == {"language", "script"}
    (out / "layers.parquet").unlink()
    with pytest.raises(RunFolderError, match=r"names 'script', which is not registered here: register"):
        train_probes(out, ["language"])


def test_what_is_wrong_with_a_probe_is_said(out, capsys):
    with pytest.raises(UsageError, match="a probe 'language' is there already"):
        register(Probe("language", "", lambda settings: GaussianNB(), lambda e: e["language"].to_numpy()))
    with pytest.raises(UsageError, match="probe 'nothing' has no labels"):
        register(Probe("nothing", "", lambda settings: GaussianNB()))
    with pytest.raises(UsageError, match="built in and stays"):
        unregister("language")
    with pytest.raises(UsageError, match="unknown probe 'syntax'; available: alignment, language, correctness"):
        train_probes(out, ["syntax"])
    register(Probe("short", "", lambda settings: GaussianNB(), lambda e: e["language"].to_numpy()[:-1]))
    try:
        with pytest.raises(UsageError, match=r"probe 'short' must give one label for each of 36 examples, .*\(35,\)"):
            train_probes(out, ["short"])
    finally:
        unregister("short")
    assert main(["probe", str(out), "--probe", "syntax"]) == 2
    assert "alignment, language, correctness" in capsys.readouterr().err.replace("'", "")
