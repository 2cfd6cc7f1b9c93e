"""Texts for others: without the folders of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_ROOT = r"(?:~[\w.-]*(?=[\\/])|[A-Za-z]:(?=[\\/]))?"  # of a path from the root or the home folder
_WORD = r"(?:[^\s\\/:,;'\"()\]·]|\([^()\\/]*\)|(?<=\w)'(?=\w))+"
# in a text: a folder may have blanks in its name, as a separator follows; the last part has none
_PATH = re.compile(
    rf"(?<![\w/.\\~)\]-])(?:file://)?{_ROOT}(?:\\?\\|/)(?=[^\s\\/])(?:{_WORD}(?:[ \xa0]+{_WORD})*[\\/])*(?:{_WORD})?"
)
# a whole name: what stands before the path ("hf:", "regression:"), the path, and parts such as ",split=test"
_NAME = re.compile(rf"(\w[\w+-]+:)?({_ROOT}[\\/](?![\\/]).*?|\\\\.*?)((?:,[a-z]+=[^,\\/]*)*)", re.DOTALL)


def without_folders(value: Any) -> Any:
    """Texts and plain values in which every absolute path is only its last part. Relative paths and names of the Hub
    stay.

    In a dict or list a text that begins with a path is a path to its end (``shown_name``). Elsewhere a path ends at a
    blank, unless a separator follows later.

    Examples
    --------
    >>> without_folders({"model": "/home/ada/models/tiny", "lens": "tuned:/data/lens", "data": ["google/xquad"]})
    {'model': 'tiny', 'lens': 'tuned:lens', 'data': ['google/xquad']}
    >>> without_folders("no file in /home/Ada Lovelace/models/tiny (see https://example.org/a/b)")
    'no file in tiny (see https://example.org/a/b)'
    """
    if isinstance(value, dict):
        return {name: without_folders([one])[0] for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [shown_name(one) if isinstance(one, str) else without_folders(one) for one in value]
    return _PATH.sub(lambda found: _last(found[0]), value) if isinstance(value, str) else value


def shown_name(name: str) -> str:
    """The name of a model, data, lens or run as others see it: of an absolute path the last part.

    Examples
    --------
    >>> shown_name("/home/Ada, Countess/models/tiny v2"), shown_name("hf:/data/my sets/boats,split=test")
    ('tiny v2', 'hf:boats,split=test')
    >>> shown_name("Qwen/Qwen3-8B"), shown_name("regression:./lens.pt")
    ('Qwen/Qwen3-8B', 'regression:./lens.pt')
    """
    found = _NAME.fullmatch(name)
    return f"{found[1] or ''}{_last(found[2])}{found[3]}" if found else without_folders(name)


def shown_names(names: Iterable[str]) -> dict[str, str]:
    """``shown_name`` of each name; those that would look the same get numbers.

    Examples
    --------
    >>> shown_names(["/a/tiny", "/b/tiny", "other"])
    {'/a/tiny': 'tiny', '/b/tiny': 'tiny #2', 'other': 'other'}
    """
    shown: dict[str, str] = {}
    for name in dict.fromkeys(names):
        short = text = shown_name(name)
        number = 2
        while text in shown.values():
            text, number = f"{short} #{number}", number + 1
        shown[name] = text
    return shown


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
