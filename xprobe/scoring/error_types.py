"""Why an answer is wrong: rules in a fixed order, of which the first that applies counts.

1. ``correct``: F1 is at least the threshold.
2. ``blank``: no letter and no digit.
3. ``refusal``: a phrase of ``refusals.toml``, in any of XQuAD's languages.
4. ``wrong language``: most letters are of a script that the expected language is not written in, or py3langid names
   another language with enough text and confidence (``languages``). Texts that stand in the context, or most of whose
   words do, are not of a wrong language: names and quotations are written alike in many languages.
5. ``gibberish``: the same words or letters again and again, or signs that are no text.
6. ``content``: everything else. The answer is text of the right language, and wrong.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from functools import cache
from pathlib import Path

from xprobe.scoring.languages import SCRIPTS, identify, main_script

ERROR_TYPES = {
    "correct": "F1 is at least the threshold",
    "blank": "no letter and no digit",
    "refusal": "the model says that it cannot answer",
    "wrong language": "another language than that of the gold answer",
    "gibberish": "repetition, or signs that are no text",
    "content": "text of the right language, and wrong",
}

FEWEST_WORDS = 8  # with fewer, repetition says little
DISTINCT = 0.4  # share of distinct words below which a text repeats itself


def classify(answer: str, f1: float, language: str, context: str, threshold: float = 0.5) -> str:
    """The error type of an answer, one of ``ERROR_TYPES``.

    Parameters
    ----------
    answer : str
    f1 : float
        Its F1 (``xprobe.scoring.measures.score``).
    language : str
        Of the gold answer, which is that of the context.
    context : str
        The text in which the answer stands.
    threshold : float
        An answer with at least this F1 is correct.

    Raises
    ------
    UsageError
        The package that names languages is not installed.

    Examples
    --------
    >>> context = "The Panthers defense gave up just 308 points."
    >>> classify("308 points", 0.8, "en", context), classify("24 interceptions", 0.0, "en", context)
    ('correct', 'content')
    >>> classify("The context does not mention this.", 0.0, "en", context)
    'refusal'
    >>> classify("the the the the the the the the the", 0.0, "en", context)
    'gibberish'
    """
    if f1 >= threshold:
        return "correct"
    if not any(c.isalnum() for c in answer):
        return "blank"
    if _refusals().search(answer.replace("’", "'")):
        return "refusal"
    if is_wrong_language(answer, language, context):
        return "wrong language"
    return "gibberish" if is_gibberish(answer) else "content"


def is_wrong_language(answer: str, language: str, context: str) -> bool:
    """Rule 4 of the module.

    Examples
    --------
    >>> is_wrong_language("Die Verteidigung gab nur dreihundertacht Punkte ab", "en", "It gave up 308 points.")
    True
    >>> is_wrong_language("Denver Broncos", "th", "เดนเวอร์ บรองโกส์")
    False
    """
    text, source = answer.casefold(), context.casefold()
    if text.strip() in source:
        return False
    words = re.findall(r"\w+", text)
    if words and sum(word in source for word in words) * 2 > len(words):
        return False
    script, own = main_script(answer), SCRIPTS.get(language)
    if own is not None and script and script not in own and script != "LATIN":
        return True  # names are often left in Latin letters, but in no other foreign ones
    guess = identify(answer)
    return guess.certain and guess.language != language


def is_gibberish(answer: str) -> bool:
    """Rule 5 of the module: repeated words, repeated letters, or signs that are no text.

    Examples
    --------
    >>> is_gibberish("(C) (D) (L) (R) (S) (T) (B) (C) (D) (R"), is_gibberish("aaaaaaaaaaaa"), is_gibberish("1975-1979")
    (True, True, False)
    """
    signs = [c for c in answer if not c.isspace()]
    text = sum(c.isalnum() or _joins(c) for c in signs)
    if len(signs) >= 8 and (text < 0.5 * len(signs) or answer.count("\ufffd") > 0.1 * len(signs)):
        return True
    if re.search(r"(\D)\1{5,}", answer):
        return True
    words = re.findall(r"\w+", answer.casefold())
    if len(words) >= FEWEST_WORDS:
        if len(set(words)) < DISTINCT * len(words):
            return True
        return sum(len(word) == 1 and word.isascii() for word in words) > 0.6 * len(words)
    return _repeats_a_piece(answer.casefold())


@cache
def _refusals() -> re.Pattern[str]:
    phrases = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text(encoding="utf-8"))
    every = "|".join(f"(?:{phrase})" for language in phrases.values() for phrase in language)
    return re.compile(every.replace(" ", r"\s+"), re.IGNORECASE)


def _joins(character: str) -> bool:
    """Vowel signs and the like, which letters of some scripts need and which are no letters by themselves."""
    return unicodedata.category(character) in ("Mn", "Mc")


def _repeats_a_piece(text: str) -> bool:
    """Whether one piece of 2 to 12 signs, repeated at once, makes up most of a text without blanks."""
    found = re.search(r"(\S{2,12}?)\1{3,}", text)
    return found is not None and len(found[0]) * 2 > len(text)
