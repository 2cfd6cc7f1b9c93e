"""Packages for languages that only scoring needs. They are imported when a text needs them."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from xprobe.errors import UsageError


def load_package(module: str, package: str, purpose: str, otherwise: str = "") -> Any:
    """Imports a module of an optional package.

    Raises
    ------
    UsageError
        It is not installed: says what needs it, how to install it, and what to do otherwise.

    Examples
    --------
    >>> load_package("no_such_module", "no-such-package", "words of Thai", "use another normaliser")
    Traceback (most recent call last):
        ...
    xprobe.errors.UsageError: words of Thai need the package no-such-package: pip install 'xprobe[scoring]', or use another normaliser
    """  # noqa: E501 - the message is one line
    os.environ.setdefault("PYTHAINLP_READ_ONLY", "1")  # else importing it makes a folder in the user's home
    try:
        return import_module(module)
    except ImportError as error:
        remedy = "pip install 'xprobe[scoring]'" + (f", or {otherwise}" if otherwise else "")
        raise UsageError(f"{purpose} need the package {package}: {remedy}") from error
