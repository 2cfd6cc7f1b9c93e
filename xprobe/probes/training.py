"""The probing stage: trains every probe at every layer of a stored run, by folds of whole paragraphs.

States are read a few layers at a time and layers are trained in parallel. All that needs principal components of the
same states at the same layer and fold shares them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score

from xprobe.config import MAX_SEED, PROBE_COLUMNS, PROBES
from xprobe.errors import UsageError
from xprobe.phases.encoding import Paragraph, retrieve
from xprobe.probes.alignment import AlignmentProbe
from xprobe.probes.classification import classifier, front
from xprobe.probes.components import LanguageCenterer
from xprobe.probes.controls import Fold, fold_interval, majority, paragraph_folds, shuffle_within
from xprobe.runs.states import LAYER_BYTES, STATES, StoredStates

Floats = NDArray[np.float64]
METRICS = {"alignment": "encoding", "language": "accuracy", "correctness": "roc_auc"}


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
        if self.jobs == 0:
            raise UsageError("jobs must be -1 (all cores) or at least 1, got 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``manifest.json``; what changes no number is left out."""
        return {name: value for name, value in asdict(self).items() if name != "jobs"}


@dataclass(frozen=True, eq=False)
class Task:
    """What the examples of one setting are, apart from their states: arrays [n], and the folds."""

    languages: NDArray
    questions: NDArray
    paragraphs: NDArray
    correct: NDArray[np.bool_]
    folds: list[Fold]
    shuffled: NDArray[np.int64]  # labels' control task: a permutation within paragraphs
    paired: NDArray[np.int64]  # alignment's control task: a permutation within paragraph and language

    @classmethod
    def of(cls, part: pd.DataFrame, correct: NDArray[np.bool_], settings: ProbeSettings) -> Task:
        languages, paragraphs = part["language"].to_numpy(str), part["paragraph"].to_numpy(str)
        pairs = np.char.add(np.char.add(paragraphs, "\0"), languages)
        return cls(
            languages,
            part["question_id"].to_numpy(str),
            paragraphs,
            correct,
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
    stored: StoredStates,
    correct: NDArray[np.bool_],
    probes: tuple[str, ...] = tuple(PROBES),
    settings: ProbeSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory: int = LAYER_BYTES,
) -> tuple[pd.DataFrame, dict[str, Floats]]:
    """Trains ``probes`` at every layer, on every state, in every setting of a run.

    Parameters
    ----------
    stored : StoredStates of N examples
    correct : bool array [N]
        Whether the first answer token is on top at the last layer.
    probes : tuple of str
        Of ``alignment``, ``language``, ``correctness``.
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
    frame, n_layers = stored.frame, stored.n_layers
    signals: dict[str, Floats] = {}
    tables: list[dict[str, Any]] = []
    parts = frame.groupby("setting", sort=False).indices
    done, total = 0, len(parts) * len(STATES) * n_layers
    for setting, indices in parts.items():
        rows = np.asarray(indices)
        task = Task.of(frame.iloc[rows], correct[rows], settings)
        small = len(rows) * stored.width * n_layers < 1 << 22
        workers = Parallel(1 if small or settings.device != "cpu" else settings.jobs, return_as="generator")
        for state in STATES:
            for some, states in stored.layers(state, rows, memory):
                jobs = (delayed(train_layer)(states[at], task, probes, settings) for at in range(len(some)))
                for layer, found in zip(some, workers(jobs), strict=True):
                    tables += _rows({"setting": setting, "state": state, "layer": layer}, probes, found, task)
                    if found.aligned is not None:
                        _keep(signals, f"{STATES[state]}_probed", found.aligned, rows, layer, (len(frame), n_layers))
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
    states: NDArray[np.float32], task: Task, probes: tuple[str, ...], settings: ProbeSettings
) -> LayerScores:
    """Trains ``probes`` on the states [n, D] of one layer."""
    found: dict[str, list[tuple[float, float, float, int]]] = {name: [] for name in probes if name != "alignment"}
    aligned = align(states, task, settings) if "alignment" in probes and task.folds else None
    if found:
        with _where(settings):
            for fold in task.folds:
                for name, scores in _classify(states, task, fold, tuple(found), settings).items():
                    found[name].append(scores)
    return LayerScores(found, aligned)


def _classify(
    states: NDArray, task: Task, fold: Fold, probes: tuple[str, ...], settings: ProbeSettings
) -> dict[str, tuple[float, float, float, int]]:
    """(score, control, baseline, fits that did not converge) of each probe on one fold; scores are NaN where training
    or test labels are all the same."""
    train_rows, test_rows = fold
    if len(train_rows) < 2:
        return dict.fromkeys(probes, (float("nan"), float("nan"), float("nan"), 0))
    shared = front(settings.n_components, settings.seed)
    z_train = _numpy(shared.fit_transform(_place(states[train_rows], settings)))
    z_test = _numpy(shared.transform(_place(states[test_rows], settings)))
    found = {}
    for name in probes:
        labels = task.languages if name == "language" else task.correct
        x_train, x_test = z_train, z_test
        if name == "correctness":
            centre = LanguageCenterer().fit(z_train, languages=task.languages[train_rows])
            x_train = centre.transform(z_train, languages=task.languages[train_rows])
            x_test = centre.transform(z_test, languages=task.languages[test_rows])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            scores = [
                _score(name, x_train, some[train_rows], x_test, some[test_rows], settings)
                for some in (labels, labels[task.shuffled])
            ]
        stopped = sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        base = 0.5 if name == "correctness" else majority(labels[train_rows], labels[test_rows])
        found[name] = (scores[0], scores[1], base, stopped)
    return found


def _score(
    name: str, x_train: NDArray, y_train: NDArray, x_test: NDArray, y_test: NDArray, settings: ProbeSettings
) -> float:
    if len(np.unique(y_train)) < 2 or (name == "correctness" and len(np.unique(y_test)) < 2):
        return float("nan")
    model = classifier(settings.C).fit(x_train, y_train)
    if name == "correctness":
        return float(roc_auc_score(y_test, model.decision_function(x_test)))
    return float(model.score(x_test, y_test))


def align(states: NDArray[np.float32], task: Task, settings: ProbeSettings) -> Floats:
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
        probe = AlignmentProbe(settings.n_components, settings.alpha, settings.seed)
        with _where(settings):
            probe.fit(_place(x[some], settings), _place(y[some], settings))
            predicted = _numpy(probe.predict(_place(x[test], settings)))
        place = np.full(n, -1)
        place[test] = np.arange(len(test))
        for choice in _choices(states, task, test):
            own = predicted[place[choice.rows], None]
            where = {row: at for at, row in enumerate(choice.rows.tolist())}
            wrong = choice.right[[where[row] for row in paired[choice.rows].tolist()]]
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
        paragraph = Paragraph.of(states[members][:, None], task.questions[members], task.languages[members])
        for language in range(paragraph.present.shape[1]):
            candidates, known = paragraph.consensus(language)
            asked = np.flatnonzero(paragraph.present[:, language] & known)
            if known.sum() >= 2 and len(asked):
                rows = members[paragraph.row[asked, language]]
                right = (np.cumsum(known) - 1)[asked]
                yield _Choice(rows, paragraph.states[asked, language, 0], candidates[known, 0], right)


def _rows(where: dict[str, Any], probes: tuple[str, ...], found: LayerScores, task: Task) -> list[dict[str, Any]]:
    """Table rows of one layer and state."""
    rows = []
    for name in probes:
        if name == "alignment":
            values = found.aligned if found.aligned is not None else np.full((len(task.languages), 4), np.nan)
            with np.errstate(invalid="ignore"):
                folds = [_means(values[test, :2]) for _, test in task.folds]
            scores, controls = [f[0] for f in folds], [f[1] for f in folds]
            n = int((~np.isnan(values[:, 0])).sum())
            baseline, stopped = float("nan"), 0
        else:
            each = found.folds[name]
            scores, controls = [f[0] for f in each], [f[1] for f in each]
            baseline = float(np.mean([f[2] for f in each])) if each else float("nan")
            n, stopped = (len(task.languages) if each else 0), sum(f[3] for f in each)
        score, lo, hi = fold_interval(scores)
        control, control_lo, control_hi = fold_interval(controls)
        rows.append({
            **where, "probe": name, "metric": METRICS[name], "score": score, "lo": lo, "hi": hi, "baseline": baseline,
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
