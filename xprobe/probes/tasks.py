"""What probes learn in one setting: labels, control tasks, and the folds that keep paragraphs apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.probes.controls import Fold, paragraph_folds, shuffle_within
from xprobe.probes.registry import Probe, labels_of
from xprobe.probes.settings import ProbeSettings


@dataclass(frozen=True, eq=False)
class Task:
    """What is known of the n examples of one setting, apart from their states.

    Attributes
    ----------
    languages, questions, paragraphs : arrays [n]
    labels : dict of str to array [n]
        By the name of the probe, for each probe that has labels.
    folds : list of (training, test) indices
        No paragraph lies in both.
    shuffled : int array [n]
        The control task of labels: example i gets the label of example ``shuffled[i]``, of the same paragraph.
    paired : int array [n]
        The control task of alignment: example i gets the question of example ``paired[i]``, of the same paragraph and
        language.

    Examples
    --------
    >>> from xprobe.probes.registry import get_probe
    >>> examples = pd.DataFrame({
    ...     "language": ["en", "de"] * 2, "question_id": ["a", "a", "b", "b"], "paragraph": ["p", "p", "q", "q"],
    ... })
    >>> task = Task.from_examples(examples, [get_probe("language")], ProbeSettings())
    >>> task.labels["language"].tolist()
    ['en', 'de', 'en', 'de']
    >>> [(train.tolist(), test.tolist()) for train, test in task.folds]
    [([0, 1], [2, 3]), ([2, 3], [0, 1])]
    """

    languages: NDArray
    questions: NDArray
    paragraphs: NDArray
    labels: dict[str, NDArray]
    folds: list[Fold]
    shuffled: NDArray[np.int64]
    paired: NDArray[np.int64]

    @classmethod
    def from_examples(cls, examples: pd.DataFrame, probes: Sequence[Probe], settings: ProbeSettings) -> Task:
        """From the rows that describe the examples of one setting.

        Raises
        ------
        UsageError
            The labels of a probe cannot be used.
        ProbeError
            The function ``labels`` of a probe fails.
        """
        languages, paragraphs = examples["language"].to_numpy(str), examples["paragraph"].to_numpy(str)
        return cls(
            languages=languages,
            questions=examples["question_id"].to_numpy(str),
            paragraphs=paragraphs,
            labels={probe.name: labels_of(probe, examples) for probe in probes if probe.labels is not None},
            folds=paragraph_folds(paragraphs, settings.folds),
            shuffled=shuffle_within(paragraphs, settings.seed),
            paired=shuffle_within(_pairs(paragraphs, languages), settings.seed),
        )


def _pairs(paragraphs: NDArray, languages: NDArray) -> NDArray:
    """A different text for each different pair of paragraph and language.

    The joined names stand first: their order fixes what a seed draws. The parts follow, because ("a", "bc") and
    ("ab", "c") have the same joined name.
    """
    joined = np.char.add(paragraphs, languages)
    for part in (paragraphs, languages):
        joined = np.char.add(np.char.add(joined, "\x1f"), part)
    return joined
