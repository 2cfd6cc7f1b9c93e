"""Checks of what callers pass to xprobe's functions. A wrong value is a UsageError that names the parameter."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xprobe.errors import UsageError


def text_names(parameter: str, value: Any) -> tuple[str, ...]:
    """Names as a tuple, each of them once. A single text is one name.

    Raises
    ------
    UsageError
        ``value`` is neither a text nor several of them.

    Examples
    --------
    >>> text_names("languages", "en")
    ('en',)
    >>> text_names("languages", ["en", "de", "en"])
    ('en', 'de')
    >>> text_names("languages", 5)
    Traceback (most recent call last):
    xprobe.errors.UsageError: languages must be a text or a list of texts, got 5
    """
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"{parameter} must be a text or a list of texts, got {value!r}")
    return tuple(dict.fromkeys(names))


# file -> what the folder holds that has it
MARKERS = {"manifest.json": "run", "plan.json": "sweep"}


def folder_path(parameter: str, value: Any) -> Path:
    """A path that the caller gives as a text or a path.

    Raises
    ------
    UsageError
        It is something else, empty, or no path at all.

    Examples
    --------
    >>> folder_path("out", "runs/mine").name
    'mine'
    >>> folder_path("out", 5)
    Traceback (most recent call last):
    xprobe.errors.UsageError: out must be a path, got 5
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path or "\0" in path:
        raise UsageError(f"{parameter} must be a path, got {value!r}")
    return Path(path)


def check_replaceable(path: Path) -> None:
    """Raises a UsageError if ``path`` is a file that a run or a sweep needs: results go elsewhere.

    Examples
    --------
    >>> check_replaceable(Path("runs/mine/report.html"))
    """
    path = Path(os.path.realpath(path))
    if not path.is_file() or (path.suffix not in (".json", ".jsonl", ".parquet") and path.parent.name != "shards"):
        return
    for folder in (path.parent, path.parent.parent):
        for name, what in MARKERS.items():
            if (folder / name).is_file():
                raise UsageError(f"{path} is a file of the {what} in {folder}, which must not change: name another")


def check_instance(parameter: str, value: Any, kind: type) -> None:
    """Raises a UsageError if ``value`` is not of a class.

    Examples
    --------
    >>> check_instance("resume", True, bool)
    >>> check_instance("resume", "yes", bool)
    Traceback (most recent call last):
    xprobe.errors.UsageError: resume must be True or False, got 'yes'
    """
    if not isinstance(value, kind):
        what = {bool: "True or False", str: "text"}.get(kind, f"{'an' if kind.__name__[0] in 'AEIO' else 'a'} "
                                                        f"{kind.__name__}")  # fmt: skip
        raise UsageError(f"{parameter} must be {what}, got {value!r}")


def check_callable(parameter: str, value: Any) -> None:
    """Raises a UsageError if ``value`` is neither a function nor None.

    Examples
    --------
    >>> check_callable("progress", print)
    >>> check_callable("progress", 5)
    Traceback (most recent call last):
    xprobe.errors.UsageError: progress must be a function that takes an event, or None, got 5
    """
    if value is not None and not callable(value):
        raise UsageError(f"{parameter} must be a function that takes an event, or None, got {value!r}")


def check_least(parameter: str, value: Any, least: int) -> None:
    """Raises a UsageError if ``value`` is not a whole number of at least ``least``.

    Examples
    --------
    >>> check_least("seed", 0, 0)
    >>> check_least("bootstrap", 1.5, 1)
    Traceback (most recent call last):
    xprobe.errors.UsageError: bootstrap must be a whole number of at least 1, got 1.5
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{parameter} must be a whole number of at least {least}, got {value!r}")


def check_jobs(value: Any) -> None:
    """Raises a UsageError if ``value`` is no number of parallel jobs.

    Examples
    --------
    >>> check_jobs(-1)
    >>> check_jobs(-7)
    Traceback (most recent call last):
    xprobe.errors.UsageError: jobs must be -1 (one per core) or a whole number of at least 1, got -7
    """
    if isinstance(value, bool) or not isinstance(value, int) or (value != -1 and value < 1):
        raise UsageError(f"jobs must be -1 (one per core) or a whole number of at least 1, got {value!r}")


def check_device_map(value: Any) -> None:
    """Raises a UsageError if ``value`` does not give modules a device each. torch checks the devices later.

    Examples
    --------
    >>> check_device_map({"model.layers.0": 0, "lm_head": "cpu"})
    >>> check_device_map({"lm_head": True})
    Traceback (most recent call last):
    xprobe.errors.UsageError: device_map must give each module a device by number or name, got {'lm_head': True}
    """
    if (
        not isinstance(value, dict)
        or not value
        or not all(isinstance(module, str) and _names_a_device(device) for module, device in value.items())
    ):
        raise UsageError(f"device_map must give each module a device by number or name, got {value!r}")


def _names_a_device(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() == value != ""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
