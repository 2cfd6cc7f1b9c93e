"""The probes that xprobe knows: one row for each, and a place for those of your own.

The row of a probe drives everything: what is trained, how it is scored, the table ``probes.parquet``, the help text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, roc_auc_score

from xprobe.config import BUILT_IN_PROBES, PROBES
from xprobe.errors import UsageError
from xprobe.probes.alignment import AlignmentProbe
from xprobe.probes.classification import correctness_probe, language_probe
from xprobe.probes.controls import majority

if TYPE_CHECKING:
    from xprobe.probes.training import ProbeSettings


@dataclass(frozen=True)
class Metric:
    """How held-out examples are scored.

    Parameters
    ----------
    name : str
        As in the column ``metric``.
    score : callable (model, states, labels, params) -> float
        ``params``: keyword arguments for the model's own methods (``languages``).
    baseline : callable (training labels, test labels) -> float
        The score of an answer that looks at no state.
    needs_two_classes : bool
        Whether a test fold of one class has no score.
    """

    name: str
    score: Callable[[Any, NDArray, NDArray, dict[str, Any]], float]
    baseline: Callable[[NDArray, NDArray], float]
    needs_two_classes: bool = False


def _accuracy(model: Any, states: NDArray, labels: NDArray, params: dict[str, Any]) -> float:
    return float(accuracy_score(labels, model.predict(states, **params)))


def _roc_auc(model: Any, states: NDArray, labels: NDArray, params: dict[str, Any]) -> float:
    return float(roc_auc_score(labels, model.decision_function(states, **params)))


ACCURACY = Metric("accuracy", _accuracy, majority)
ROC_AUC = Metric("roc_auc", _roc_auc, lambda train, test: 0.5, needs_two_classes=True)


@dataclass(frozen=True)
class Probe:
    """One probe.

    Parameters
    ----------
    name : str
        As in the column ``probe``.
    description : str
        What it asks, for the help text: completes "NAME: ".
    estimator : callable (ProbeSettings) -> scikit-learn estimator
        A new, unfitted estimator. Where it is a pipeline that begins with ``xprobe.probes.classification.front``, that
        beginning is fitted once for all probes of the same states.
    labels : callable (examples) -> array [n], optional
        From the rows of the example table of one setting: ``language``, ``paragraph``, ``question_id``,
        ``first_token_correct``, ``answer_tokens``, ... None for alignment, whose target is the consensus of the other
        languages' states.
    metric : Metric
    by_language : bool
        Whether the estimator is given ``languages=`` when it is fitted and scored, to centre each language apart.

    Examples
    --------
    >>> from xprobe.probes.classification import language_probe
    >>> length = Probe(
    ...     "length",
    ...     "whether the answer is longer than one token",
    ...     lambda settings: language_probe(settings.n_components, settings.C, settings.seed),
    ...     lambda examples: (examples["answer_tokens"] > 1).to_numpy(),
    ... )
    >>> register(length)
    >>> get_probe("length").metric.name
    'accuracy'
    >>> unregister("length")
    """

    name: str
    description: str
    estimator: Callable[[ProbeSettings], Any]
    labels: Callable[[pd.DataFrame], NDArray] | None = None
    metric: Metric = ACCURACY
    by_language: bool = False


# what alignment is scored by is not a metric of labels: the retrieval of xprobe.phases.encoding
ENCODING = Metric("encoding", lambda *_: float("nan"), lambda *_: float("nan"))

_PROBES: dict[str, Probe] = {
    "alignment": Probe(
        "alignment",
        BUILT_IN_PROBES["alignment"],
        lambda settings: AlignmentProbe(settings.n_components, settings.alpha, settings.seed),
        metric=ENCODING,
    ),
    "language": Probe(
        "language",
        BUILT_IN_PROBES["language"],
        lambda settings: language_probe(settings.n_components, settings.C, settings.seed),
        lambda examples: examples["language"].to_numpy(str),
    ),
    "correctness": Probe(
        "correctness",
        BUILT_IN_PROBES["correctness"],
        lambda settings: correctness_probe(settings.n_components, settings.C, settings.seed),
        lambda examples: examples["first_token_correct"].to_numpy(bool),
        metric=ROC_AUC,
        by_language=True,
    ),
}


def register(new: Probe) -> None:
    """Adds a probe of one's own: from now on ``probes=`` and ``train_probes`` know its name, in this process.

    Raises
    ------
    UsageError
        The name is taken, or the probe has no labels.
    """
    if new.name in _PROBES:
        raise UsageError(f"a probe {new.name!r} is there already: choose another name, or unregister it first")
    if new.labels is None:
        raise UsageError(f"probe {new.name!r} has no labels: give a function from the example table to one per row")
    _PROBES[new.name] = new
    PROBES[new.name] = new.description


def unregister(name: str) -> None:
    """Takes a probe of one's own away again; the built-in ones stay."""
    if name in BUILT_IN_PROBES:
        raise UsageError(f"probe {name!r} is built in and stays")
    _PROBES.pop(name, None)
    PROBES.pop(name, None)


def get_probe(name: str) -> Probe:
    """The probe of this name.

    Raises
    ------
    UsageError
        There is none; names those there are.

    Examples
    --------
    >>> get_probe("language").description
    'which language the question is in'
    """
    if name not in _PROBES:
        raise UsageError(f"unknown probe {name!r}; available: {', '.join(_PROBES)}")
    return _PROBES[name]


def labels_of(row: Probe, examples: pd.DataFrame) -> NDArray:
    """The labels of a probe [n].

    Raises
    ------
    UsageError
        The probe's function gives something else than one label for each row.
    """
    assert row.labels is not None
    labels = np.asarray(row.labels(examples))
    if labels.shape != (len(examples),):
        raise UsageError(
            f"probe {row.name!r} must give one label for each of {len(examples)} examples, gave an array of shape "
            f"{labels.shape}"
        )
    return labels
