"""Errors of a probe's own functions: they name the probe, and the place in the run where it failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from xprobe.errors import ProbeError, XprobeError


@contextmanager
def naming_probe(name: str, *place: str) -> Iterator[None]:
    """Turns any error of this block into a ``ProbeError`` that names the probe. Errors of xprobe pass unchanged.

    Parameters
    ----------
    name : str
        The name of the probe.
    *place : str
        Where it is at work, as far as it is known: "setting en-x", "state prompt_end", "layer 3", "fold 2".

    Raises
    ------
    ProbeError
        From the error that the block raised.

    Examples
    --------
    >>> with naming_probe("script", "layer 3", "fold 2"):
    ...     [][0]
    Traceback (most recent call last):
        ...
    xprobe.errors.ProbeError: probe 'script' failed (layer 3, fold 2): IndexError: list index out of range
    """
    try:
        yield
    except XprobeError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        what = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        where = f" ({', '.join(place)})" if place else ""
        raise ProbeError(f"probe {name!r} failed{where}: {what}") from error
