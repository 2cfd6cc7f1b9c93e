"""Which words of a context does an answer hang on? The search of oracle definition 1, without a model.

Words are removed from the context, one span at a time, and the log-probability of an answer is measured again. The span
whose removal makes it fall the most is the *evidence*. ``Search`` says which spans to remove next, and takes the drops:

1. every sentence;
2. every word of the sentence with the largest drop;
3. every span of several words, in that sentence, that holds the word with the largest drop.

The evidence is the span with the largest drop among those of steps 2 and 3. Of spans with equal drops the shortest one
counts, then the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from xprobe.scoring.words import Span, sentence_spans, word_spans

DEFINITION = 1  # of the oracle
MOST_WORDS = 40  # of a sentence; a longer one is searched in equal parts, because Thai has no full stop


@dataclass(frozen=True)
class Words:
    """The words of a context, and the tokens that hold them.

    Parameters
    ----------
    characters : tuple of (int, int)
        Characters of each word in the context.
    tokens : tuple of (int, int)
        Tokens of each word, counted from the first token of the context. No token belongs to two words.
    sentences : tuple of (int, int)
        Words of each sentence, without a gap.

    Examples
    --------
    >>> offsets = [(0, 3), (3, 8), (8, 11), (11, 12), (12, 16), (16, 21), (21, 22)]
    >>> words = Words.find("Ada sold 40. Bob paid.", "en", offsets)
    >>> words.sentences, words.tokens
    (((0, 3), (3, 5)), ((0, 1), (1, 2), (2, 3), (4, 5), (5, 6)))
    >>> words.characters_of((1, 3)), words.tokens_of((1, 3))
    ((4, 11), (1, 3))
    """

    characters: tuple[Span, ...]
    tokens: tuple[Span, ...]
    sentences: tuple[Span, ...]

    @classmethod
    def find(cls, context: str, language: str, offsets: Sequence[Span]) -> Words:
        """The words of a context. Words that share a token count as one, because only whole tokens can be removed.

        Parameters
        ----------
        context, language : str
        offsets : sequence of (int, int)
            Characters that each token holds.

        Raises
        ------
        UsageError
            A package that finds words is not installed.
        """
        characters: list[Span] = []
        tokens: list[Span] = []
        for word in word_spans(context, language):
            held = [i for i, (start, stop) in enumerate(offsets) if start < word[1] and stop > word[0] and start < stop]
            if not held:
                continue
            if tokens and held[0] < tokens[-1][1]:
                characters[-1] = (characters[-1][0], word[1])
                tokens[-1] = (tokens[-1][0], max(tokens[-1][1], held[-1] + 1))
            else:
                characters.append(word)
                tokens.append((held[0], held[-1] + 1))
        starts = [start for start, _ in characters]
        sentences: list[Span] = []
        for start, stop in sentence_spans(context):
            inside = [index for index, place in enumerate(starts) if start <= place < stop]
            if inside:
                sentences += _equal_parts(inside[0], inside[-1] + 1)
        return cls(tuple(characters), tuple(tokens), tuple(sentences))

    def characters_of(self, span: Span) -> Span:
        """The characters of the words ``span[0]`` to ``span[1] - 1``."""
        return self.characters[span[0]][0], self.characters[span[1] - 1][1]

    def tokens_of(self, span: Span) -> Span:
        """The tokens of the words ``span[0]`` to ``span[1] - 1``, and of the signs between them."""
        return self.tokens[span[0]][0], self.tokens[span[1] - 1][1]

    def overlapping(self, characters: Span) -> Span:
        """The words that hold one of these characters; (0, 0) if there are none."""
        inside = [
            i for i, (start, stop) in enumerate(self.characters) if start < characters[1] and stop > characters[0]
        ]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def spans_of_length(self, count: int) -> list[Span]:
        """Every span of ``count`` words."""
        return [(start, start + count) for start in range(len(self.characters) - count + 1)]


def _equal_parts(start: int, stop: int) -> list[Span]:
    parts = -(-(stop - start) // MOST_WORDS)
    cuts = [start + (stop - start) * part // parts for part in range(parts + 1)]
    return list(pairwise(cuts))


class Found(NamedTuple):
    """A span of words, and by how much the log-probability falls, in nats, without it."""

    span: Span
    drop: float


@dataclass
class Search:
    """The search for the evidence of one answer.

    Parameters
    ----------
    words : Words
    most : int
        Most words of a span in step 3.
    spans : bool
        Whether to search further than the sentence.

    Examples
    --------
    The answer hangs on the fourth and fifth word.

    >>> offsets = [(0, 3), (3, 8), (8, 11), (11, 12), (12, 16), (16, 21), (21, 22)]
    >>> search = Search(Words.find("Ada sold 40. Bob paid.", "en", offsets), most=2)
    >>> while spans := search.wanted():
    ...     print(spans)
    ...     search.take([float(start <= 3 < stop) + float(start <= 4 < stop) for start, stop in spans])
    [(0, 3), (3, 5)]
    [(3, 4), (4, 5)]
    >>> search.sentence, search.evidence
    (Found(span=(3, 5), drop=2.0), Found(span=(3, 5), drop=2.0))
    """

    words: Words
    most: int
    spans: bool = True
    steps: list[dict[Span, float]] = field(default_factory=list)

    def wanted(self) -> list[Span]:
        """The spans to remove in the next step; none when the search has ended."""
        if not self.steps:
            return list(self.words.sentences)
        if not self.spans or len(self.steps) > 2:
            return []
        start, stop = self.sentence.span
        if len(self.steps) == 1:
            spans: Iterable[Span] = ((word, word + 1) for word in range(start, stop))
        else:
            (word, _), _ = _largest(self.steps[1])
            spans = (
                (first, last)
                for first in range(max(start, word + 1 - self.most), word + 1)
                for last in range(word + 1, min(stop, first + self.most) + 1)
            )
        return [span for span in spans if span not in self._known]

    def take(self, drops: Sequence[float]) -> None:
        """The drops of the spans that ``wanted`` named, in its order."""
        self.steps.append(dict(zip(self.wanted(), drops, strict=True)))

    @property
    def _known(self) -> dict[Span, float]:
        return {span: drop for step in self.steps for span, drop in step.items()}

    @property
    def sentence(self) -> Found:
        """The sentence with the largest drop."""
        return _largest(self.steps[0])

    @property
    def evidence(self) -> Found:
        """The span with the largest drop; the sentence itself if the search ends there."""
        start, stop = self.sentence.span
        known = {span: drop for span, drop in self._known.items() if start <= span[0] and span[1] <= stop}
        within = {span: drop for span, drop in known.items() if span[1] - span[0] <= self.most}
        return _largest(within if self.spans and within else {(start, stop): known[start, stop]})


def _largest(drops: dict[Span, float]) -> Found:
    span = min(drops, key=lambda span: (-drops[span], span[1] - span[0], span))
    return Found(span, drops[span])
