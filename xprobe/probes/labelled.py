"""Scores of probes that have labels, on one fold of held-out paragraphs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from xprobe.probes.components import PrincipalComponents
from xprobe.probes.controls import Fold
from xprobe.probes.devices import array_api, to_device, to_numpy
from xprobe.probes.failures import naming_probe
from xprobe.probes.registry import Probe
from xprobe.probes.settings import ProbeSettings
from xprobe.probes.tasks import Task

NAN = float("nan")
# Steps that learn from the states alone, not from labels or languages. Fitting them takes most of the time.
SHARED_STEPS = (StandardScaler, PrincipalComponents)


class FoldScore(NamedTuple):
    """Scores of one probe on one fold; NaN where labels are all the same.

    Attributes
    ----------
    score, control : float
        With the labels, and with those of the control task.
    baseline : float
        Of an answer that looks at no state.
    not_converged : int
        Fits, of these two, that stopped before they converged.
    """

    score: float
    control: float
    baseline: float
    not_converged: int


def split_shared_steps(estimator: Any) -> tuple[Pipeline | None, Any]:
    """The leading steps of a pipeline that probes can share, None if there are none; and the rest of the estimator.

    Both hold the very steps of ``estimator``: once both are fitted, so is ``estimator``.

    Examples
    --------
    >>> from xprobe.probes.classification import language_probe
    >>> shared, own = split_shared_steps(language_probe())
    >>> list(shared.named_steps), list(own.named_steps)
    (['standardscaler', 'principalcomponents'], ['classifier'])
    >>> from sklearn.naive_bayes import GaussianNB
    >>> split_shared_steps(GaussianNB())
    (None, GaussianNB())
    """
    count = 0
    if isinstance(estimator, Pipeline):
        kinds = [type(step) in SHARED_STEPS for _, step in estimator.steps[:-1]]
        count = [*kinds, False].index(False)
    return (estimator[:count], estimator[count:]) if count else (None, estimator)


def score_fold(
    states: NDArray[np.float32],
    task: Task,
    fold: Fold,
    probes: Sequence[Probe],
    settings: ProbeSettings,
    place: Sequence[str] = (),
) -> dict[str, FoldScore]:
    """Trains ``probes`` on the training paragraphs of a fold and scores them on its test paragraphs.

    Parameters
    ----------
    states : array [n, D]
        Of one layer.
    task : Task of the same n examples
    fold : (training, test) indices
    probes : sequence of Probe
        With labels.
    settings : ProbeSettings
    place : sequence of str
        Setting, state, layer and fold, for the error of a probe that fails.

    Returns
    -------
    dict of str to FoldScore
        By the name of the probe.

    Raises
    ------
    ProbeError
        The estimator or the metric of a probe fails.

    Examples
    --------
    >>> import pandas as pd
    >>> from xprobe.probes.registry import get_probe
    >>> frame = pd.DataFrame({"language": ["en", "th"] * 4, "question_id": list("aabbccdd")})
    >>> frame["paragraph"] = list("ppppqqqq")
    >>> states = np.where(frame[["language"]] == "th", 1, 0) + np.zeros((8, 2), np.float32)
    >>> probes, settings = [get_probe("language")], ProbeSettings()
    >>> task = Task.from_examples(frame, probes, settings)
    >>> score_fold(states, task, task.folds[0], probes, settings)["language"].score
    1.0
    """
    train, test = fold
    if len(train) < 2:
        return {probe.name: FoldScore(NAN, NAN, NAN, 0) for probe in probes}
    inputs = _Inputs(states, fold, settings.device)
    scores = {}
    for probe in probes:
        labels = task.labels[probe.name]
        with (
            naming_probe(probe.name, *place),
            warnings.catch_warnings(record=True) as caught,
            array_api(settings.device),
        ):
            warnings.simplefilter("always", ConvergenceWarning)
            score = _score(probe, labels, settings, inputs, task, fold)
            control = _score(probe, labels[task.shuffled], settings, inputs, task, fold)
            baseline = float(probe.metric.baseline(labels[train], labels[test]))
        not_converged = sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        scores[probe.name] = FoldScore(score, control, baseline, not_converged)
    return scores


class _Inputs:
    """States of one fold, and what the shared steps make of them: fitted once for each kind of shared steps."""

    def __init__(self, states: NDArray, fold: Fold, device: str) -> None:
        self.states, self.fold, self.device = states, fold, device
        self._transformed: dict[Any, tuple[NDArray, NDArray]] = {}

    def transformed(self, shared: Pipeline | None) -> tuple[NDArray, NDArray]:
        """Training and test states after the steps ``shared``, which are fitted where they are new."""
        train, test = self.fold
        if shared is None:
            return self.states[train], self.states[test]
        key = tuple((type(step), *sorted(step.get_params().items())) for _, step in shared.steps)
        if key not in self._transformed:
            x_train = to_numpy(shared.fit_transform(to_device(self.states[train], self.device)))
            x_test = to_numpy(shared.transform(to_device(self.states[test], self.device)))
            for values in (x_train, x_test):
                values.flags.writeable = False  # they serve several probes: none may change them
            self._transformed[key] = x_train, x_test
        return self._transformed[key]


def _score(probe: Probe, labels: NDArray, settings: ProbeSettings, inputs: _Inputs, task: Task, fold: Fold) -> float:
    """Score of one fit on one fold; NaN where the labels are all the same."""
    train, test = fold
    y_train, y_test = labels[train], labels[test]
    metric = probe.metric
    if len(np.unique(y_train)) < 2 or (metric.needs_two_classes and len(np.unique(y_test)) < 2):
        return NAN
    shared, own = split_shared_steps(probe.estimator(settings))
    x_train, x_test = inputs.transformed(shared)
    if not probe.by_language:
        own.fit(x_train, y_train)
        return float(metric.score(own, x_test, y_test, {}))
    with sklearn.config_context(enable_metadata_routing=True):
        own.fit(x_train, y_train, languages=task.languages[train])
        return float(metric.score(own, x_test, y_test, {"languages": task.languages[test]}))
