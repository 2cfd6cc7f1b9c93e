"""The language of an answer, by py3langid; and the scripts that languages are written in."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

from xprobe.scoring.packages import load_package

LETTERS = 20  # fewer say little: of 400 gold answers of XQuAD in each language, half are taken for another one
CONFIDENCE = 0.9

# scripts that texts in a language are written in; other languages are not judged by their script
SCRIPTS = {
    "ar": {"ARABIC"}, "de": {"LATIN"}, "el": {"GREEK"}, "en": {"LATIN"}, "es": {"LATIN"}, "hi": {"DEVANAGARI"},
    "ro": {"LATIN"}, "ru": {"CYRILLIC"}, "th": {"THAI"}, "tr": {"LATIN"}, "vi": {"LATIN"}, "zh": {"CJK", "BOPOMOFO"},
}  # fmt: skip


_WRITTEN_ALIKE = {"wuu": "zh", "yue": "zh"}  # Chinese languages with one script; XQuAD calls its Chinese zh


class LanguageGuess(NamedTuple):
    """The most probable language of a text.

    Attributes
    ----------
    language : str
        ISO 639-1 code; "" if the text has no letters.
    confidence : float
        From 0 to 1, among all languages that py3langid knows.
    letters : int
        Letters of the text.
    """

    language: str
    confidence: float
    letters: int

    @property
    def certain(self) -> bool:
        """Whether the text is long enough, and the language probable enough, to rely on it."""
        return self.letters >= LETTERS and self.confidence >= CONFIDENCE


def identify(text: str) -> LanguageGuess:
    """Guesses the language of a text.

    py3langid (Lui and Baldwin 2012, "langid.py") names the language of 98 % of XQuAD's questions in 12 languages, and
    of 48 % of its gold answers, most of which are names, numbers or few words.

    Raises
    ------
    UsageError
        The package is not installed.

    Examples
    --------
    >>> identify("Der Vertrag wurde im Jahr darauf unterschrieben.").language
    'de'
    >>> identify("308").letters
    0
    """
    letters = sum(c.isalpha() or unicodedata.category(c) in ("Mn", "Mc") for c in text)
    if not letters:
        return LanguageGuess("", 0.0, 0)
    language, confidence = _identifier().classify(text)
    return LanguageGuess(_WRITTEN_ALIKE.get(str(language), str(language)), float(confidence), letters)


def main_script(text: str) -> str:
    """The script of most letters, by its Unicode name; "" if there are no letters.

    Examples
    --------
    >>> main_script("Ада Lovelace Лавлейс"), main_script("308")
    ('CYRILLIC', '')
    """
    found = Counter(_script(c) for c in text if c.isalpha())
    return found.most_common(1)[0][0] if found else ""


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


@cache
def _identifier() -> Any:
    module = load_package("py3langid.langid", "py3langid", "error types")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)
