"""Encoding: is a question told apart, across languages, from the other questions on its paragraph?

The candidates share the paragraph, so that the context cannot give the question away. docs/method.md, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# A centred state that is smaller than this share of the state itself is rounding, and is taken for zero
ROUNDING = 1e-7
# Cosines that differ by less are equal: they are computed in fp64
TIE = 1e-9
# Memory of the temporary arrays: this much for the centred states of a few layers, as much for their cosines
BLOCK_BYTES = 32 << 20
# Temporary arrays of the size of a block that exist at the same time
COPIES = 8


@dataclass(frozen=True, eq=False)
class Retrieval:
    """How well N states find their own question among the M of their paragraph; each [N, K] over K layers.

    Attributes
    ----------
    encoding : float array
        ``1 - log2(rank) / log2(M)``, 0 to 1: rank of the target by cosine; ties get their middle rank.
    control : float array
        Mean of the same over all M candidates, each taken for the target.
    top1 : float array
        1 where the target is ahead of all others, 1 / n where it ties with n - 1 others at the top; chance is 1 / M.
    margin : float array
        Cosine of the target minus the mean of the others, -2 to 2; chance is 0.

    Examples
    --------
    >>> Retrieval.undefined(2, 1).encoding.tolist()
    [[nan], [nan]]
    """

    encoding: Floats
    control: Floats
    top1: Floats
    margin: Floats

    @classmethod
    def undefined(cls, n: int, n_layers: int) -> Retrieval:
        """Arrays [n, n_layers] of NaN, to be filled in."""
        return cls(*(np.full((n, n_layers), np.nan) for _ in range(4)))

    @property
    def selectivity(self) -> Floats:
        """Encoding above its control."""
        return self.encoding - self.control


@dataclass(frozen=True, eq=False)
class Paragraph:
    """States of the examples on one paragraph in one setting, centred, with the consensus each can be compared to.

    A language with fewer than two questions on the paragraph has no centred state and takes no part. The states are
    fp64: for many questions, languages and layers, make one ``Paragraph`` for each few layers.

    Attributes
    ----------
    states : float array [Q, G, K, D]
        State of question q in language g, minus the mean over that language's questions; 0 where there is none.
    present : bool array [Q, G]
    row : int array [Q, G]
        Index of the example that was given; -1 where there is none.

    Examples
    --------
    >>> questions, languages = np.array(["a", "a", "b", "b"]), np.array(["en", "de", "en", "de"])
    >>> paragraph = Paragraph.from_states(np.array([[[2.0]], [[7.0]], [[0.0]], [[3.0]]]), questions, languages)
    >>> paragraph.states[..., 0, 0].tolist()  # question x language: de, en
    [[2.0, 1.0], [-2.0, -1.0]]
    >>> consensus, known = paragraph.consensus(0)  # of German: English alone
    >>> consensus[..., 0, 0].tolist(), known.tolist()
    ([1.0, -1.0], [True, True])
    """

    states: Floats
    present: NDArray[np.bool_]
    row: NDArray[np.int64]

    @classmethod
    def from_states(cls, states: NDArray, questions: NDArray, languages: NDArray) -> Paragraph:
        """From states [N, K, D] of the examples with these questions and languages, one example for each pair."""
        _, q = np.unique(questions, return_inverse=True)
        _, g = np.unique(languages, return_inverse=True)
        shape = (q.max() + 1, g.max() + 1)
        row = np.full(shape, -1)
        row[q, g] = np.arange(len(q))
        row[:, (row >= 0).sum(0) < 2] = -1
        present = row >= 0
        centred = np.zeros((*shape, *states.shape[1:]))
        centred[present] = states[row[present]]
        norms = _norms(centred)
        centred -= centred.sum(0) / np.maximum(present.sum(0), 1)[:, None, None]
        centred[~present] = 0.0
        centred[_norms(centred) <= ROUNDING * norms] = 0.0
        return cls(centred, present, row)

    @cached_property
    def total(self) -> Floats:
        """Sum over languages of the centred states of every question [Q, K, D]."""
        return self.states.sum(1)

    def consensus(self, language: int) -> tuple[Floats, NDArray[np.bool_]]:
        """Mean of the centred states of every question in the *other* languages [Q, K, D]; which questions have one."""
        others = self.present.sum(1) - self.present[:, language]
        total = self.total - self.states[:, language]
        return total / np.maximum(others, 1)[:, None, None], others > 0


def retrieve(queries: Floats, candidates: Floats, target: NDArray[np.int64]) -> Retrieval:
    """Ranks candidates by their cosine with each query; an all-zero vector has cosine 0 with everything.

    Time per layer is that of one product [N, D] x [D, M] and of sorting N rows of M cosines. The temporary arrays take
    at most ``BLOCK_BYTES``, or about three times one layer's vectors where these are more.

    Parameters
    ----------
    queries : array [N, K, D]
    candidates : array [M, K, D]
    target : int array [N]
        Which candidate is the right one of each query.

    Returns
    -------
    Retrieval
        NaN with fewer than two candidates, and where a cosine is not a number.

    Examples
    --------
    One query at one layer. Of three candidates the target is second:

    >>> candidates = np.array([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 1.0]]])
    >>> retrieval = retrieve(np.array([[[2.0, 0.1]]]), candidates, target=np.array([1]))
    >>> retrieval.encoding.round(2).tolist(), retrieval.top1.tolist()
    ([[0.37]], [[0.0]])
    """
    (n, n_layers, width), m = queries.shape, len(candidates)
    retrieval = Retrieval.undefined(n, n_layers)
    if m < 2:
        return retrieval
    for layers in _blocks(n_layers, max((n + m) * width, n * m)):
        left = _unit(queries[:, layers]).transpose(1, 0, 2)  # [K, N, D]
        right = _unit(candidates[:, layers]).transpose(1, 2, 0)  # [K, D, M]
        for rows in _blocks(n, len(left) * m):
            block = _ranked(left[:, rows] @ right, target[rows])
            for name, values in vars(block).items():
                getattr(retrieval, name)[rows, layers] = values.T
    return retrieval


def paragraph_encoding(states: NDArray, questions: NDArray, languages: NDArray) -> Retrieval:
    """Encoding of every example of one paragraph in one setting.

    With M questions in G languages, time per layer is that of G products [M, D] x [D, M] and of sorting G M rows of M
    cosines. Beside the states given and the values returned, memory is twice ``BLOCK_BYTES`` (64 MiB in all), whatever
    M and K are; a layer whose G M D states do not fit into that takes up to five times their size in fp64.

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

    Examples
    --------
    Two questions in two languages, at two layers. Layer 0 is the same for all; layer 1 tells the questions apart:

    >>> questions, languages = np.array(["what", "what", "who", "who"]), np.array(["en", "de", "en", "de"])
    >>> states = np.array([[[1.0], [5.0]], [[1.0], [9.0]], [[1.0], [3.0]], [[1.0], [7.0]]])
    >>> paragraph_encoding(states, questions, languages).encoding.round(2).tolist()
    [[0.42, 1.0], [0.42, 1.0], [0.42, 1.0], [0.42, 1.0]]
    """
    n, n_layers, width = states.shape
    retrieval = Retrieval.undefined(n, n_layers)
    if not n:
        return retrieval
    # numbers in place of names are faster: every block sorts them again
    q, g = (np.unique(names, return_inverse=True)[1] for names in (questions, languages))
    for layers in _blocks(n_layers, (q.max() + 1) * (g.max() + 1) * width):
        paragraph = Paragraph.from_states(states[:, layers], q, g)
        for language in range(paragraph.present.shape[1]):
            candidates, known = paragraph.consensus(language)
            asked = np.flatnonzero(paragraph.present[:, language] & known)
            if not len(asked):
                continue
            index = np.cumsum(known) - 1  # of a question among the candidates
            block = retrieve(paragraph.states[asked, language], candidates[known], index[asked])
            rows = paragraph.row[asked, language]
            for name, values in vars(block).items():
                getattr(retrieval, name)[rows, layers] = values
    return retrieval


def _ranked(cosines: Floats, target: NDArray[np.int64]) -> Retrieval:
    """From cosines [K, N, M] and the right candidate [N] of each query; values [K, N]."""
    m = cosines.shape[-1]
    by_rank = 1 - np.log2(1 + np.arange(2 * m - 1) / 2) / np.log2(m)  # rank 1, 1.5, 2, ..., M
    own = cosines[:, np.arange(len(target)), target]
    total = cosines.sum(-1)
    differences = cosines - own[..., None]
    ahead = (differences > TIE).sum(-1)
    equal = (np.abs(differences, out=differences) <= TIE).sum(-1) - 1
    del differences
    unknown = np.isnan(total)
    encoding = by_rank[np.where(unknown, 0, 2 * ahead + equal)]
    top1 = np.where(ahead == 0, 1 / np.where(unknown, 1, 1 + equal), 0.0)
    control = _mean_over_pairings(cosines, by_rank)
    for values in (encoding, top1, control):
        values[unknown] = np.nan
    return Retrieval(encoding, control, top1, own - (total - own) / (m - 1))


def _mean_over_pairings(cosines: Floats, by_rank: Floats) -> Floats:
    """Mean of ``by_rank`` [2 M - 1] over the ranks of all M candidates, for cosines [..., M].

    The ranks of a row are 1 to M unless some tie, so only rows with ties are computed one by one.
    """
    ordered = np.sort(cosines, axis=-1)
    control = np.full(cosines.shape[:-1], by_rank[::2].mean())
    tied = (ordered[..., 1:] - ordered[..., :-1] <= TIE).any(-1)
    ordered = ordered[tied]  # [rows, M]
    above = _ties_above(ordered)
    below = _ties_above(-ordered[:, ::-1])[:, ::-1]
    ahead = np.arange(cosines.shape[-1])[::-1] - above
    control[tied] = by_rank[2 * ahead + above + below].mean(-1)
    return control


def _ties_above(ordered: Floats) -> NDArray[np.int64]:
    """For each value of rows in ascending order [N, M]: how many values after it are within ``TIE`` of it.

    This is a binary search for all values at once. Two values tie by their own difference alone: a third value that
    ties with both does not make them tie.
    """
    n, m = ordered.shape
    first = np.broadcast_to(np.arange(m), (n, m))
    last, beyond = first, np.full((n, m), m)  # the last that is known to tie, the first that is known not to
    for _ in range(m.bit_length()):
        middle = (last + beyond) // 2
        near = np.take_along_axis(ordered, middle, -1) - ordered <= TIE
        last, beyond = np.where(near, middle, last), np.where(near, beyond, middle)
    return last - first


def _blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of ``count`` items, each as long as a block of memory allows, if an item takes ``size`` fp64 numbers."""
    step = max(1, BLOCK_BYTES // (8 * COPIES * max(1, size)))
    for start in range(0, count, step):
        yield slice(start, start + step)


def _norms(vectors: Floats) -> Floats:
    """Euclidean norms along the last axis, a block of the first axis at a time: computing a norm takes a copy."""
    norms = np.empty(vectors.shape[:-1])
    for block in _blocks(len(vectors), vectors[:1].size):
        norms[block] = np.linalg.norm(vectors[block], axis=-1)
    return norms


def _unit(vectors: Floats) -> Floats:
    """Vectors of length 1; zero vectors stay zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms == 0, 1.0, norms)
