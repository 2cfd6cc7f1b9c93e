"""Encoding: can a question be told apart, across languages, from the others on the same paragraph?

The candidates share the paragraph, so that the context cannot give the question away. docs/method.md, "Encoding".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# A centred state this small beside the state itself is rounding: it points nowhere
NOTHING = 1e-7
# Cosines of fp64 sums that differ by less are equal
TIE = 1e-9


@dataclass(frozen=True, eq=False)
class Retrieval:
    """How well N states find their own question among the M of their paragraph; each [N, K] over K layers.

    Attributes
    ----------
    encoding : float array
        ``1 - log2(rank) / log2(M)``, rank of the right consensus by cosine, ties at their middle. 0 to 1.
    control : float array
        The same when each question of the paragraph is taken for the right one in turn: the mean over all pairings.
    top1 : float array
        1 where the right one is ahead of all others, shared among those that tie; chance is 1 / M.
    margin : float array
        Cosine of the right one minus the mean of the others, -2 to 2; chance is 0.
    """

    encoding: Floats
    control: Floats
    top1: Floats
    margin: Floats

    @property
    def selectivity(self) -> Floats:
        """Encoding above its control."""
        return self.encoding - self.control


@dataclass(frozen=True, eq=False)
class Paragraph:
    """States of the examples on one paragraph in one setting, centred, with the consensus each can be compared to.

    A language with fewer than two questions on the paragraph has no centred state and takes no part.

    Attributes
    ----------
    states : float array [Q, G, K, D]
        State of question q in language g, minus the mean over that language's questions; 0 where there is none.
    present : bool array [Q, G]
    row : int array [Q, G]
        Index of the example that was given; -1 where there is none.
    """

    states: Floats
    present: NDArray[np.bool_]
    row: NDArray[np.int64]

    @classmethod
    def of(cls, states: NDArray, questions: NDArray, languages: NDArray) -> Paragraph:
        """From states [N, K, D] of the examples with these questions and languages, one example for each pair."""
        _, q = np.unique(questions, return_inverse=True)
        _, g = np.unique(languages, return_inverse=True)
        shape = (q.max() + 1, g.max() + 1)
        row = np.full(shape, -1)
        row[q, g] = np.arange(len(q))
        row[:, (row >= 0).sum(0) < 2] = -1
        present = row >= 0
        table = np.where(present[..., None, None], states[row], 0.0).astype(np.float64)
        size = np.linalg.norm(table, axis=-1)
        mean = table.sum(0) / np.maximum(present.sum(0), 1)[:, None, None]
        table = np.where(present[..., None, None], table - mean, 0.0)
        table[np.linalg.norm(table, axis=-1) <= NOTHING * size] = 0.0
        return cls(table, present, row)

    def consensus(self, language: int) -> tuple[Floats, NDArray[np.bool_]]:
        """Mean of the *other* languages' centred states of every question [Q, K, D], and which questions have one."""
        others = self.present.sum(1) - self.present[:, language]
        total = self.states.sum(1) - self.states[:, language]
        return total / np.maximum(others, 1)[:, None, None], others > 0


def retrieve(queries: Floats, candidates: Floats, right: NDArray[np.int64]) -> Retrieval:
    """Ranks candidates by their cosine with each query; an all-zero vector has cosine 0 with everything.

    Parameters
    ----------
    queries : array [N, K, D]
    candidates : array [M, K, D]
    right : int array [N]
        Which candidate is the right one of each query.
    """
    cosines = (_unit(queries).transpose(1, 0, 2) @ _unit(candidates).transpose(1, 2, 0)).transpose(1, 0, 2)
    n, _, m = cosines.shape
    if m < 2:
        nothing = np.full(cosines.shape[:2], np.nan)
        return Retrieval(nothing, nothing, nothing, nothing)
    apart = cosines[..., None, :] - cosines[..., :, None]  # [N, K, m, other]: by how much the other is ahead of m
    ahead = (apart > TIE).sum(-1)
    equal = (np.abs(apart) <= TIE).sum(-1) - 1
    encoding = 1 - np.log2(1 + ahead + equal / 2) / np.log2(m)
    top1 = np.where(ahead == 0, 1 / (1 + equal), 0.0)
    at = (np.arange(n)[:, None], np.arange(cosines.shape[1]), right[:, None])
    margin = cosines[at] - (cosines.sum(-1) - cosines[at]) / (m - 1)
    return Retrieval(encoding[at], encoding.mean(-1), top1[at], margin)


def paragraph_encoding(states: NDArray, questions: NDArray, languages: NDArray) -> Retrieval:
    """Encoding of every example of one paragraph in one setting.

    Parameters
    ----------
    states : array [N, K, D]
        One state per example and layer.
    questions, languages : arrays [N]

    Returns
    -------
    Retrieval
        NaN where it is not defined: a language with one question on the paragraph, a question in one language only,
        or fewer than two questions to choose from.
    """
    found = Retrieval(*(np.full(states.shape[:2], np.nan) for _ in range(4)))
    if not len(states):
        return found
    paragraph = Paragraph.of(states, questions, languages)
    for language in range(paragraph.present.shape[1]):
        candidates, known = paragraph.consensus(language)
        asked = np.flatnonzero(paragraph.present[:, language] & known)
        if not len(asked):
            continue
        place = np.cumsum(known) - 1  # of a question among the candidates
        part = retrieve(paragraph.states[asked, language], candidates[known], place[asked])
        rows = paragraph.row[asked, language]
        for name in vars(found):
            getattr(found, name)[rows] = getattr(part, name)
    return found


def _unit(vectors: Floats) -> Floats:
    size = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(size == 0, 1.0, size)
