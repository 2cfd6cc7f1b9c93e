"""Normalisers: how an answer and a gold answer are written before they are compared, and which words they have.

The name of the normaliser belongs beside every score: the same answers have other scores under another one.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from xprobe.errors import UsageError
from xprobe.scoring.letters import base_language
from xprobe.scoring.settings import NORMALISERS
from xprobe.scoring.words import split_words


@dataclass(frozen=True)
class Normaliser:
    """One way to write answers before they are compared.

    Parameters
    ----------
    name : str
    description : str
    words : callable (text, language) -> list of str
        The normalised words of a text.
    languages : tuple of str, optional
        Languages that it is defined for; None if for any.
    without_blanks : tuple of str
        Languages in which blanks between words do not count for equality, because a segmenter puts them there.

    Examples
    --------
    >>> get_normaliser("squad").words("The Denver Broncos!", "en")
    ['denver', 'broncos']
    """

    name: str
    description: str
    words: Callable[[str, str], list[str]]
    languages: tuple[str, ...] | None = None
    without_blanks: tuple[str, ...] = ()

    def check_language(self, language: str) -> None:
        """Checks that the normaliser is defined for a language.

        Raises
        ------
        UsageError
            It is not: names the languages that it is defined for.
        """
        if self.languages is not None and language not in self.languages:
            raise UsageError(
                f"the normaliser {self.name!r} is defined for {', '.join(self.languages)}, not for {language!r}: use "
                "another one (normaliser='xprobe', --norm xprobe)"
            )


def get_normaliser(name: str) -> Normaliser:
    """The normaliser of this name.

    Raises
    ------
    UsageError
        There is none.

    Examples
    --------
    >>> get_normaliser("mlqa").languages
    ('ar', 'de', 'en', 'es', 'hi', 'vi', 'zh')
    """
    if name not in _PARTS:
        raise UsageError(f"unknown normaliser {name!r}; known: {', '.join(NORMALISERS)}")
    return Normaliser(name, NORMALISERS[name], *_PARTS[name])


def languages_without_articles_rule(name: str, languages: Iterable[str]) -> list[str]:
    """Languages for which the normaliser does not know which words are articles, so that it removes none.

    Examples
    --------
    >>> languages_without_articles_rule("xprobe", ["de", "fi", "zh-TW"])
    ['fi']
    """
    known = {*_ARTICLES, *_WITHOUT_ARTICLES}
    return [one for one in languages if name == "xprobe" and base_language(one) not in known]


# -- squad ----------------------------------------------------------------------------------------------------------

_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ENGLISH_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def _squad(text: str, language: str) -> list[str]:
    """The SQuAD v1.1 evaluation: lower case, no ASCII punctuation, no English articles, words between blanks."""
    return _ENGLISH_ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()


# -- mlqa -----------------------------------------------------------------------------------------------------------

_MLQA_REMOVED = {
    "ar": re.compile(r"\sال^|ال"),  # as published: also inside a word
    "de": re.compile(r"\b(?:ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "en": _ENGLISH_ARTICLES,
    "es": re.compile(r"\b(?:un|una|unos|unas|el|la|los|las)\b"),
    "hi": None,
    "vi": re.compile(r"\b(?:của|là|cái|chiếc|những)\b"),
    "zh": None,
}
_MLQA_CHINESE = re.compile("[\u4e00-\u9fa5]")


def _mlqa(text: str, language: str) -> list[str]:
    """The MLQA evaluation: lower case, no punctuation of any script, articles by language, Chinese by character."""
    text = "".join(c for c in text.lower() if not _is_punctuation(c))
    removed = _MLQA_REMOVED[language]
    text = text if removed is None else removed.sub(" ", text)
    if language == "zh":
        text = _MLQA_CHINESE.sub(lambda found: f" {found[0]} ", text)
    return text.split()


# -- xprobe ---------------------------------------------------------------------------------------------------------

# words that are articles, after case folding (which writes σ for ς)
_ARTICLES: Mapping[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "de": "der die das den dem des ein eine einen einem eines einer",
        "el": "ο η το οι τα του τησ των τον την τη τουσ τισ ένασ μια μία ένα ενόσ μιασ έναν",
        "en": "a an the",
        "es": "el la los las un una unos unas",
        "ro": "un o unei unui unor niște",
    }.items()
}
_WITHOUT_ARTICLES = ("ar", "hi", "ru", "th", "tr", "vi", "zh")  # languages that have none that is a word of its own
_SEGMENTED = ("zh", "th", "ja", "km", "lo", "my")  # written without blanks between words
_APOSTROPHES = re.compile("[\u2018\u2019\u02bc\u00b4\u0384`]")  # what people write for '
_INNER = re.compile(r"(?<=[^\W\d_])['.](?=[^\W\d_])")  # U.S.; don't
_THOUSANDS = re.compile(r"(?<=\d)(?<!\b0)[.,'](?=\d{3}(?!\d))")  # 1,000, but not 0.125
_ARABIC_SEPARATORS = str.maketrans("\u066b\u066c", ".,")  # of decimals, of thousands
_DECIMALS = re.compile(r"(?<=\d)[.,](?=\d)")  # 3.5, which is not 35
_DECIMAL_POINT = "\ue000"  # stands for it while punctuation is removed
_THAI_SARA_AM = re.compile("\u0e4d([\u0e48-\u0e4b]?)\u0e32")  # NFKC takes this vowel apart; dictionaries do not
_ROMANIAN_COMMAS = str.maketrans("\u015f\u0163\u015e\u0162", "\u0219\u021b\u0218\u021a")  # often written with cedillas
_ARABIC_MARKS = re.compile("[\u0640\u064b-\u0652\u0670]")  # the long stroke, and vowel marks, which few texts write
_ARABIC_ARTICLE = re.compile(r"^ال(?=\w{2,})")


def _xprobe(text: str, language: str) -> list[str]:
    """Letters and numbers in one form, no punctuation of any script, articles by language, words by a segmenter.

    A text of which nothing would be left, such as "A" or "∈", stays as it is.
    """
    language = base_language(language)
    text = _one_form(text, language)
    bare = text
    for pattern, replacement in ((_INNER, ""), (_THOUSANDS, ""), (_DECIMALS, _DECIMAL_POINT)):
        bare = pattern.sub(replacement, bare)
    bare = "".join(" " if _is_sign(c) else c for c in bare).replace(_DECIMAL_POINT, ".")
    words = [word for word in _segmented(bare, language) if word.strip()]
    if language == "ar":
        words = [_ARABIC_ARTICLE.sub("", word) for word in words]
    return [word for word in words if word not in _ARTICLES.get(language, ())] or text.split()


def _one_form(text: str, language: str) -> str:
    """The text in NFKC and case-folded, digits of all scripts as ASCII digits, without invisible signs."""
    text = unicodedata.normalize("NFKC", _APOSTROPHES.sub("'", text))
    text = _THAI_SARA_AM.sub("\\1\u0e33", text)
    text = "".join(_ascii_digit(c) for c in text if unicodedata.category(c) != "Cf")
    if language in ("tr", "az"):  # their capital letters of i and ı are not those of others
        text = text.replace("İ", "i").replace("I", "ı")
    if language == "ro":
        text = text.translate(_ROMANIAN_COMMAS)
    if language == "ar":
        text = _ARABIC_MARKS.sub("", text)
    return text.translate(_ARABIC_SEPARATORS).casefold()


def _ascii_digit(character: str) -> str:
    return str(unicodedata.decimal(character, character))


def _segmented(text: str, language: str) -> list[str]:
    if language in _SEGMENTED:
        return split_words(text, language, "choose another normaliser (normaliser='squad', --norm squad)")
    return text.split()


@cache
def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P") or character in string.punctuation


@cache
def _is_sign(character: str) -> bool:
    """Punctuation or a symbol. SQuAD's script removes the symbols of ASCII; € and £ are treated as its $ is."""
    return unicodedata.category(character)[0] in "PS"


_PARTS: dict[str, tuple[Callable[[str, str], list[str]], tuple[str, ...] | None, tuple[str, ...]]] = {
    "xprobe": (_xprobe, None, _SEGMENTED),
    "mlqa": (_mlqa, tuple(_MLQA_REMOVED), ()),
    "squad": (_squad, None, ()),
}
