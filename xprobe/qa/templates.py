"""Prompt templates: the built-in one, or a TOML file of the user (``templates/default.toml`` describes the entries)."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xprobe.errors import UsageError

DEFAULT_TEMPLATE = Path(__file__).with_name("templates") / "default.toml"
FORMATS = ("auto", "chat", "plain")
FALLBACK_LANGUAGE = "en"
_KEYS = ("format", "prompt", "cue", "separator")


@dataclass(frozen=True)
class Template:
    """The text around context, question and answer: tables by language.

    Examples
    --------
    >>> template = Template("plain", {"en": "{context} Q: {question}"}, {"en": "A:"}, {"en": " "})
    >>> template.pieces("de", "Ada sold 40 boats.", "Wie viele?")[1:4]
    [('context', 'Ada sold 40 boats.'), ('template', ' Q: '), ('question', 'Wie viele?')]
    """

    format: str
    prompt: dict[str, str]
    cue: dict[str, str]
    separator: dict[str, str]

    def pieces(self, language: str, context: str, question: str) -> list[tuple[str, str]]:
        """The prompt as pairs (part, text) in order. A part is ``template``, ``context`` or ``question``."""
        before, rest = _pick(self.prompt, language).split("{context}")
        between, after = rest.split("{question}")
        parts = [("template", before), ("context", context), ("template", between)]
        return [*parts, ("question", question), ("template", after)]

    @property
    def fallback(self) -> str:
        """The language whose prompt stands in where a language has none."""
        return next(key for key in (FALLBACK_LANGUAGE, *self.prompt) if key in self.prompt)

    def without_wording(self, languages: Iterable[str]) -> list[str]:
        """Languages of contexts for which the prompt of another language is used: it is a table that lacks them.

        Examples
        --------
        >>> load_template("plain").without_wording(["de", "sw", "zh-TW"])
        ['sw']
        """
        if len(self.prompt) == 1:
            return []  # one text for all languages
        return [one for one in languages if one not in self.prompt and _base(one) not in self.prompt]

    def cue_for(self, language: str) -> str:
        """The text that ends a plain prompt, on a line of its own."""
        return _pick(self.cue, language)

    def separator_for(self, language: str) -> str:
        """The text between the cue and the answer."""
        return _pick(self.separator, language)


def load_template(name: str) -> Template:
    """Loads a template.

    Parameters
    ----------
    name : str
        ``auto``, ``chat`` or ``plain`` for the built-in wording, or the path of a TOML file.

    Raises
    ------
    UsageError
        There is no such file, or it is not a template. The message names the entry.

    Examples
    --------
    >>> load_template("plain").cue_for("de")
    'Antwort:'
    """
    path = DEFAULT_TEMPLATE if name in FORMATS else Path(name).expanduser()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"template {name!r} is neither one of {', '.join(FORMATS)} nor a readable file ({error.strerror})"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"template file {path} is not valid TOML in UTF-8: {error}") from error
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        raise UsageError(f"template file {path} has an unknown entry {unknown[0]!r}; known: {', '.join(_KEYS)}")
    kind = name if name in FORMATS else values.get("format", "auto")
    if kind not in FORMATS:
        raise UsageError(f"template file {path}: format must be one of {', '.join(FORMATS)}, got {kind!r}")
    prompt = _table(path, "prompt", values.get("prompt"))
    for language, text in prompt.items():
        if other := [name for name in re.findall(r"\{(\w+)\}", text) if name not in ("context", "question")]:
            raise UsageError(
                f"template file {path}: prompt ({language}) holds {{{other[0]}}}, which nothing replaces; "
                "it may hold {context} and {question}"
            )
        if re.findall(r"\{(context|question)\}", text) != ["context", "question"]:
            raise UsageError(
                f"template file {path}: prompt ({language}) must hold {{context}} and then {{question}}, each once"
            )
    cue = _table(path, "cue", values.get("cue", "Answer:"))
    separator = _table(path, "separator", values.get("separator", " "), strip=False)
    return Template(kind, prompt, cue, separator)


def _table(path: Path, key: str, value: Any, *, strip: bool = True) -> dict[str, str]:
    table = {FALLBACK_LANGUAGE: value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not table or not all(isinstance(text, str) for text in table.values()):
        raise UsageError(f"template file {path}: {key} must be a text, or a table of texts by language")
    # a prompt must not start or end with blanks: chat templates remove them, and spans would move
    return {language: text.strip() if strip else text for language, text in table.items()}


def _base(code: str) -> str:
    """The language of a code, without its script or region."""
    return code.replace("_", "-").partition("-")[0]


def _pick(table: dict[str, str], language: str) -> str:
    return next(table[key] for key in (language, _base(language), FALLBACK_LANGUAGE, *table) if key in table)
