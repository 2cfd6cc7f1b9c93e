"""Training gives the scores of hand-written scikit-learn on the same folds, whatever the memory and the processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from support.states import write_states

from xprobe.errors import ProbeError, UsageError
from xprobe.phases.encoding import paragraph_encoding
from xprobe.probes import training
from xprobe.probes.classification import correctness_probe, language_probe, preprocessing
from xprobe.probes.components import PrincipalComponents
from xprobe.probes.controls import majority
from xprobe.probes.registry import ACCURACY, Metric, Probe, get_probe
from xprobe.probes.settings import ProbeSettings
from xprobe.probes.states import StatesInMemory
from xprobe.probes.tasks import Task
from xprobe.probes.training import train, train_layer

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


def states_of(frame, seed=0, noise=1.0):
    """Question direction, offsets of language and paragraph, noise: [N, LAYERS, WIDTH]; noise alone at layer 0."""
    generator = np.random.default_rng(seed)
    directions = {
        name: {key: generator.normal(size=WIDTH) * size for key in frame[name].unique()}
        for name, size in (("question_id", 1.5), ("language", 3.0), ("paragraph", 2.0))
    }
    base = sum(np.stack([directions[name][key] for key in frame[name]]) for name in directions)
    layers = np.arange(LAYERS)[:, None] > 0
    states = base[:, None] * layers + noise * generator.normal(size=(len(frame), LAYERS, WIDTH))
    return states.astype(np.float32)


@pytest.fixture(scope="module")
def frame(states_and_frame):
    return states_and_frame[1]


@pytest.fixture(scope="module")
def states(states_and_frame):
    return states_and_frame[0]


@pytest.fixture(scope="module")
def states_and_frame():
    """States, and a frame whose answers are right where two numbers of the state at layer 1 are large."""
    frame = frame_of()
    states = states_of(frame)
    along = states[:, 1, 0] + states[:, 1, 1]
    return states, frame.assign(first_token_correct=along > np.median(along))


@pytest.fixture(scope="module")
def trained(frame, states):
    """Scores and signals of all built-in probes, each layer by itself, in one process."""
    return train(in_memory(frame, states), settings=ProbeSettings(jobs=1))


def in_memory(frame, states):
    """The same states at the prompt's end and over the question."""
    return StatesInMemory(frame.reset_index(drop=True), {"prompt_end": states, "question_mean": states})


def work(frame, names, settings):
    """What ``train_layer`` is given beside the states: the task, the probes, the settings."""
    probes = [get_probe(name) for name in names]
    return Task.from_examples(frame, probes, settings), probes, settings


def components(x_train, x_test, n=5):
    scaler, pca = StandardScaler().fit(x_train), PCA(n)
    return pca.fit_transform(scaler.transform(x_train)), pca.transform(scaler.transform(x_test))


# -- by hand --------------------------------------------------------------------------------------------------------


def test_language_and_correctness_are_those_of_hand_written_scikit_learn(frame, states):
    settings = ProbeSettings(n_components=5, folds=4)
    folds = train_layer(states[:, 1], *work(frame, ("language", "correctness"), settings)).folds
    languages, correct = frame["language"].to_numpy(), frame["first_token_correct"].to_numpy()
    for fold, (train_rows, test_rows) in enumerate(GroupKFold(4).split(states, groups=frame["paragraph"])):
        z_train, z_test = components(states[train_rows, 1], states[test_rows, 1])
        model = LogisticRegression(max_iter=1000).fit(z_train, languages[train_rows])
        score, _, baseline, not_converged = folds["language"][fold]
        assert score == pytest.approx(model.score(z_test, languages[test_rows]), abs=1e-9)
        assert baseline == pytest.approx(1 / 3)
        assert not_converged == 0
        for language in LANGUAGES:
            mean = z_train[languages[train_rows] == language].mean(0)
            z_train[languages[train_rows] == language] -= mean
            z_test[languages[test_rows] == language] -= mean
        model = LogisticRegression(max_iter=1000).fit(z_train, correct[train_rows])
        wanted = roc_auc_score(correct[test_rows], model.predict_proba(z_test)[:, 1])
        assert folds["correctness"][fold].score == pytest.approx(wanted, abs=1e-6)


def test_the_documented_estimators_are_the_ones_that_run(frame, states):
    """Whole, as docs/method.md names them, on the same folds: score and control are equal to the last bit."""
    settings = ProbeSettings(n_components=5, folds=4)
    task, *rest = work(frame, ("language", "correctness"), settings)
    folds = train_layer(states[:, 1], task, *rest).folds
    languages = frame["language"].to_numpy()
    for i, (train_rows, test_rows) in enumerate(GroupKFold(4).split(states, groups=frame["paragraph"])):
        x_train, x_test = states[train_rows, 1], states[test_rows, 1]
        for name, order in (("score", np.arange(len(frame))), ("control", task.shuffled)):
            labels = languages[order]
            model = language_probe(5, random_state=0).fit(x_train, labels[train_rows])
            assert getattr(folds["language"][i], name) == model.score(x_test, labels[test_rows])
            labels = frame["first_token_correct"].to_numpy()[order]
            with sklearn.config_context(enable_metadata_routing=True):
                model = correctness_probe(5, random_state=0)
                model.fit(x_train, labels[train_rows], languages=languages[train_rows])
                values = model.decision_function(x_test, languages=languages[test_rows])
            assert getattr(folds["correctness"][i], name) == roc_auc_score(labels[test_rows], values)


def test_the_table_holds_the_means_over_folds_and_the_selectivity(frame, states, trained):
    folds = train_layer(states[:, 1], *work(frame, ("correctness",), ProbeSettings())).folds["correctness"]
    table = trained[0].set_index(["state", "probe", "layer"])
    for state in ("prompt_end", "question_mean"):
        row = table.loc[(state, "correctness", 1)]
        assert row["score"] == np.mean([fold.score for fold in folds])
        assert row["control"] == np.mean([fold.control for fold in folds])
        assert row["selectivity"] == row["score"] - row["control"]
        assert (row["metric"], row["baseline"], row["folds"], row["n"]) == ("roc_auc", 0.5, 5, len(frame))


def test_alignment_is_ridge_to_the_consensus_of_the_other_languages(frame, states):
    """By hand for one paragraph that is held out: centre, map, rank by cosine among the paragraph's questions."""
    settings = ProbeSettings(n_components=5, folds=4, alpha=0.2)
    task, probes, _ = work(frame, ("alignment",), settings)
    aligned = train_layer(states[:, 2], task, probes, settings).aligned
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
    for prediction, i in zip(predicted, test_rows, strict=True):
        rows = cell[frame["paragraph"][i], frame["language"][i]]
        cosines = [prediction @ consensus[j] / np.linalg.norm(consensus[j]) for j in rows]
        rank = 1 + sum(value > cosines[list(rows).index(i)] for value in cosines)
        assert aligned[i, 0] == pytest.approx(1 - np.log2(rank) / np.log2(len(rows)))


# -- what is shared -------------------------------------------------------------------------------------------------


def test_probes_with_the_same_first_steps_share_them_and_others_do_not(frame, states, monkeypatch):
    fits = []
    fit = PrincipalComponents.fit
    monkeypatch.setattr(PrincipalComponents, "fit", lambda self, X, y=None: fits.append(len(X)) or fit(self, X, y))

    def probe(name, n_components):
        estimator = make_pipeline(*[step for _, step in preprocessing(n_components, 0).steps], LogisticRegression())
        return Probe(name, "", lambda settings: sklearn.clone(estimator), lambda e: e["language"].to_numpy())

    settings = ProbeSettings(folds=2)
    probes = [get_probe("language"), get_probe("correctness"), probe("same", 128), probe("fewer", 3)]
    train_layer(states[:, 1], Task.from_examples(frame, probes, settings), probes, settings)
    assert len(fits) == 2 * 2  # two folds, two beginnings; labels and control task share them


def test_the_scores_of_a_probe_do_not_depend_on_which_others_are_trained(frame, states, trained):
    alone, _ = train(in_memory(frame, states), ["correctness"])
    together = trained[0][trained[0]["probe"] == "correctness"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, together, check_exact=True)


# -- the whole stage ------------------------------------------------------------------------------------------------


def test_scores_are_high_where_states_carry_the_label_and_at_chance_elsewhere(frame, states, trained):
    scores, signals = trained
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


def test_states_in_a_run_folder_read_one_layer_at_a_time_give_the_same_table(tmp_path, frame, states, trained):
    whole, signals = trained
    calls: list[tuple[int, int]] = []
    scores, same = train(write_states(tmp_path, frame, states), progress=lambda *call: calls.append(call), memory=1)
    pd.testing.assert_frame_equal(whole, scores)
    for name, values in signals.items():
        assert np.array_equal(values, same[name], equal_nan=True)
    assert calls == [(done, 2 * LAYERS) for done in range(1, 2 * LAYERS + 1)]


def test_several_processes_give_the_same_table(frame, states, trained, monkeypatch):
    """A probe of one's own is known to the workers too: its row travels with the work."""
    own = Probe("own", "", lambda settings: language_probe(3), lambda examples: examples["language"].to_numpy())
    one, _ = train(in_memory(frame, states[:, 1:2]), ["correctness", own])
    monkeypatch.setattr(training, "SMALL", 0)
    several, _ = train(in_memory(frame, states[:, 1:2]), ["correctness", own], ProbeSettings(jobs=2))
    pd.testing.assert_frame_equal(one, several)


def test_each_setting_is_probed_by_itself():
    frame = frame_of(("en-x", "x-x"))
    states, half = states_of(frame), len(frame) // 2
    both, _ = train(in_memory(frame, states[:, :1]), ["language"])
    one, _ = train(in_memory(frame[:half], states[:half, :1]), ["language"])
    pd.testing.assert_frame_equal(both[both["setting"] == "en-x"].reset_index(drop=True), one)


@pytest.mark.parametrize(
    ("keep", "untrained"),
    [
        ({"language": ["en"]}, ("alignment", "language")),
        ({"paragraph": ["p0"]}, ("alignment", "language", "correctness")),
    ],
    ids=["one language", "one paragraph"],
)
def test_a_probe_that_cannot_be_trained_has_nan_scores(frame, states, keep, untrained):
    ((column, values),) = keep.items()
    rows = np.flatnonzero(frame[column].isin(values))
    scores, _ = train(in_memory(frame.iloc[rows], states[rows, :1]))
    for probe, part in scores.groupby("probe"):
        assert part["score"].isna().all() == (probe in untrained)
        assert (part["folds"] == 0).all() == (probe in untrained)


def test_control_tasks_stay_within_paragraphs_and_alignment_within_languages_too():
    """Paragraph a with language bc and paragraph ab with language c have the same joined name, and stay apart."""
    frame = pd.DataFrame({"paragraph": ["a", "ab"] * 4, "language": ["bc", "c"] * 4, "question_id": list("aabbccdd")})
    frame.loc[6:, "language"] = "de"
    for seed in range(5):
        task = Task.from_examples(frame, [], ProbeSettings(seed=seed))
        for order, columns in ((task.shuffled, ["paragraph"]), (task.paired, ["paragraph", "language"])):
            assert sorted(order) == list(range(8))
            assert (frame[columns].to_numpy()[order] == frame[columns].to_numpy()).all()


# -- failures -------------------------------------------------------------------------------------------------------


class Failing(LogisticRegression):
    def fit(self, X, y):
        raise ArithmeticError("no  fit\ntoday")


class WrongShape(LogisticRegression):
    def predict(self, X):
        return super().predict(X)[:-1]


class Unpicklable(ValueError):
    """Can be raised in a worker process, but not be sent back."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


class FailingStrangely(LogisticRegression):
    def fit(self, X, y):
        raise Unpicklable(1, 2)


def own(estimator=LogisticRegression, labels=lambda examples: examples["language"], metric=ACCURACY):
    return Probe("own", "", lambda settings: estimator(), labels, metric)


def refuse(*arguments):
    raise KeyError("absent")


PLACE = r"setting en-x, state prompt_end, layer 0, fold 1"
FAILURES = {
    "the estimator in fit": (own(Failing), rf"\({PLACE}\): ArithmeticError: no fit today", ArithmeticError),
    "the estimator in predict": (own(WrongShape), rf"\({PLACE}\): ValueError: .*inconsistent", ValueError),
    "the estimator's function": (own(refuse), rf"\({PLACE}\): KeyError: 'absent'", KeyError),
    "no estimator": (own(dict), rf"\({PLACE}\): AttributeError: .*'fit'", AttributeError),
    "the labels": (own(labels=refuse), r"\(labels, from the columns setting, .*\): KeyError: 'absent'", KeyError),
    "the metric": (own(metric=Metric("m", refuse, majority)), rf"\({PLACE}\): KeyError", KeyError),
    "the baseline": (own(metric=Metric("m", ACCURACY.score, refuse)), rf"\({PLACE}\): KeyError", KeyError),
    "a score that is no number": (own(metric=Metric("m", lambda *_: "x", majority)), rf"\({PLACE}\): Val", ValueError),
}


@pytest.mark.parametrize(("probe", "message", "cause"), FAILURES.values(), ids=FAILURES)
def test_a_probe_that_fails_is_named_with_its_place_and_its_cause(frame, states, probe, message, cause):
    with pytest.raises(ProbeError, match=rf"^probe 'own' failed {message}") as caught:
        train(in_memory(frame, states[:, :1]), ["language", probe])
    assert isinstance(caught.value.__cause__, cause)


def test_a_probe_that_fails_in_a_worker_process_is_named(frame, states, monkeypatch):
    monkeypatch.setattr(training, "SMALL", 0)
    with pytest.raises(ProbeError, match=rf"^probe 'own' failed \({PLACE}\): Unpicklable: 1 2$") as caught:
        train(in_memory(frame, states[:, :1]), [own(FailingStrangely)], ProbeSettings(jobs=2))
    assert "FailingStrangely" in str(caught.value.__cause__) or "Unpicklable" in str(caught.value.__cause__)


def test_a_probe_that_cannot_be_sent_to_a_worker_process_is_named(frame, states, monkeypatch):
    monkeypatch.setattr(training, "SMALL", 0)
    lock = threading.Lock()
    probe = Probe("own", "", lambda settings: lock and LogisticRegression(), lambda examples: examples["language"])
    with pytest.raises(ProbeError, match=r"^probe 'own' failed \(setting en-x, state prompt_end\): .*pickle"):
        train(in_memory(frame, states[:, :1]), [probe], ProbeSettings(jobs=2))


# -- devices and settings -------------------------------------------------------------------------------------------


def test_torch_gives_the_scores_of_numpy():
    """The path that a GPU takes, on the CPU, in a process that has scikit-learn's array API switched on."""
    code = (
        "import sys, numpy as np, pandas as pd\n"
        "from test_training import frame_of, states_of, work\n"
        "from xprobe.probes.settings import ProbeSettings\n"
        "from xprobe.probes.training import train_layer\n"
        "frame = frame_of(); states = states_of(frame)[:, 2]\n"
        "languages = frame['language'].to_numpy()\n"
        "centred = states - np.stack([states[languages == name].mean(0) for name in languages])\n"
        "along = centred @ np.linalg.svd(centred)[2][0]\n"  # labels that a probe can learn: rounding changes no order
        "frame['first_token_correct'] = along > np.median(along)\n"
        "probes = ('alignment', 'language', 'correctness')\n"
        "scores = []\n"
        "for device in ('cpu', 'cpu:0'):\n"
        "    settings = ProbeSettings(device=device, n_components=5)\n"
        "    scores.append(train_layer(states, *work(frame, probes, settings)))\n"
        "for name, folds in scores[0].folds.items():\n"
        "    assert np.allclose(folds, scores[1].folds[name], atol=0.03, equal_nan=True), name\n"
        "assert np.mean(np.isclose(scores[0].aligned, scores[1].aligned, atol=1e-3)) > 0.97\n"
    )
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, *(p for p in sys.path if p)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "SCIPY_ARRAY_API": "1", "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_device_without_the_array_api_says_what_to_do(frame, states):
    if os.environ.get("SCIPY_ARRAY_API"):
        pytest.skip("the array API is switched on here")
    settings = ProbeSettings(device="cpu:0")
    with pytest.raises(UsageError, match="SCIPY_ARRAY_API=1"):
        train_layer(states[:, 1], *work(frame, ("language",), settings))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"folds": 1}, "folds"), ({"n_components": 0}, "n_components"), ({"alpha": 0.0}, "alpha"), ({"jobs": 0}, "jobs")],
)
def test_settings_out_of_range_are_refused(options, word):
    with pytest.raises(UsageError, match=word):
        ProbeSettings(**options)
