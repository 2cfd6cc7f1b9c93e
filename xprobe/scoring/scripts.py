"""Scripts of single tokens, as a small closed list: which writing a lens reads from a state."""

from __future__ import annotations

import unicodedata
from typing import Any

from xprobe.scoring.letters import main_script

# name -> what counts as this script
SCRIPTS: dict[str, str] = {
    "latin": "Latin letters",
    "greek": "Greek letters",
    "cyrillic": "Cyrillic letters",
    "hebrew": "Hebrew letters",
    "arabic": "Arabic letters",
    "devanagari": "Devanagari letters and signs",
    "bengali": "Bengali letters and signs",
    "tamil": "Tamil letters and signs",
    "telugu": "Telugu letters and signs",
    "thai": "Thai letters and signs",
    "han": "Chinese characters",
    "kana": "Hiragana and Katakana",
    "hangul": "Hangul",
    "other": "letters of any other script",
    "none": "no letters: digits, punctuation, blanks",
    "undecodable": "bytes of a character, which say nothing alone",
    "special": "control tokens, such as the end of a turn",
}
# first word of a character's Unicode name -> script, where they differ
_NAMES = {"CJK": "han", "IDEOGRAPHIC": "han", "HIRAGANA": "kana", "KATAKANA": "kana", "KATAKANA-HIRAGANA": "kana"}
_OF_MANY = ("COMBINING", "")  # accents belong to no script
_UNREADABLE = "\ufffd"


def text_script(text: str) -> str:
    """The script of most letters of a text, or of most of its marks if it has no letters: a name of ``SCRIPTS``.

    Examples
    --------
    >>> [text_script(text) for text in (" Berlin", "Лон", "东", " 40", "\\N{THAI CHARACTER SARA I}", "Ａ")]
    ['latin', 'cyrillic', 'han', 'none', 'thai', 'latin']
    >>> text_script(" \\ufffd"), text_script("an\\ufffd")
    ('undecodable', 'latin')
    """
    readable = unicodedata.normalize("NFKC", text.replace(_UNREADABLE, ""))  # wide letters are letters
    name = main_script(readable) or main_script(readable, of_marks=True)
    if name not in _OF_MANY:
        script = _NAMES.get(name, name.lower())
        return script if script in SCRIPTS else "other"
    return "undecodable" if _UNREADABLE in text else "none"


def token_script(tokenizer: Any, token: int) -> str:
    """The script of what a token decodes to, alone: a name of ``SCRIPTS``.

    A token that the tokenizer does not know (the head may have more rows) decodes to nothing, and has no letters.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    token : int

    Examples
    --------
    >>> class Words:
    ...     def decode(self, ids, skip_special_tokens=False, **options):
    ...         return "" if skip_special_tokens and ids == [0] else ["<s>", " Ada", "?"][ids[0]]
    >>> [token_script(Words(), token) for token in range(3)]
    ['special', 'latin', 'none']
    """
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    script = text_script(text)
    if script == "undecodable" or not text:  # some tokenizers call their byte tokens special
        return script
    alone = tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return script if alone else "special"
