"""Scores of the alignment probe: is its prediction nearest to the consensus of the right question?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xprobe.phases.encoding import Paragraph, retrieve
from xprobe.probes.devices import array_api, to_device, to_numpy
from xprobe.probes.failures import naming_probe
from xprobe.probes.registry import Probe
from xprobe.probes.settings import ProbeSettings
from xprobe.probes.tasks import Task

Floats = NDArray[np.float64]
COLUMNS = ("encoding", "control", "top1", "margin")


def score_alignment(
    states: NDArray[np.float32], task: Task, probe: Probe, settings: ProbeSettings, place: Sequence[str] = ()
) -> Floats:
    """Scores of the alignment probe at one layer, of each example while its paragraph is held out.

    The control task pairs the questions of a paragraph wrongly, in training and in test. Each language has its own
    wrong pairs.

    Parameters
    ----------
    states : array [n, D]
        Of one layer.
    task : Task of the same n examples
    probe : Probe
        Without labels: its target is the consensus.
    settings : ProbeSettings
    place : sequence of str
        Setting, state and layer, for the error of a probe that fails.

    Returns
    -------
    array [n, 4]
        Encoding, encoding of the control task, top-1 and margin (``xprobe.phases.encoding.Retrieval``); NaN where an
        example has no consensus, or its paragraph has nothing to choose from.

    Raises
    ------
    ProbeError
        The estimator fails.

    Examples
    --------
    States that are the same in both languages, but for a shift:

    >>> import pandas as pd
    >>> from xprobe.probes.registry import get_probe
    >>> frame = pd.DataFrame([
    ...     {"language": language, "question_id": f"p{p}q{q}", "paragraph": f"p{p}"}
    ...     for p in range(5) for q in range(4) for language in ("en", "th")
    ... ])
    >>> shift = np.where(frame[["language"]] == "th", 9, 0)
    >>> states = shift + np.random.default_rng(0).normal(size=(20, 8)).repeat(2, axis=0)
    >>> alignment, settings = get_probe("alignment"), ProbeSettings()
    >>> task = Task.from_examples(frame, [alignment], settings)
    >>> scores = score_alignment(states, task, alignment, settings)
    >>> encoding, control = scores[:, 0].mean(), scores[:, 1].mean()
    >>> bool(encoding > control + 0.3)
    True
    """
    n, width = states.shape
    # y holds the targets of the probe, and beside them the targets of its control task: one fit for both
    x, y = np.zeros((n, width), np.float32), np.zeros((n, 2 * width), np.float32)
    usable = np.zeros(n, bool)
    for choice in candidate_sets(states, task, np.arange(n)):
        x[choice.examples], y[choice.examples, :width] = choice.queries, choice.candidates[choice.target]
        usable[choice.examples] = True
    paired = np.where(usable & usable[task.paired], task.paired, np.arange(n))
    y[:, width:] = y[paired, :width]
    scores = np.full((n, len(COLUMNS)), np.nan)
    for number, (train, test) in enumerate(task.folds, start=1):
        train = train[usable[train]]
        if len(train) < 2:
            continue
        with naming_probe(probe.name, *place, f"fold {number}"), array_api(settings.device):
            estimator = probe.estimator(settings)
            estimator.fit(to_device(x[train], settings.device), to_device(y[train], settings.device))
            predicted = to_numpy(estimator.predict(to_device(x[test], settings.device)))
        row_in_test = np.full(n, -1)
        row_in_test[test] = np.arange(len(test))
        for choice in candidate_sets(states, task, test):
            position = {example: i for i, example in enumerate(choice.examples.tolist())}
            wrong = choice.target[[position[example] for example in paired[choice.examples].tolist()]]
            predictions = predicted[row_in_test[choice.examples], None]
            candidates = choice.candidates[:, None]
            real = retrieve(predictions[..., :width], candidates, choice.target)
            control = retrieve(predictions[..., width:], candidates, wrong)
            columns = (real.encoding, control.encoding, real.top1, real.margin)
            scores[choice.examples] = np.concatenate(columns, axis=1)
    return scores


@dataclass(frozen=True, eq=False)
class CandidateSet:
    """The n examples on one paragraph in one language, and the M questions to choose from.

    Attributes
    ----------
    examples : int array [n]
    queries : array [n, D]
        Their states, centred per paragraph and language.
    candidates : array [M, D]
        The consensus of every question of the paragraph.
    target : int array [n]
        Which candidate is the right one.
    """

    examples: NDArray[np.int64]
    queries: Floats
    candidates: Floats
    target: NDArray[np.int64]


def candidate_sets(states: NDArray, task: Task, examples: NDArray[np.int64]) -> Iterator[CandidateSet]:
    """Candidate sets of the examples of whole paragraphs; examples that have nothing to choose from are left out.

    Examples
    --------
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"language": ["en", "de"] * 2, "question_id": list("aabb"), "paragraph": "p"})
    >>> task = Task.from_examples(frame, [], ProbeSettings())
    >>> states = np.array([[2.0], [7.0], [0.0], [3.0]])
    >>> english, german = sorted(candidate_sets(states, task, np.arange(4)), key=lambda choice: choice.examples[0])
    >>> english.examples.tolist(), english.queries.tolist()
    ([0, 2], [[1.0], [-1.0]])
    >>> english.candidates.tolist(), english.target.tolist()
    ([[2.0], [-2.0]], [0, 1])
    """
    names = task.paragraphs[examples]
    for name in np.unique(names):
        members = examples[names == name]
        paragraph = Paragraph.from_states(states[members][:, None], task.questions[members], task.languages[members])
        for language in range(paragraph.present.shape[1]):
            candidates, known = paragraph.consensus(language)
            asked = np.flatnonzero(paragraph.present[:, language] & known)
            if known.sum() >= 2 and len(asked):
                yield CandidateSet(
                    examples=members[paragraph.row[asked, language]],
                    queries=paragraph.states[asked, language, 0],
                    candidates=candidates[known, 0],
                    target=(np.cumsum(known) - 1)[asked],
                )
