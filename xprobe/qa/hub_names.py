"""Names of question sets in the layout of the Hugging Face Hub: ``hf:google/xquad``, and which language is where."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from xprobe.errors import UsageError
from xprobe.qa.codes import CODE, is_code

PREFIX = "hf:"
LANGUAGE = "{lang}"  # stands for the language in the name of a configuration
SYNTAX = "hf:NAME[,config=CONFIG][,split=SPLIT][,revision=REVISION][,language=CODE]"
SPLITS = ("train", "validation", "test", "dev", "val")  # no languages, although two of them look like codes
_ENDS_WITH_CODE = re.compile(rf"(?P<start>|.*?[._-])(?P<language>{CODE})")


@dataclass(frozen=True)
class HubName:
    """What ``SYNTAX`` says of a data set; ``""`` for what is left out.

    Examples
    --------
    >>> HubName.from_text("hf:facebook/mlqa,config=mlqa.{lang}.{lang},split=test").config
    'mlqa.{lang}.{lang}'
    """

    name: str
    config: str = ""
    split: str = ""
    revision: str = ""
    language: str = ""

    @classmethod
    def from_text(cls, text: str) -> HubName:
        """Reads a name.

        Raises
        ------
        UsageError
            It is not written as ``SYNTAX`` says.

        Examples
        --------
        >>> HubName.from_text("hf:google/xquad,branch=main")
        Traceback (most recent call last):
        xprobe.errors.UsageError: 'hf:google/xquad,branch=main': unknown part 'branch=main'; write hf:NAME[,config=...
        """
        name, *parts = re.split(",(?=[a-z]+=)", text.removeprefix(PREFIX))
        if "," in name and not Path(name).is_dir():  # a folder may have a comma in its name
            name, *parts = text.removeprefix(PREFIX).split(",")
        options: dict[str, str] = {}
        known = {one.name for one in fields(cls)} - {"name"}
        for part in parts:
            key, _, value = part.partition("=")
            if key not in known or not value or key in options:
                what = "unknown part" if key not in known else "a second" if key in options else "nothing after"
                raise UsageError(f"{text!r}: {what} {part!r}; write {SYNTAX}")
            options[key] = value
        if not name.strip():
            raise UsageError(f"{text!r} names no data set; write {SYNTAX}")
        found = cls(name, **options)
        if found.language and not is_code(found.language):
            raise UsageError(f"{text!r}: a language is a code such as 'en' or 'zh-Hans', got {found.language!r}")
        if found.language and LANGUAGE in found.config:
            raise UsageError(f"{text!r}: leave out language=, or {LANGUAGE}: each says which language it is")
        return found


def languages_of(configs: Iterable[str], pattern: str) -> dict[str, str]:
    """Language -> configuration, of the configurations that ``pattern`` describes. English first, then by alphabet.

    Examples
    --------
    >>> languages_of(["mlqa.de.de", "mlqa.de.en", "mlqa.en.en"], "mlqa.{lang}.{lang}")
    {'en': 'mlqa.en.en', 'de': 'mlqa.de.de'}
    """
    first, *others = map(re.escape, pattern.split(LANGUAGE))
    whole = re.compile(first + "".join(
        (f"(?P<language>{CODE})" if number == 0 else "(?P=language)") + part for number, part in enumerate(others)
    ))  # fmt: skip
    found = {match["language"]: config for config in configs if (match := whole.fullmatch(config))}
    return dict(sorted(found.items(), key=lambda entry: (entry[0] != "en", entry[0])))


def patterns_in(configs: Iterable[str]) -> list[str]:
    """Patterns that at least two of the configurations follow, in each of which only the language differs.

    Examples
    --------
    >>> patterns_in(["xquad.ar", "xquad.en", "xquad.zh"])
    ['xquad.{lang}']
    >>> patterns_in(["mlqa.ar.ar", "mlqa.en.en", "train.ar", "train.de", "plain_text"])
    ['mlqa.{lang}.{lang}', 'train.{lang}']
    """
    counts: dict[str, int] = {}
    for config in configs:
        match = _ENDS_WITH_CODE.fullmatch(config)
        if match is None or config in SPLITS:
            continue
        start, language = match["start"], match["language"]
        twice = re.fullmatch(rf"(|.*[._-]){re.escape(language)}([._-])", start)
        pattern = f"{twice[1]}{LANGUAGE}{twice[2]}{LANGUAGE}" if twice else f"{start}{LANGUAGE}"
        counts[pattern] = counts.get(pattern, 0) + 1
    return [pattern for pattern, count in counts.items() if count > 1]
