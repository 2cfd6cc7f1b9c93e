"""Trains probes at every layer of stored states, by folds of whole paragraphs.

States are read a few layers at a time and layers are trained in parallel. Probes that begin with the same scaler and
principal components share these for the same layer, state and fold.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline

from xprobe.arguments import check_jobs
from xprobe.config import BUILT_IN_PROBES, MAX_SEED, PROBE_COLUMNS, STATES
from xprobe.errors import UsageError
from xprobe.phases.encoding import Paragraph, retrieve
from xprobe.probes.classification import front
from xprobe.probes.controls import Fold, fold_interval, paragraph_folds, shuffle_within
from xprobe.probes.registry import Probe, get_probe, labels_of

Floats = NDArray[np.float64]
LAYER_BYTES = 1 << 30  # of states held at a time


class States(Protocol):
    """Stored states of N examples (``xprobe.runs.states.StoredStates``).

    ``layers`` gives states [K, n, D] of the examples in ``rows``, a few layers at a time, within ``limit`` bytes.
    """

    @property
    def frame(self) -> pd.DataFrame: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def width(self) -> int: ...

    def layers(
        self, state: str, rows: NDArray[np.int64], limit: int
    ) -> Iterator[tuple[range, NDArray[np.float32]]]: ...


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are trained.

    Parameters
    ----------
    folds : int
        Of whole paragraphs; fewer where there are fewer paragraphs.
    n_components : int
        Most principal components that a probe sees.
    alpha : float
        Ridge penalty of the alignment probe, per training sample.
    C : float
        Inverse penalty of the logistic regressions.
    seed : int
        Of the control tasks and the randomised principal components.
    jobs : int
        Layers trained at the same time; -1: as many as there are cores.
    device : str
        ``cpu``, or a torch device: products, components and regressions then run there, through scikit-learn's
        array API. Needs the environment variable ``SCIPY_ARRAY_API=1`` set before scipy is imported.
    """

    folds: int = 5
    n_components: int = 128
    alpha: float = 0.1
    C: float = 1.0
    seed: int = 0
    jobs: int = -1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least, most in (("folds", 2, None), ("n_components", 1, None), ("seed", 0, MAX_SEED)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < least or (most is not None and value > most):
                limit = f"at least {least}" if most is None else f"{least} to {most}"
                raise UsageError(f"{name} must be a whole number of {limit}, got {value!r}")
        for name in ("alpha", "C"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be a finite number above 0, got {value!r}")
        check_jobs(self.jobs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``manifest.json``; what changes no number is left out."""
        return {name: value for name, value in asdict(self).items() if name != "jobs"}


@dataclass(frozen=True, eq=False)
class Task:
    """What the examples of one setting are, apart from their states: arrays [n], and the folds."""

    languages: NDArray
    questions: NDArray
    paragraphs: NDArray
    labels: dict[str, NDArray]  # of each classifying probe
    folds: list[Fold]
    shuffled: NDArray[np.int64]  # labels' control task: a permutation within paragraphs
    paired: NDArray[np.int64]  # alignment's control task: a permutation within paragraph and language

    @classmethod
    def from_examples(cls, part: pd.DataFrame, probes: Sequence[Probe], settings: ProbeSettings) -> Task:
        """From the rows of the example table of one setting."""
        languages, paragraphs = part["language"].to_numpy(str), part["paragraph"].to_numpy(str)
        pairs = np.char.add(np.char.add(paragraphs, "\0"), languages)
        return cls(
            languages,
            part["question_id"].to_numpy(str),
            paragraphs,
            {row.name: labels_of(row, part) for row in probes if row.labels is not None},
            paragraph_folds(paragraphs, settings.folds),
            shuffle_within(paragraphs, settings.seed),
            shuffle_within(pairs, settings.seed),
        )


@dataclass(frozen=True, eq=False)
class LayerScores:
    """Of one layer and state: fold by fold (score, control, baseline, fits that did not converge) of each classifying
    probe, and the alignment probe's values on held-out examples, as columns (encoding, its control, top1, margin)
    [n, 4]."""

    folds: dict[str, list[tuple[float, float, float, int]]]
    aligned: Floats | None


def train(
    stored: States,
    correct: NDArray[np.bool_],
    probes: tuple[str, ...] = tuple(BUILT_IN_PROBES),
    settings: ProbeSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory: int = LAYER_BYTES,
) -> tuple[pd.DataFrame, dict[str, Floats]]:
    """Trains ``probes`` at every layer, on every state, in every setting of a run.

    Parameters
    ----------
    stored : States of N examples
    correct : bool array [N]
        Whether the first answer token is on top at the last layer: the column ``first_token_correct`` of the examples
        that a probe's ``labels`` are given.
    probes : tuple of str
        Names of registered probes (``xprobe.probes.registry``).
    progress : callable (layers done, layers in all), optional
    memory : int
        Bytes of states to hold at a time.

    Returns
    -------
    scores : DataFrame
        Columns ``xprobe.config.PROBE_COLUMNS``; NaN where a probe cannot be trained (one language, one paragraph, one
        class).
    signals : dict of str to float array [N, L + 1]
        ``encoding_probed`` and ``encoding_question_probed`` with their ``_control`` and ``_selectivity``, of each
        example while its paragraph was held out; {} without ``alignment``.
    """
    from joblib import Parallel, delayed

    settings = settings or ProbeSettings()
    chosen = tuple(get_probe(name) for name in probes)
    frame, n_layers = stored.frame.assign(first_token_correct=correct), stored.n_layers
    signals: dict[str, Floats] = {}
    tables: list[dict[str, Any]] = []
    parts = frame.groupby("setting", sort=False).indices
    done, total = 0, len(parts) * len(STATES) * n_layers
    for setting, indices in parts.items():
        rows = np.asarray(indices)
        task = Task.from_examples(frame.iloc[rows], chosen, settings)
        small = len(rows) * stored.width * n_layers < 1 << 22
        workers = Parallel(1 if small or settings.device != "cpu" else settings.jobs, return_as="generator")
        for state in STATES:
            for layers, states in stored.layers(state, rows, memory):
                jobs = (delayed(train_layer)(states[i], task, chosen, settings) for i in range(len(layers)))
                for layer, scores in zip(layers, workers(jobs), strict=True):
                    tables += _rows({"setting": setting, "state": state, "layer": layer}, chosen, scores, task)
                    if scores.aligned is not None:
                        _keep(signals, f"{STATES[state]}_probed", scores.aligned, rows, layer, (len(frame), n_layers))
                    done += 1
                    if progress is not None:
                        progress(done, total)
    return pd.DataFrame(tables, columns=list(PROBE_COLUMNS)), signals


def _keep(
    signals: dict[str, Floats], name: str, aligned: Floats, rows: NDArray[np.int64], layer: int, shape: tuple[int, int]
) -> None:
    """Enters one layer's values of the alignment probe into the signals of all examples."""
    values = {"": aligned[:, 0], "_control": aligned[:, 1], "_selectivity": aligned[:, 0] - aligned[:, 1]}
    for suffix, column in values.items():
        signals.setdefault(name + suffix, np.full(shape, np.nan))[rows, layer] = column


def train_layer(
    states: NDArray[np.float32], task: Task, probes: Sequence[Probe], settings: ProbeSettings
) -> LayerScores:
    """Trains ``probes`` on the states [n, D] of one layer."""
    classifying = [row for row in probes if row.labels is not None]
    folds: dict[str, list[tuple[float, float, float, int]]] = {row.name: [] for row in classifying}
    aligning = [row for row in probes if row.labels is None]
    aligned = align(states, task, aligning[0], settings) if aligning and task.folds else None
    if classifying:
        with _where(settings):
            for fold in task.folds:
                for name, scores in _classify(states, task, fold, classifying, settings).items():
                    folds[name].append(scores)
    return LayerScores(folds, aligned)


def _classify(
    states: NDArray, task: Task, fold: Fold, probes: Sequence[Probe], settings: ProbeSettings
) -> dict[str, tuple[float, float, float, int]]:
    """(score, control, baseline, fits that did not converge) of each probe on one fold; scores are NaN where training
    or test labels are all the same."""
    train_rows, test_rows = fold
    if len(train_rows) < 2:
        return {row.name: (float("nan"), float("nan"), float("nan"), 0) for row in probes}
    components: tuple[NDArray, NDArray] | None = None
    results = {}
    for row in probes:
        labels = task.labels[row.name]
        whole = row.estimator(settings)
        begins_alike = _begins_with_front(whole, settings)
        if begins_alike and components is None:
            shared = front(settings.n_components, settings.seed)
            components = (
                _numpy(shared.fit_transform(_place(states[train_rows], settings))),
                _numpy(shared.transform(_place(states[test_rows], settings))),
            )
        x_train, x_test = components if begins_alike and components else (states[train_rows], states[test_rows])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            scores = []
            for some in (labels, labels[task.shuffled]):
                estimator = row.estimator(settings)
                if begins_alike:
                    estimator = estimator[_FRONT_STEPS:]
                scores.append(_score(row, estimator, x_train, x_test, some, task.languages, fold))
        stopped = sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        baseline = row.metric.baseline(labels[train_rows], labels[test_rows])
        results[row.name] = (scores[0], scores[1], baseline, stopped)
    return results


_FRONT_STEPS = 2  # of ``front``


def _begins_with_front(estimator: Any, settings: ProbeSettings) -> bool:
    """Whether an estimator is a pipeline whose first steps are those of ``front``, with the same parameters."""
    if not isinstance(estimator, Pipeline) or len(estimator.steps) <= _FRONT_STEPS:
        return False
    usual = front(settings.n_components, settings.seed)
    pairs = zip(estimator.steps[:_FRONT_STEPS], usual.steps, strict=True)
    return all(type(own) is type(step) and own.get_params() == step.get_params() for (_, own), (_, step) in pairs)


def _score(
    row: Probe, estimator: Any, x_train: NDArray, x_test: NDArray, labels: NDArray, languages: NDArray, fold: Fold
) -> float:
    import sklearn

    train_rows, test_rows = fold
    y_train, y_test = labels[train_rows], labels[test_rows]
    if len(np.unique(y_train)) < 2 or (row.metric.needs_two_classes and len(np.unique(y_test)) < 2):
        return float("nan")
    if not row.by_language:
        return row.metric.score(estimator.fit(x_train, y_train), x_test, y_test, {})
    with sklearn.config_context(enable_metadata_routing=True):
        estimator.fit(x_train, y_train, languages=languages[train_rows])
        return row.metric.score(estimator, x_test, y_test, {"languages": languages[test_rows]})


def align(states: NDArray[np.float32], task: Task, row: Probe, settings: ProbeSettings) -> Floats:
    """Encoding, its trained control, top-1 and margin [n, 4] of the alignment probe, each example held out.

    The control task pairs the questions of a paragraph wrongly, anew in every language, in training and test.
    """
    n, width = states.shape
    x, y = np.zeros((n, width), np.float32), np.zeros((n, 2 * width), np.float32)
    usable = np.zeros(n, bool)
    for choice in _choices(states, task, np.arange(n)):
        x[choice.rows], y[choice.rows, :width] = choice.queries, choice.candidates[choice.right]
        usable[choice.rows] = True
    paired = np.where(usable & usable[task.paired], task.paired, np.arange(n))
    y[:, width:] = y[paired, :width]
    found = np.full((n, 4), np.nan)
    for train, test in task.folds:
        some = train[usable[train]]
        if len(some) < 2:
            continue
        estimator = row.estimator(settings)
        with _where(settings):
            estimator.fit(_place(x[some], settings), _place(y[some], settings))
            predicted = _numpy(estimator.predict(_place(x[test], settings)))
        place = np.full(n, -1)
        place[test] = np.arange(len(test))
        for choice in _choices(states, task, test):
            own = predicted[place[choice.rows], None]
            position = {example: i for i, example in enumerate(choice.rows.tolist())}
            wrong = choice.right[[position[example] for example in paired[choice.rows].tolist()]]
            real = retrieve(own[..., :width], choice.candidates[:, None], choice.right)
            control = retrieve(own[..., width:], choice.candidates[:, None], wrong)
            columns = (real.encoding, control.encoding, real.top1, real.margin)
            found[choice.rows] = np.concatenate(columns, axis=1)
    return found


@dataclass(frozen=True, eq=False)
class _Choice:
    """Examples on one paragraph in one language: their centred states, the consensus of every question to choose from,
    and which is the right one."""

    rows: NDArray[np.int64]
    queries: Floats
    candidates: Floats
    right: NDArray[np.int64]


def _choices(states: NDArray, task: Task, some: NDArray[np.int64]) -> Iterator[_Choice]:
    """Of the examples ``some``, whole paragraphs; those that have nothing to choose from are left out."""
    names = task.paragraphs[some]
    for name in np.unique(names):
        members = some[names == name]
        paragraph = Paragraph.from_states(states[members][:, None], task.questions[members], task.languages[members])
        for language in range(paragraph.present.shape[1]):
            candidates, known = paragraph.consensus(language)
            asked = np.flatnonzero(paragraph.present[:, language] & known)
            if known.sum() >= 2 and len(asked):
                rows = members[paragraph.row[asked, language]]
                right = (np.cumsum(known) - 1)[asked]
                yield _Choice(rows, paragraph.states[asked, language, 0], candidates[known, 0], right)


def _rows(place: dict[str, Any], probes: Sequence[Probe], scored: LayerScores, task: Task) -> list[dict[str, Any]]:
    """Table rows of one layer and state."""
    rows = []
    for probe in probes:
        if probe.labels is None:
            values = scored.aligned if scored.aligned is not None else np.full((len(task.languages), 4), np.nan)
            with np.errstate(invalid="ignore"):
                folds = [_means(values[test, :2]) for _, test in task.folds]
            scores, controls = [f[0] for f in folds], [f[1] for f in folds]
            n = int((~np.isnan(values[:, 0])).sum())
            baseline, stopped = float("nan"), 0
        else:
            each = scored.folds[probe.name]
            scores, controls = [f[0] for f in each], [f[1] for f in each]
            baseline = float(np.mean([f[2] for f in each])) if each else float("nan")
            n, stopped = (len(task.languages) if each else 0), sum(f[3] for f in each)
        score, lo, hi = fold_interval(scores)
        control, control_lo, control_hi = fold_interval(controls)
        rows.append({
            **place, "probe": probe.name, "metric": probe.metric.name, "score": score, "lo": lo,
            "hi": hi, "baseline": baseline,
            "control": control, "control_lo": control_lo, "control_hi": control_hi, "selectivity": score - control,
            "folds": int((~np.isnan(np.array(scores, dtype=float))).sum()), "n": n,
            "not_converged": stopped,
        })  # fmt: skip
    return rows


def _means(values: Floats) -> list[float]:
    known = values[~np.isnan(values[:, 0])]
    return known.mean(0).tolist() if len(known) else [float("nan")] * values.shape[1]


@contextmanager
def _where(settings: ProbeSettings) -> Iterator[None]:
    """scikit-learn set up for the device of ``settings``, for this thread and time only."""
    import sklearn

    if settings.device == "cpu":
        yield
        return
    try:
        with sklearn.config_context(array_api_dispatch=True):
            yield
    except RuntimeError as error:
        if "SCIPY_ARRAY_API" not in str(error):
            raise
        raise UsageError(
            f"probes on {settings.device} need the environment variable SCIPY_ARRAY_API=1, set before Python starts"
        ) from error


def _place(values: NDArray, settings: ProbeSettings) -> Any:
    if settings.device == "cpu":
        return values
    import torch

    return torch.as_tensor(np.ascontiguousarray(values), dtype=torch.float32, device=settings.device)


def _numpy(values: Any) -> NDArray:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()
