"""Language codes: ``en``, ``sw``, ``zh-Hant``."""

from __future__ import annotations

import re
from typing import Any

CODE = r"(?!all(?![-_]))[a-z]{2,3}(?:[-_][A-Za-z0-9]+)*"  # "all" means all languages together
_WHOLE = re.compile(CODE)


def is_code(value: Any) -> bool:
    """Whether ``value`` is written like a language code.

    Examples
    --------
    >>> is_code("zh-Hant"), is_code("German"), is_code("all")
    (True, False, False)
    """
    return isinstance(value, str) and _WHOLE.fullmatch(value) is not None
