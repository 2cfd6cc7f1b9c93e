"""The probes that xprobe knows: the built-in ones, and those that you register.

A ``Probe`` says what is trained, on which labels, and how it is scored. Names and descriptions of the built-in probes
stand in ``xprobe.config``: the command line shows them without loading scikit-learn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, roc_auc_score

from xprobe.config import BUILT_IN_PROBES, PROBES, check_probes
from xprobe.errors import UsageError
from xprobe.probes.alignment import AlignmentProbe
from xprobe.probes.classification import correctness_probe, language_probe
from xprobe.probes.controls import majority
from xprobe.probes.failures import naming_probe
from xprobe.probes.settings import ProbeSettings


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
        A new, unfitted estimator. If it is a pipeline that begins with the steps of
        ``xprobe.probes.classification.preprocessing``, these are fitted once for all probes of the same states.
    labels : callable (examples) -> array [n], optional
        From a data frame that describes the examples of one setting, one row each. Those of a run have the columns
        ``setting``, ``language``, ``question_id``, ``paragraph``, ``context_language``, ``prompt_tokens``,
        ``answer_tokens`` and ``first_token_correct``. None for alignment, whose target is the consensus of the other
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


def register(probe: Probe) -> None:
    """Adds a probe of your own. ``xprobe.run(probes=...)`` and ``train_probes`` know its name, in this process.

    Raises
    ------
    UsageError
        The object is no ``Probe``, one of its parts cannot be used, or its name is taken.

    Examples
    --------
    >>> register(Probe("language", "a second one", lambda settings: None, lambda examples: examples["language"]))
    Traceback (most recent call last):
        ...
    xprobe.errors.UsageError: a probe 'language' is there already: choose another name, or unregister it first
    """
    _check(probe)
    if probe.name in _PROBES:
        raise UsageError(f"a probe {probe.name!r} is there already: choose another name, or unregister it first")
    _PROBES[probe.name] = probe
    PROBES[probe.name] = probe.description


def _check(probe: Any) -> None:
    """Checks that a probe can be registered, but for whether its name is taken."""
    if not isinstance(probe, Probe):
        raise UsageError(f"register takes a Probe (xprobe.probes.Probe), got {probe!r}")
    name = probe.name
    if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z][\w-]*", name, re.ASCII) or name in ("all", "none"):
        raise UsageError(
            f"a probe cannot be called {name!r}: a name begins with a letter and has only letters (a to z), digits, _ "
            "and -; it is not 'all' or 'none'"
        )
    if not isinstance(probe.description, str):
        raise UsageError(f"probe {name!r}: description must be text, got {probe.description!r}")
    if not callable(probe.estimator):
        raise UsageError(
            f"probe {name!r}: estimator must be a function from ProbeSettings to a new scikit-learn estimator, got "
            f"{probe.estimator!r}"
        )
    if not callable(probe.labels):
        raise UsageError(
            f"probe {name!r}: labels must be a function from a data frame of examples to one label per row, got "
            f"{probe.labels!r}"
        )
    if not isinstance(probe.by_language, bool):
        raise UsageError(f"probe {name!r}: by_language must be True or False, got {probe.by_language!r}")
    if not isinstance(probe.metric, Metric):
        raise UsageError(f"probe {name!r}: metric must be a Metric (xprobe.probes.Metric), got {probe.metric!r}")


def unregister(name: str) -> None:
    """Removes a probe of your own.

    Raises
    ------
    UsageError
        No probe of your own has this name.

    Examples
    --------
    >>> unregister("language")
    Traceback (most recent call last):
        ...
    xprobe.errors.UsageError: probe 'language' is built in: it cannot be removed
    """
    if name in BUILT_IN_PROBES:
        raise UsageError(f"probe {name!r} is built in: it cannot be removed")
    if name not in _PROBES:
        own = ", ".join(known for known in _PROBES if known not in BUILT_IN_PROBES) or "none"
        raise UsageError(f"no probe {name!r} is registered; registered: {own}")
    del _PROBES[name]
    del PROBES[name]


def get_probe(name: str) -> Probe:
    """The probe of this name.

    Raises
    ------
    UsageError
        No probe has this name.

    Examples
    --------
    >>> get_probe("language").description
    'which language the question is in'
    """
    check_probes([name])
    return _PROBES[name]


def labels_of(probe: Probe, examples: pd.DataFrame) -> NDArray:
    """The labels of a probe [n], one for each row of ``examples``.

    A Series is aligned with ``examples`` by its index. Anything else is taken in the order of the rows.

    Raises
    ------
    UsageError
        The labels of the probe are not one for each row.
    ProbeError
        The function ``labels`` of the probe fails.

    Examples
    --------
    >>> labels_of(get_probe("language"), pd.DataFrame({"language": ["en", "th"]})).tolist()
    ['en', 'th']
    """
    if probe.labels is None:
        raise UsageError(f"probe {probe.name!r} has no labels")
    with naming_probe(probe.name, f"labels, from the columns {', '.join(map(str, examples.columns))}"):
        labels = probe.labels(examples.copy())  # a function may change its table; the other probes need it as it is
        if not isinstance(labels, pd.Series):
            labels = np.asarray(labels)
    expected = f"probe {probe.name!r} must give one label for each of {len(examples)} examples"
    if labels.shape != (len(examples),):
        raise UsageError(f"{expected}, gave an array of shape {labels.shape}")
    if isinstance(labels, pd.Series):
        if not labels.index.equals(examples.index):
            known = labels.index.is_unique and examples.index.is_unique and examples.index.isin(labels.index).all()
            if not known:
                raise UsageError(
                    f"{expected}, gave a Series with another index than the data frame it got: keep that index, or "
                    "give an array in the order of its rows"
                )
            labels = labels.loc[examples.index]
        labels = labels.to_numpy()
    missing = int(pd.isna(labels).sum())
    if missing:
        raise UsageError(f"{expected}, gave none (None or NaN) for {missing}")
    return labels


def definition_of(probe: Probe, settings: ProbeSettings, examples: pd.DataFrame) -> dict[str, str]:
    """What tells a probe from another one of the same name, as texts for ``manifest.json``.

    ``examples`` are those of the whole run: labels are made setting by setting, as for training.

    Examples
    --------
    >>> frame = pd.DataFrame({"setting": ["x-x"] * 2, "language": ["en", "th"]})
    >>> definition = definition_of(get_probe("language"), ProbeSettings(), frame)
    >>> definition["metric"], definition["labels_sha256"][:8]
    ('accuracy', 'd76c90df')
    """
    digest = hashlib.sha256()
    for _, rows in examples.groupby("setting", sort=False):
        digest.update(repr(labels_of(probe, rows).tolist()).encode())
    estimator = re.sub(r" at 0x[0-9a-f]+", "", repr(probe.estimator(settings)))  # an address differs in each process
    return {"estimator": estimator, "metric": probe.metric.name, "labels_sha256": digest.hexdigest()}
