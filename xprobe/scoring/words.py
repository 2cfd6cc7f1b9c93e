"""Words and sentences of a text, by established segmenters. They give places in the text, so nothing is normalised."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from xprobe.scoring.letters import base_language
from xprobe.scoring.packages import load_package

Span = tuple[int, int]


def split_words(text: str, language: str, otherwise: str = "") -> list[str]:
    """The pieces of a text: words, and what stands between them. Joined, they are the text.

    Chinese is split by rjieba, Thai by pythainlp (newmm), every other language by the Unicode rules for word
    boundaries (UAX 29, the package uniseg). These rules know no dictionary: a Chinese character in a Japanese text, and
    every syllable of Khmer, Lao and Burmese, is a piece of its own.

    Parameters
    ----------
    text, language : str
    otherwise : str
        What the message of a missing package offers instead.

    Raises
    ------
    UsageError
        The package is not installed.

    Examples
    --------
    >>> split_words("Ada sold 1,000 boats.", "en")
    ['Ada', ' ', 'sold', ' ', '1,000', ' ', 'boats', '.']
    """
    base = base_language(language)
    if base == "zh":
        return list(load_package("rjieba", "rjieba", "words of Chinese", otherwise).cut(text))
    if base == "th":
        module = load_package("pythainlp.tokenize", "pythainlp", "words of Thai", otherwise)
        return list(module.word_tokenize(text, engine="newmm", keep_whitespace=True))
    return list(load_package("uniseg.wordbreak", "uniseg", "words and sentences", otherwise).words(text))


def word_spans(text: str, language: str) -> list[Span]:
    """The characters (start, stop) of every word: a piece with a letter, a digit or a mark of a letter.

    Raises
    ------
    UsageError
        The package for the language is not installed.

    Examples
    --------
    >>> word_spans("Ada sold 40.", "en")
    [(0, 3), (4, 8), (9, 11)]
    """
    return [(start, stop) for start, stop in _places(text, split_words(text, language)) if _is_word(text[start:stop])]


def sentence_spans(text: str) -> list[Span]:
    """The characters (start, stop) of every sentence, with the blanks after it, by the Unicode rules (UAX 29, uniseg).

    Raises
    ------
    UsageError
        The package uniseg is not installed.

    Examples
    --------
    >>> sentence_spans("Ada sold 40 boats. Bob bought one.")
    [(0, 19), (19, 34)]
    """
    return _places(text, load_package("uniseg.sentencebreak", "uniseg", "words and sentences").sentences(text))


def _places(text: str, pieces: Iterable[str]) -> list[Span]:
    """Where each piece stands in the text, in order. A segmenter may leave out blanks."""
    places, position = [], 0
    for piece in pieces:
        start = text.index(piece, position)
        position = start + len(piece)
        places.append((start, position))
    return places


def _is_word(piece: str) -> bool:
    return any(unicodedata.category(c)[0] in "LN" for c in piece)
