"""The language of an answer, by py3langid; and the scripts that languages are written in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import cache
from typing import Any, NamedTuple

from xprobe.scoring.letters import count_letters, main_script
from xprobe.scoring.packages import load_package

LETTERS = 8  # fewer say too little; docs/performance.md has the measurement
CONFIDENCE = 0.9

# scripts that texts in a language are written in; texts in other languages are judged by the scripts of their context
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
        From 0 to 1: its probability among the languages that were asked about.
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


def identify(text: str, among: Collection[str] | None = None) -> LanguageGuess:
    """Guesses the language of a text.

    py3langid (Lui and Baldwin 2012, "langid.py") names the language of 99.5 % of XQuAD's questions in 12 languages, and
    among these 12 languages of 99.98 %. Of its gold answers, most of which are names, numbers or few words, it names
    55 %, among the 12 languages 71 %.

    Parameters
    ----------
    text : str
    among : collection of str, optional
        The languages in question; those that py3langid does not know are left out. None: all that it knows.

    Raises
    ------
    UsageError
        The package is not installed.

    Examples
    --------
    >>> identify("Der Vertrag wurde im Jahr darauf unterschrieben.").language
    'de'
    >>> identify("en la ciudad", among=["en", "es"]).language
    'es'
    >>> identify("308").letters
    0
    """
    letters = count_letters(text)
    chances: dict[str, float] = {}
    for code, chance in _identifier().rank(text) if letters else ():
        language = _WRITTEN_ALIKE.get(code, code)
        if among is None or language in among:
            chances[language] = chances.get(language, 0.0) + chance
    if not sum(chances.values()):
        return LanguageGuess("", 0.0, letters)
    best = max(chances, key=lambda language: chances[language])
    return LanguageGuess(best, chances[best] / sum(chances.values()), letters)


def scripts_of(text: str) -> set[str]:
    """The scripts that at least a twentieth of the letters of a text are of, by their Unicode names.

    Examples
    --------
    >>> sorted(scripts_of("アンナは1998年に赤い家を建てた。"))
    ['CJK', 'HIRAGANA', 'KATAKANA']
    """
    counts = Counter(main_script(letter) for letter in text if letter.isalpha())
    return {script for script, count in counts.items() if count * 20 >= counts.total()}


def is_known(language: str) -> bool:
    """Whether py3langid can name a language.

    Examples
    --------
    >>> is_known("de"), is_known("xx")
    (True, False)
    """
    return language in _identifier().labels


@cache
def _identifier() -> Any:
    module = load_package("py3langid.langid", "py3langid", "error types")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)
