"""Letters, words and scripts of a text in any language. Words are what stands between blanks and punctuation."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache

# scripts that are written without blanks between words
WITHOUT_BLANKS = frozenset({"CJK", "THAI", "LAO", "KHMER", "MYANMAR", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA",
                            "IDEOGRAPHIC"})  # fmt: skip


def letter_words(text: str) -> list[str]:
    r"""Runs of letters, digits and the marks that belong to letters; ``re``'s ``\w`` lacks the marks.

    Examples
    --------
    >>> letter_words("हिन्दी, 24!")
    ['हिन्दी', '24']
    """
    return "".join(c if _in_word(c) else " " for c in text).split()


def base_language(code: str) -> str:
    """The language of a code, without its script or region.

    Examples
    --------
    >>> base_language("zh-TW"), base_language("de")
    ('zh', 'de')
    """
    return code.replace("_", "-").partition("-")[0].lower()


def count_letters(text: str) -> int:
    """Number of letters and of the marks that belong to letters.

    Examples
    --------
    >>> count_letters("308 Punkte"), count_letters("308")
    (6, 0)
    """
    return sum(c.isalpha() or _is_mark(c) for c in text)


def main_script(text: str, *, of_marks: bool = False) -> str:
    """The script of most letters, by its Unicode name; "" if there are no letters. ``of_marks``: of the marks instead.

    Examples
    --------
    >>> main_script("Ада Lovelace Лавлейс"), main_script("308")
    ('CYRILLIC', '')
    >>> main_script("\N{DEVANAGARI VOWEL SIGN I}", of_marks=True)
    'DEVANAGARI'
    """
    found = Counter(_script(c) for c in text if (_is_mark(c) if of_marks else c.isalpha()))
    return found.most_common(1)[0][0] if found else ""


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


@cache
def _in_word(character: str) -> bool:
    return character.isalnum() or _is_mark(character)


@cache
def _is_mark(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Mc")
