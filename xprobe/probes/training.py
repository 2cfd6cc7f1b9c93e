"""Trains probes at every layer, on every state, in every setting, by folds of whole paragraphs.

States are read a few layers at a time, and layers are trained in parallel. ``train`` shows the whole way: states and
labels of a setting (``states``, ``tasks``), scores of one layer (``labelled``, ``consensus``), rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.config import DEFAULT_PROBES, PROBE_COLUMNS, STATES
from xprobe.probes.consensus import score_alignment
from xprobe.probes.controls import fold_interval
from xprobe.probes.failures import naming_probe
from xprobe.probes.labelled import FoldScore, score_fold
from xprobe.probes.registry import Probe, get_probe
from xprobe.probes.settings import ProbeSettings
from xprobe.probes.states import States
from xprobe.probes.tasks import Task

Floats = NDArray[np.float64]
LAYER_BYTES = 1 << 30  # of states held at a time
SMALL = 1 << 22  # numbers in the states of a setting: with fewer, worker processes cost more than they save


@dataclass(frozen=True, eq=False)
class LayerScores:
    """Scores of one layer and state.

    Attributes
    ----------
    folds : dict of str to list of FoldScore
        Of each probe that has labels.
    aligned : float array [n, 4], optional
        Of the alignment probe, example by example (``xprobe.probes.consensus.score_alignment``). None without this
        probe, and without folds.
    """

    folds: dict[str, list[FoldScore]]
    aligned: Floats | None


def train(
    states: States,
    probes: Sequence[str | Probe] = DEFAULT_PROBES,
    settings: ProbeSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory: int = LAYER_BYTES,
) -> tuple[pd.DataFrame, dict[str, Floats]]:
    """Trains ``probes`` at every layer, on every state, in every setting.

    Parameters
    ----------
    states : States of N examples
        Of a run (``xprobe.runs.states.StoredStates``), or your own (``xprobe.probes.states.StatesInMemory``). Their
        ``frame`` needs setting, language, question_id and paragraph, and first_token_correct for ``correctness``.
    probes : sequence of str or Probe
        Names of probes that are built in or registered, or the probes themselves.
    settings : ProbeSettings, optional
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

    Raises
    ------
    UsageError
        A probe is unknown, its labels cannot be used, or the device needs ``SCIPY_ARRAY_API=1``.
    ProbeError
        Labels, estimator or metric of a probe fail: names the probe, setting, state, layer and fold.

    Examples
    --------
    States that carry the language at layer 1 and nothing at layer 0:

    >>> from xprobe.probes.states import StatesInMemory
    >>> frame = pd.DataFrame([
    ...     {"setting": "en-x", "language": language, "question_id": f"p{p}q{q}", "paragraph": f"p{p}"}
    ...     for p in range(5) for q in range(2) for language in ("en", "th")
    ... ])
    >>> layers = np.zeros((20, 2, 3), np.float32)
    >>> layers[frame["language"] == "th", 1] = 1
    >>> mine = StatesInMemory(frame, {"prompt_end": layers, "question_mean": layers})
    >>> scores, _ = train(mine, ["language"])
    >>> scores.loc[scores["state"] == "prompt_end", ["layer", "score", "baseline", "folds"]]
       layer  score  baseline  folds
    0      0    0.5       0.5      5
    1      1    1.0       0.5      5
    """
    from joblib import Parallel, delayed

    settings = settings or ProbeSettings()
    chosen = tuple(get_probe(probe) if isinstance(probe, str) else probe for probe in probes)
    frame, n_layers = states.frame, states.n_layers
    signals: dict[str, Floats] = {}
    table: list[dict[str, Any]] = []
    examples_by_setting = frame.groupby("setting", sort=False).indices
    done, total = 0, len(examples_by_setting) * len(STATES) * n_layers
    for setting, indices in examples_by_setting.items():
        examples = np.asarray(indices)
        task = Task.from_examples(frame.iloc[examples], chosen, settings)
        in_this_process = len(examples) * states.width * n_layers < SMALL or settings.device != "cpu"
        workers = Parallel(1 if in_this_process else settings.jobs, return_as="generator")
        for state in STATES:
            for layers, arrays in states.layers(state, examples, memory):
                place = (f"setting {setting}", f"state {state}")
                jobs = (
                    delayed(train_layer)(array, task, chosen, settings, (*place, f"layer {layer}"))
                    for layer, array in zip(layers, arrays, strict=True)
                )
                for layer, scores in zip(layers, _results(workers(jobs), chosen, place), strict=True):
                    key = {"setting": setting, "state": state, "layer": layer}
                    table += [{**key, **_table_row(probe, scores, task)} for probe in chosen]
                    if scores.aligned is not None:
                        for name, values in _probed_signals(STATES[state], scores.aligned).items():
                            empty = np.full((len(frame), n_layers), np.nan)
                            signals.setdefault(name, empty)[examples, layer] = values
                    done += 1
                    if progress is not None:
                        progress(done, total)
    return pd.DataFrame(table, columns=list(PROBE_COLUMNS)), signals


def _results(scores: Iterator[LayerScores], probes: Sequence[Probe], place: Sequence[str]) -> Iterator[LayerScores]:
    """The scores as they arrive. An error of the workers themselves names the probes: one cannot be pickled, say."""
    names = "', '".join(probe.name for probe in probes)
    while True:
        with naming_probe(names, *place):
            layer = next(scores, None)
        if layer is None:
            return
        yield layer


def train_layer(
    states: NDArray[np.float32],
    task: Task,
    probes: Sequence[Probe],
    settings: ProbeSettings,
    place: Sequence[str] = (),
) -> LayerScores:
    """Trains ``probes`` on the states [n, D] of one layer. ``place`` is for the error of a probe that fails.

    Examples
    --------
    >>> frame = pd.DataFrame({"language": ["en", "th"] * 4, "question_id": list("aabbccdd")})
    >>> frame["paragraph"] = list("ppppqqqq")
    >>> states = np.where(frame[["language"]] == "th", 1, 0) + np.zeros((8, 2), np.float32)
    >>> probes, settings = [get_probe("language")], ProbeSettings()
    >>> scores = train_layer(states, Task.from_examples(frame, probes, settings), probes, settings)
    >>> [fold.score for fold in scores.folds["language"]]
    [1.0, 1.0]
    """
    labelled = [probe for probe in probes if probe.labels is not None]
    folds: dict[str, list[FoldScore]] = {probe.name: [] for probe in labelled}
    if labelled:
        for number, fold in enumerate(task.folds, start=1):
            fold_place = (*place, f"fold {number}")
            for name, score in score_fold(states, task, fold, labelled, settings, fold_place).items():
                folds[name].append(score)
    alignment = next((probe for probe in probes if probe.labels is None), None)
    if alignment is None or not task.folds:
        return LayerScores(folds, None)
    return LayerScores(folds, score_alignment(states, task, alignment, settings, place))


def _probed_signals(signal: str, aligned: Floats) -> dict[str, Floats]:
    """Signals of one layer from the scores of the alignment probe."""
    encoding, control = aligned[:, 0], aligned[:, 1]
    return {
        f"{signal}_probed": encoding,
        f"{signal}_probed_control": control,
        f"{signal}_probed_selectivity": encoding - control,
    }


def _table_row(probe: Probe, scores: LayerScores, task: Task) -> dict[str, Any]:
    """Columns of the probe table for one probe, layer and state."""
    if probe.labels is None:
        aligned = scores.aligned if scores.aligned is not None else np.full((len(task.languages), 4), np.nan)
        means = (_means(aligned[test, :2]) for _, test in task.folds)
        folds = [FoldScore(score, control, float("nan"), 0) for score, control in means]
        n = int((~np.isnan(aligned[:, 0])).sum())
    else:
        folds = scores.folds[probe.name]
        n = len(task.languages) if folds else 0
    score, lo, hi = fold_interval([fold.score for fold in folds])
    control, control_lo, control_hi = fold_interval([fold.control for fold in folds])
    return {
        "probe": probe.name,
        "metric": probe.metric.name,
        "score": score,
        "lo": lo,
        "hi": hi,
        "baseline": float(np.mean([fold.baseline for fold in folds])) if folds else float("nan"),
        "control": control,
        "control_lo": control_lo,
        "control_hi": control_hi,
        "selectivity": score - control,
        "folds": sum(not np.isnan(fold.score) for fold in folds),
        "n": n,
        "not_converged": sum(fold.not_converged for fold in folds),
    }


def _means(values: Floats) -> list[float]:
    """Means over the examples that have values, NaN where none has."""
    known = values[~np.isnan(values[:, 0])]
    return known.mean(0).tolist() if len(known) else [float("nan")] * values.shape[1]
