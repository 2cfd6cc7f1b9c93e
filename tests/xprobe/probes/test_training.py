"""The probing stage: what hand-written scikit-learn gives on the same folds, in bounded memory, twice the same."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from support.states import write_states

from xprobe.errors import UsageError
from xprobe.phases.encoding import paragraph_encoding
from xprobe.probes.classification import correctness_probe, language_probe
from xprobe.probes.registry import get_probe
from xprobe.probes.training import ProbeSettings, Task, train, train_layer

LANGUAGES = ("en", "de", "th")
PARAGRAPHS, QUESTIONS, WIDTH, LAYERS = 8, 4, 12, 3


def frame_of(settings=("en-x",)):
    rows = [
        {"setting": s, "language": x, "question_id": f"p{p}q{q}", "paragraph": f"p{p}", "context_language": "en"}
        for s in settings
        for p in range(PARAGRAPHS)
        for q in range(QUESTIONS)
        for x in LANGUAGES
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def frame():
    return frame_of()


def states_of(frame, seed=0, noise=1.0):
    """Question direction, offsets of language and paragraph, noise: [N, LAYERS, WIDTH]; noise alone at layer 0."""
    generator = np.random.default_rng(seed)
    directions = {
        name: {key: generator.normal(size=WIDTH) * size for key in frame[name].unique()}
        for name, size in (("question_id", 1.5), ("language", 3.0), ("paragraph", 2.0))
    }
    base = sum(np.stack([known[key] for key in frame[name]]) for name, known in directions.items())
    layers = np.arange(LAYERS)[:, None] > 0
    states = base[:, None] * layers + noise * generator.normal(size=(len(frame), LAYERS, WIDTH))
    return states.astype(np.float32)


@pytest.fixture(scope="module")
def states(frame):
    return states_of(frame)


@pytest.fixture(scope="module")
def correct(frame, states):
    return states[:, 1, 0] + states[:, 1, 1] > np.median(states[:, 1, 0] + states[:, 1, 1])


def work(frame, correct, names, settings):
    """What ``train_layer`` is given beside the states: the task, the probes, the settings."""
    probes = [get_probe(name) for name in names]
    return Task.from_examples(frame.assign(first_token_correct=correct), probes, settings), probes, settings


def components(x_train, x_test, n=5):
    scaler, pca = StandardScaler().fit(x_train), PCA(n)
    return pca.fit_transform(scaler.transform(x_train)), pca.transform(scaler.transform(x_test))


def test_language_and_correctness_are_those_of_hand_written_scikit_learn(frame, states, correct):
    settings = ProbeSettings(n_components=5, folds=4)
    found = train_layer(states[:, 1], *work(frame, correct, ("language", "correctness"), settings))
    languages = frame["language"].to_numpy()
    for fold, (train_rows, test_rows) in enumerate(GroupKFold(4).split(states, groups=frame["paragraph"])):
        z_train, z_test = components(states[train_rows, 1], states[test_rows, 1])
        model = LogisticRegression(max_iter=1000).fit(z_train, languages[train_rows])
        score, _, baseline, stopped = found.folds["language"][fold]
        assert score == pytest.approx(model.score(z_test, languages[test_rows]), abs=1e-9)
        assert baseline == pytest.approx(1 / 3)
        assert stopped == 0
        for language in LANGUAGES:
            mean = z_train[languages[train_rows] == language].mean(0)
            z_train[languages[train_rows] == language] -= mean
            z_test[languages[test_rows] == language] -= mean
        model = LogisticRegression(max_iter=1000).fit(z_train, correct[train_rows])
        wanted = roc_auc_score(correct[test_rows], model.predict_proba(z_test)[:, 1])
        assert found.folds["correctness"][fold][0] == pytest.approx(wanted, abs=1e-6)


def test_the_documented_estimators_are_the_ones_that_run(frame, states, correct):
    """Whole, as docs/method.md names them, on the same folds: equal to the last bit."""
    settings = ProbeSettings(n_components=5, folds=4)
    found = train_layer(states[:, 1], *work(frame, correct, ("language", "correctness"), settings)).folds
    languages = frame["language"].to_numpy()
    for fold, (train_rows, test_rows) in enumerate(GroupKFold(4).split(states, groups=frame["paragraph"])):
        x_train, x_test = states[train_rows, 1], states[test_rows, 1]
        model = language_probe(5, random_state=0).fit(x_train, languages[train_rows])
        assert found["language"][fold][0] == model.score(x_test, languages[test_rows])
        with sklearn.config_context(enable_metadata_routing=True):
            model = correctness_probe(5, random_state=0)
            model.fit(x_train, correct[train_rows], languages=languages[train_rows])
            values = model.decision_function(x_test, languages=languages[test_rows])
        assert found["correctness"][fold][0] == roc_auc_score(correct[test_rows], values)


def test_alignment_is_ridge_to_the_consensus_of_the_other_languages(frame, states, correct):
    """By hand for one paragraph that is held out: centre, map, rank by cosine among the paragraph's questions."""
    settings = ProbeSettings(n_components=5, folds=4, alpha=0.2)
    task, probes, _ = work(frame, correct, ("alignment",), settings)
    found = train_layer(states[:, 2], task, probes, settings).aligned
    wide = states[:, 2].astype(np.float64)
    cell = frame.groupby(["paragraph", "language"]).indices
    centred = wide.copy()
    for rows in cell.values():
        centred[rows] -= wide[rows].mean(0)
    consensus = np.zeros_like(centred)
    for rows in frame.groupby("question_id").indices.values():
        for i in rows:
            consensus[i] = np.mean([centred[j] for j in rows if j != i], 0)
    train_rows, test_rows = task.folds[1]
    z_train, z_test = components(centred[train_rows], centred[test_rows])
    predicted = Ridge(0.2 * len(train_rows)).fit(z_train, consensus[train_rows]).predict(z_test)
    for at, i in enumerate(test_rows):
        rows = cell[frame["paragraph"][i], frame["language"][i]]
        cosines = [predicted[at] @ consensus[j] / np.linalg.norm(consensus[j]) for j in rows]
        rank = 1 + sum(value > cosines[list(rows).index(i)] for value in cosines)
        assert found[i, 0] == pytest.approx(1 - np.log2(rank) / np.log2(len(rows)))


def test_what_is_there_is_found_and_what_is_not_is_not(tmp_path, frame, states, correct):
    stored = write_states(tmp_path, frame, states)
    scores, signals = train(stored, correct, settings=ProbeSettings(jobs=1))
    table = scores[scores["state"] == "prompt_end"].set_index(["probe", "layer"])
    assert table.loc[("language", 0), "score"] < 0.5 < 0.8 < table.loc[("language", 2), "score"]
    assert abs(table.loc[("language", 2), "control"] - 1 / 3) < 0.15
    assert table.loc[("correctness", 1), "score"] > 0.85
    assert abs(table.loc[("correctness", 0), "score"] - 0.5) < 0.2
    assert table.loc[("alignment", 2), "selectivity"] > 0.2
    assert abs(table.loc[("alignment", 0), "selectivity"]) < 0.15
    raw = paragraph_encoding(states[:12], frame["question_id"][:12].to_numpy(), frame["language"][:12].to_numpy())
    assert signals["encoding_probed"][:, 2].mean() > raw.control.mean() + 0.2
    assert signals["encoding_probed"].shape == (len(frame), LAYERS)
    assert np.allclose(
        signals["encoding_probed_selectivity"], signals["encoding_probed"] - signals["encoding_probed_control"]
    )


def test_little_memory_and_several_jobs_give_the_same_table(tmp_path, frame, states, correct):
    stored = write_states(tmp_path, frame, states)
    whole, signals = train(stored, correct, settings=ProbeSettings(jobs=1))
    told: list[tuple[int, int]] = []
    one_layer, same = train(stored, correct, progress=lambda *now: told.append(now), memory=1)
    pd.testing.assert_frame_equal(whole, one_layer)
    for name, values in signals.items():
        assert np.array_equal(values, same[name], equal_nan=True)
    assert told == [(at, 2 * LAYERS) for at in range(1, 2 * LAYERS + 1)]


def test_settings_are_probed_apart(tmp_path):
    frame = frame_of(("en-x", "x-x"))
    states = states_of(frame)
    correct = np.arange(len(frame)) % 3 == 0
    both, _ = train(write_states(tmp_path / "both", frame, states), correct, ("language",))
    half = len(frame) // 2
    one, _ = train(write_states(tmp_path / "one", frame[:half], states[:half]), correct[:half], ("language",))
    pd.testing.assert_frame_equal(both[both["setting"] == "en-x"].reset_index(drop=True), one)


@pytest.mark.parametrize(
    ("keep", "nothing"),
    [
        ({"language": ["en"]}, ("alignment", "language")),
        ({"paragraph": ["p0"]}, ("alignment", "language", "correctness")),
    ],
    ids=["one language", "one paragraph"],
)
def test_what_cannot_be_trained_is_nan(tmp_path, frame, states, correct, keep, nothing):
    ((column, values),) = keep.items()
    rows = np.flatnonzero(frame[column].isin(values))
    stored = write_states(tmp_path, frame.iloc[rows].reset_index(drop=True), states[rows])
    scores, _ = train(stored, correct[rows])
    for probe, part in scores.groupby("probe"):
        assert part["score"].isna().all() == (probe in nothing)
        assert (part["folds"] == 0).all() == (probe in nothing)


def test_torch_does_what_numpy_does():
    """The path that a GPU takes, on the CPU, in a process that has scikit-learn's array API switched on."""
    code = (
        "import sys, numpy as np, pandas as pd\n"
        "from test_training import frame_of, states_of, work\n"
        "from xprobe.probes.training import ProbeSettings, train_layer\n"
        "frame = frame_of(); states = states_of(frame)[:, 2]\n"
        "languages = frame['language'].to_numpy()\n"
        "centred = states - np.stack([states[languages == name].mean(0) for name in languages])\n"
        "along = centred @ np.linalg.svd(centred)[2][0]\n"  # labels that a probe can learn: no order hangs on rounding
        "correct = along > np.median(along)\n"
        "probes = ('alignment', 'language', 'correctness')\n"
        "found = []\n"
        "for device in ('cpu', 'cpu:0'):\n"
        "    settings = ProbeSettings(device=device, n_components=5)\n"
        "    found.append(train_layer(states, *work(frame, correct, probes, settings)))\n"
        "for name, folds in found[0].folds.items():\n"
        "    assert np.allclose(folds, found[1].folds[name], atol=0.03, equal_nan=True), name\n"
        "assert np.mean(np.isclose(found[0].aligned, found[1].aligned, atol=1e-3)) > 0.97\n"
    )
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, *(p for p in sys.path if p)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "SCIPY_ARRAY_API": "1", "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_device_without_the_array_api_says_what_to_do(frame, states, correct, monkeypatch):
    if os.environ.get("SCIPY_ARRAY_API"):
        pytest.skip("the array API is switched on here")
    settings = ProbeSettings(device="cpu:0")
    with pytest.raises(UsageError, match="SCIPY_ARRAY_API=1"):
        train_layer(states[:, 1], *work(frame, correct, ("language",), settings))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"folds": 1}, "folds"), ({"n_components": 0}, "n_components"), ({"alpha": 0.0}, "alpha"), ({"jobs": 0}, "jobs")],
)
def test_settings_that_mean_nothing_are_refused(options, word):
    with pytest.raises(UsageError, match=word):
        ProbeSettings(**options)
