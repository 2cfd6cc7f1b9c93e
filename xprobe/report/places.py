"""Texts for others: without the folders of this machine."""

from __future__ import annotations

import re
from typing import Any

# a path from the root or the home folder, at the beginning of a text or after a sign that ends a word
_PATH = re.compile(r"(?<![^\s:=,;'\"(\[])(?:~[\w.-]*|[A-Za-z]:(?=[\\/]))?(?:[\\/][^\s\\/:,;'\")\]]+)+[\\/]?")


def without_folders(value: Any) -> Any:
    """Plain values in which every absolute path is only its last part. Relative paths and names of the Hub stay.

    Examples
    --------
    >>> without_folders({"model": "/home/ada/models/tiny", "lens": "tuned:/data/lens", "data": ["google/xquad"]})
    {'model': 'tiny', 'lens': 'tuned:lens', 'data': ['google/xquad']}
    """
    if isinstance(value, dict):
        return {name: without_folders(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    return (
        _PATH.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("\\/"))[-1], value)
        if isinstance(value, str)
        else value
    )
