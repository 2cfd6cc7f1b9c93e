"""Encoding: can a question be told apart, across languages, from the others on the same paragraph?

The candidates share the paragraph, so that the context cannot give the question away. docs/method.md, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# A centred state this small beside the state itself is rounding: it points nowhere
NOTHING = 1e-7
# Cosines of fp64 sums that differ by less are equal
TIE = 1e-9
# Memory of the temporary arrays: this much for the centred states of a few layers, as much for their cosines
BLOCK_BYTES = 32 << 20
# Temporary arrays as large as the block itself that exist at the same time
COPIES = 8


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

    @classmethod
    def undefined(cls, n: int, n_layers: int) -> Retrieval:
        """All NaN, to be filled in."""
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
        table = np.zeros((*shape, *states.shape[1:]))
        table[present] = states[row[present]]
        size = _norms(table)
        table -= table.sum(0) / np.maximum(present.sum(0), 1)[:, None, None]
        table[~present] = 0.0
        table[_norms(table) <= NOTHING * size] = 0.0
        return cls(table, present, row)

    @cached_property
    def total(self) -> Floats:
        """Sum of all languages' centred states of every question [Q, K, D]."""
        return self.states.sum(1)

    def consensus(self, language: int) -> tuple[Floats, NDArray[np.bool_]]:
        """Mean of the *other* languages' centred states of every question [Q, K, D], and which questions have one."""
        others = self.present.sum(1) - self.present[:, language]
        total = self.total - self.states[:, language]
        return total / np.maximum(others, 1)[:, None, None], others > 0


def retrieve(queries: Floats, candidates: Floats, right: NDArray[np.int64]) -> Retrieval:
    """Ranks candidates by their cosine with each query; an all-zero vector has cosine 0 with everything.

    Time per layer is that of one product [N, D] x [D, M] and of sorting N rows of M cosines. The temporary arrays take
    at most ``BLOCK_BYTES``, or about three times one layer's vectors where these are more.

    Parameters
    ----------
    queries : array [N, K, D]
    candidates : array [M, K, D]
    right : int array [N]
        Which candidate is the right one of each query.

    Returns
    -------
    Retrieval
        NaN with fewer than two candidates, and where a cosine is not a number.
    """
    (n, n_layers, width), m = queries.shape, len(candidates)
    found = Retrieval.undefined(n, n_layers)
    if m < 2:
        return found
    for layers in _blocks(n_layers, max((n + m) * width, n * m)):
        left = _unit(queries[:, layers]).transpose(1, 0, 2)  # [K, N, D]
        others = _unit(candidates[:, layers]).transpose(1, 2, 0)  # [K, D, M]
        for rows in _blocks(n, len(left) * m):
            part = _ranked(left[:, rows] @ others, right[rows])
            for name, values in vars(part).items():
                getattr(found, name)[rows, layers] = values.T
    return found


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
    """
    n, n_layers, width = states.shape
    found = Retrieval.undefined(n, n_layers)
    if not n:
        return found
    # numbers in place of names: every block sorts them anew
    q, g = (np.unique(names, return_inverse=True)[1] for names in (questions, languages))
    for layers in _blocks(n_layers, (q.max() + 1) * (g.max() + 1) * width):
        paragraph = Paragraph.from_states(states[:, layers], q, g)
        for language in range(paragraph.present.shape[1]):
            candidates, known = paragraph.consensus(language)
            asked = np.flatnonzero(paragraph.present[:, language] & known)
            if not len(asked):
                continue
            place = np.cumsum(known) - 1  # of a question among the candidates
            part = retrieve(paragraph.states[asked, language], candidates[known], place[asked])
            rows = paragraph.row[asked, language]
            for name, values in vars(part).items():
                getattr(found, name)[rows, layers] = values
    return found


def _ranked(cosines: Floats, right: NDArray[np.int64]) -> Retrieval:
    """From cosines [K, N, M] and the right candidate [N] of each query; values [K, N]."""
    m = cosines.shape[-1]
    by_rank = 1 - np.log2(1 + np.arange(2 * m - 1) / 2) / np.log2(m)  # rank 1, 1.5, 2, ..., M
    own = cosines[:, np.arange(len(right)), right]
    total = cosines.sum(-1)
    apart = cosines - own[..., None]
    ahead = (apart > TIE).sum(-1)
    equal = (np.abs(apart, out=apart) <= TIE).sum(-1) - 1
    del apart
    unknown = np.isnan(total)
    encoding = by_rank[np.where(unknown, 0, 2 * ahead + equal)]
    top1 = np.where(ahead == 0, 1 / np.where(unknown, 1, 1 + equal), 0.0)
    control = _mean_over_pairings(cosines, by_rank)
    for values in (encoding, top1, control):
        values[unknown] = np.nan
    return Retrieval(encoding, control, top1, own - (total - own) / (m - 1))


def _mean_over_pairings(cosines: Floats, by_rank: Floats) -> Floats:
    """Mean of ``by_rank`` [2 M - 1] over the ranks of all M candidates, for cosines [..., M].

    The ranks of a row are 1 to M unless some tie; so only rows with ties are looked at further.
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
    """For each value of rows in ascending order [N, M]: how many after it are within ``TIE`` of it.

    A binary search for all values at once. Two values tie or not by their own difference: a third that ties with both
    does not make them tie.
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
    """``count`` items in slices of as many as fit into a block, at least one, if each takes ``size`` fp64 numbers."""
    step = max(1, BLOCK_BYTES // (8 * COPIES * max(1, size)))
    for start in range(0, count, step):
        yield slice(start, start + step)


def _norms(vectors: Floats) -> Floats:
    """Euclidean norms of the last axis, a block of the first one at a time: norms take copies of what they are of."""
    size = np.empty(vectors.shape[:-1])
    for part in _blocks(len(vectors), vectors[:1].size):
        size[part] = np.linalg.norm(vectors[part], axis=-1)
    return size


def _unit(vectors: Floats) -> Floats:
    size = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(size == 0, 1.0, size)
