"""Why an answer is wrong: rules in a fixed order, of which the first that applies counts.

1. ``correct``: F1 is at least the threshold.
2. ``blank``: no letter and no digit.
3. ``refusal``: a phrase of ``refusals.toml``, in any of XQuAD's languages, that is not a quotation from the context.
4. ``wrong language``: most letters are of a script that the expected language is not written in (a language that XQuAD
   lacks is written in the scripts of the context), or py3langid names another language with enough text and confidence
   (``languages``). Texts that stand in the context, or most of whose
   words do, are not of a wrong language: names and quotations are written alike in many languages.
5. ``gibberish``: the same words, syllables or letters again and again (``distinct_pieces``), or signs that are no text.
6. ``content``: everything else. The answer is text of the right language, and wrong.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from functools import cache
from pathlib import Path

from xprobe.scoring.languages import SCRIPTS, identify, is_known, scripts_of
from xprobe.scoring.letters import WITHOUT_BLANKS, base_language, letter_words, main_script

ERROR_TYPES = {
    "correct": "F1 is at least the threshold",
    "blank": "no letter and no digit",
    "refusal": "the model says that it cannot answer",
    "wrong language": "another language than that of the gold answer",
    "gibberish": "repetition, or signs that are no text",
    "content": "text of the right language, and wrong",
}

FEWEST_WORDS = 8  # with fewer, single letters say little
PIECE, FEWEST_SIGNS = 4, 20  # signs of a piece; a shorter text says little about repetition
LAST_SIGNS = 160  # an answer that repeats itself does so to its end, and long sentences repeat some pieces anyway
DISTINCT = 0.65  # share of distinct pieces below which a text repeats itself


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
    if is_refusal(answer, context):
        return "refusal"
    if is_wrong_language(answer, language, context):
        return "wrong language"
    return "gibberish" if is_gibberish(answer) else "content"


def is_refusal(answer: str, context: str) -> bool:
    """Rule 3 of the module. A text that stands in the context is a quotation.

    Examples
    --------
    >>> is_refusal("Δεν γνωρίζω.", "Ada sold 40 boats."), is_refusal("40 boats", "Ada sold 40 boats.")
    (True, False)
    """
    text = unicodedata.normalize("NFC", answer).replace("’", "'")
    return _refusals().search(text) is not None and not _stands_in(answer, context)


def is_wrong_language(answer: str, language: str, context: str) -> bool:
    """Rule 4 of the module.

    Examples
    --------
    >>> is_wrong_language("Die Verteidigung gab nur dreihundertacht Punkte ab", "en", "It gave up 308 points.")
    True
    >>> is_wrong_language("Denver Broncos", "th", "เดนเวอร์ บรองโกส์")
    False
    """
    if mostly_stands_in(answer, context):
        return False
    language = base_language(language)
    script, own = main_script(answer), SCRIPTS.get(language) or scripts_of(context)
    if own and script and script not in own and script != "LATIN":
        return True  # names are often left in Latin letters, but in no other foreign ones
    if is_name(answer) or not is_known(language):
        return False
    guess = identify(answer, among={*SCRIPTS, language})
    return guess.certain and guess.language != language


def mostly_stands_in(answer: str, context: str) -> bool:
    """Whether an answer stands in the context, or words with more than half of its letters do. Case does not count.

    Examples
    --------
    >>> context = "Under the Order of 1908 the city got its port."
    >>> mostly_stands_in("Order of 1909", context), mostly_stands_in("in der Stadt", context)
    (True, False)
    """
    if _stands_in(answer, context):
        return True
    text, source = answer.casefold(), context.casefold()
    words, known = letter_words(text), set(letter_words(source))
    inside = [word for word in words if word in known or (main_script(word) in WITHOUT_BLANKS and word in source)]
    return sum(map(len, inside)) * 2 > sum(map(len, words))


def _stands_in(answer: str, context: str) -> bool:
    text, source = (" ".join(part.casefold().split()) for part in (answer, context))
    return text in source


def is_name(answer: str) -> bool:
    """Whether all words of more than three letters begin with a capital letter.

    Examples
    --------
    >>> is_name("Universidad Nacional de La Plata"), is_name("la universidad de la ciudad"), is_name("1908")
    (True, False, False)
    """
    words = [word for word in letter_words(answer) if len(word) > 3 and not word[0].isdigit()]
    return bool(words) and all(word[0].isupper() for word in words)


def is_gibberish(answer: str) -> bool:
    """Rule 5 of the module: repeated words, repeated letters, or signs that are no text.

    Examples
    --------
    >>> is_gibberish("(C) (D) (L) (R) (S) (T) (B) (C) (D) (R"), is_gibberish("aaaaaaaaaaaa"), is_gibberish("1975-1979")
    (True, True, False)
    """
    signs = [c for c in answer if not c.isspace()]
    text = sum(len(word) for word in letter_words(answer))
    if len(signs) >= 8 and (text < 0.5 * len(signs) or answer.count("\ufffd") > 0.1 * len(signs)):
        return True
    if re.search(r"([^\d\s])\1{5,}", answer):
        return True
    words = letter_words(answer.casefold())
    if len(words) >= FEWEST_WORDS and sum(len(word) == 1 and word.isascii() for word in words) > 0.6 * len(words):
        return True
    return distinct_pieces(answer) < DISTINCT


def distinct_pieces(text: str) -> float:
    """The share of distinct pieces of four signs among all such pieces of the last 160 signs of a text.

    It is 1 for a text under 20 signs, near 1 for natural text in any script, and low where words or syllables come
    again and again.

    Examples
    --------
    >>> distinct_pieces("Ada sold 40 boats in spring."), distinct_pieces("of the of the of the of the of the")
    (1.0, 0.22580645161290322)
    """
    text = " ".join(letter_words(text.casefold()))[-LAST_SIGNS:]
    if len(text) < FEWEST_SIGNS:
        return 1.0
    pieces = [text[start : start + PIECE] for start in range(len(text) - PIECE + 1)]
    return len(set(pieces)) / len(pieces)


@cache
def _refusals() -> re.Pattern[str]:
    phrases = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text(encoding="utf-8"))
    every = "|".join(f"(?:{phrase})" for language in phrases.values() for phrase in language)
    return re.compile(unicodedata.normalize("NFC", every).replace(" ", r"\s+"), re.IGNORECASE)
