"""Simulated studies, without a model: signals and hidden states drawn from a distribution that is known in full.

The onset of an example is a whole number: base + effect of its paragraph + effect of its question, and ``by`` more in
the languages that disagree, which are drawn anew for every question. All effects have few values, so every true figure
is a sum over all of their combinations; no true value is itself simulated.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations, product
from math import log2

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Chances = dict[int, float]  # value -> its probability; they sum to 1
LANGUAGES = ("en", "de", "zh", "th", "ar", "ru")


@dataclass(frozen=True)
class Design:
    """What studies are drawn from.

    Parameters
    ----------
    base, by : int
        Onset before any effect, and how many layers later it is in languages that disagree.
    paragraph, question : dict of int to float
        Effects on the onset.
    disagree : dict of int to float
        How many languages of a question disagree.
    low, high, noise : float
        Readiness below the onset and from it on; standard deviation of what is added at every layer.
    encoded_from : int
        Layer from which on questions are told apart.
    ranks : tuple of dict of int to float
        Of the right question from that layer on, in paragraphs of each kind; kinds are equally frequent. Below the
        layer every rank is as likely as any other.
    """

    paragraphs: int = 30
    questions: int = 4
    languages: tuple[str, ...] = LANGUAGES
    n_layers: int = 25
    base: int = 12
    by: int = 3
    paragraph: Chances = field(default_factory=lambda: {-3: 0.1, -1: 0.3, 0: 0.2, 1: 0.25, 2: 0.15})
    question: Chances = field(default_factory=lambda: {-1: 0.2, 0: 0.45, 1: 0.35})
    disagree: Chances = field(default_factory=lambda: {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1})
    low: float = 0.3
    high: float = 0.75
    noise: float = 0.0
    encoded_from: int = 7
    ranks: tuple[Chances, ...] = ({1: 0.9, 2: 0.1}, {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1})


@dataclass(frozen=True, eq=False)
class Simulated:
    """One study: a row per example in ``frame``, and beside it onsets [N] and signals [N, n_layers]."""

    frame: pd.DataFrame
    onset: Floats
    signals: dict[str, Floats]


@dataclass(frozen=True, eq=False)
class Truth:
    """What studies of a design estimate; ``spread`` in layers, arrays by layer."""

    stability: Floats
    alpha: float
    boundary: float
    spread: float
    readiness: Floats
    encoding: Floats
    encoding_depth: int


def simulate(design: Design, seed: int) -> Simulated:
    """Draws a study."""
    generator = np.random.default_rng(seed)
    p, q, g, k = design.paragraphs, design.questions, len(design.languages), design.n_layers
    question = design.base + _draw(generator, design.paragraph, (p, 1)) + _draw(generator, design.question, (p, q))
    place = np.argsort(generator.random((p, q, g)), axis=2)
    apart = place < _draw(generator, design.disagree, (p, q, 1))
    onset = (question[..., None] + design.by * apart).reshape(-1)
    reached = np.arange(k) >= onset[:, None]
    readiness = np.where(reached, design.high, design.low) + design.noise * generator.normal(size=reached.shape)
    rank = generator.integers(1, q + 1, size=(p, q * g, k))
    kinds = generator.integers(len(design.ranks), size=p)
    for at, kind in enumerate(kinds):
        known = k - design.encoded_from
        rank[at, :, design.encoded_from :] = _draw(generator, design.ranks[kind], (q * g, known))
    encoding = 1 - np.log2(rank.reshape(-1, k)) / log2(q)
    return Simulated(frame_of(design), onset.astype(np.float64), {"readiness": readiness, "encoding": encoding})


def frame_of(design: Design) -> pd.DataFrame:
    """The examples: paragraph after paragraph, question after question, language after language."""
    rows = [
        {"setting": "en-x", "paragraph": f"p{p:02}", "question_id": f"p{p:02}q{q}", "language": x}
        for p, q, x in product(range(design.paragraphs), range(design.questions), design.languages)
    ]
    return pd.DataFrame(rows)


def truth(design: Design) -> Truth:
    """Every figure by its definition, summed over all combinations of effects."""
    g, layers = len(design.languages), range(design.n_layers)
    pooled: dict[int, float] = defaultdict(float)
    stability, within = np.zeros(design.n_layers), 0.0
    for (p, a), (q, b), (n, c) in product(design.paragraph.items(), design.question.items(), design.disagree.items()):
        chance, first = a * b * c, design.base + p + q
        onsets = [first + design.by] * n + [first] * (g - n)
        pairs = list(combinations(onsets, 2))
        within += chance * sum((x - y) ** 2 for x, y in pairs) / len(pairs)
        stability += [chance * sum((at >= x) == (at >= y) for x, y in pairs) / len(pairs) for at in layers]
        for onset in onsets:
            pooled[onset] += chance / g
    expected = sum(a * b * (x - y) ** 2 for (x, a), (y, b) in product(pooled.items(), repeat=2))
    boundary = _median(pooled)
    apart: dict[float, float] = defaultdict(float)
    for onset, chance in pooled.items():
        apart[abs(onset - boundary)] += chance
    reached = np.array([sum(chance for onset, chance in pooled.items() if at >= onset) for at in layers])
    by_rank = {rank: 1 - log2(rank) / log2(design.questions) for rank in range(1, design.questions + 1)}
    known = np.mean([sum(chance * by_rank[rank] for rank, chance in kind.items()) for kind in design.ranks])
    blind = np.mean(list(by_rank.values()))
    return Truth(
        stability=stability,
        alpha=1 - within / expected if expected else float("nan"),
        boundary=boundary,
        spread=_median(apart),
        readiness=design.low + (design.high - design.low) * reached,
        encoding=np.where(np.arange(design.n_layers) >= design.encoded_from, known, blind),
        encoding_depth=design.encoded_from,
    )


def hidden_states(
    frame: pd.DataFrame, n_layers: int, width: int, seed: int, question_from: int | None = None, noise: float = 1.0
) -> NDArray[np.float32]:
    """States [N, n_layers, width]: offsets of language and paragraph, noise, and from layer ``question_from`` on a
    direction of the question that its languages share (nowhere if None). Directions have length about sqrt(width)."""
    generator = np.random.default_rng(seed)
    states = noise * generator.normal(size=(len(frame), n_layers, width))
    for column, size, first in (("language", 3, 0), ("paragraph", 5, 0), ("question_id", 1, question_from)):
        _, codes = np.unique(frame[column], return_inverse=True)
        if first is not None:
            states[:, first:] += size * generator.normal(size=(codes.max() + 1, width))[codes, None]
    return states.astype(np.float32)


def _draw(generator: np.random.Generator, chances: Chances, shape: tuple[int, ...]) -> NDArray[np.int64]:
    return generator.choice(list(chances), p=list(chances.values()), size=shape)


def _median(chances: dict[int, float] | dict[float, float]) -> float:
    """Of a distribution; the middle of two values where one half is reached exactly between them."""
    values, heights = sorted(chances), np.cumsum([chances[value] for value in sorted(chances)])
    lower, upper = np.searchsorted(heights, [0.5 - 1e-9, 0.5 + 1e-9])
    return (values[lower] + values[upper]) / 2
