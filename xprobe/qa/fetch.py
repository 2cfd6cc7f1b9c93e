"""Downloads XQuAD into the cache. A file is validated under a temporary name and then renamed."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

from xprobe.cache import cache_dir
from xprobe.errors import DataError, UsageError
from xprobe.qa.parallel import XQUAD_LANGUAGES
from xprobe.qa.squad import read_squad

XQUAD_URL = "https://raw.githubusercontent.com/google-deepmind/xquad/master"
TIMEOUT = 60  # seconds


def fetch_xquad(
    languages: Iterable[str] = XQUAD_LANGUAGES,
    *,
    url: str = XQUAD_URL,
    force: bool = False,
    report: Callable[[str, int], None] | None = None,
) -> Path:
    """Downloads XQuAD (Artetxe, Ruder, Yogatama 2020; licence CC BY-SA 4.0) into the cache.

    Parameters
    ----------
    languages : iterable of str
        Which languages to download.
    url : str
        Address of the folder with the files ``xquad.<lang>.json``.
    force : bool
        Download again what the cache holds already.
    report : callable, optional
        Called as ``report(language, questions)`` when the file of a language is in place.

    Returns
    -------
    pathlib.Path
        The folder of the files.

    Raises
    ------
    UsageError
        XQuAD does not have one of the languages.
    DataError
        The address does not answer or does not send SQuAD data, or the cache cannot be written. Files that were
        downloaded before stay.

    Examples
    --------
    >>> fetch_xquad(["en", "th"])  # doctest: +SKIP
    PosixPath('/home/me/.cache/xprobe/data/xquad')
    >>> fetch_xquad(["en", "fr"])
    Traceback (most recent call last):
    xprobe.errors.UsageError: XQuAD has no language 'fr'; it has ar, de, el, en, es, hi, ro, ru, th, tr, vi, zh
    """
    languages = tuple(languages)
    for language in languages:
        if language not in XQUAD_LANGUAGES:
            raise UsageError(f"XQuAD has no language {language!r}; it has {', '.join(XQUAD_LANGUAGES)}")
    folder = cache_dir() / "data" / "xquad"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write the cache {folder}: {error.strerror}; set XPROBE_CACHE") from error
    for language in languages:
        path = folder / f"xquad.{language}.json"
        if force or not path.is_file():
            _download(f"{url.rstrip('/')}/{path.name}", path, language)
        if report is not None:
            report(language, len(read_squad(path, language)[0]))
    return folder


def _download(address: str, path: Path, language: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            temporary.write_bytes(answer.read())
        try:
            usable = read_squad(temporary, language)[0]
        except DataError as error:
            why = str(error).replace(str(temporary), "what it sends")
            raise DataError(f"{address} does not send SQuAD data: {why}") from error
        if not usable:
            raise DataError(f"{address} holds no usable question")
        temporary.replace(path)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"cannot fetch {address} ({reason}): try again, give another url (--url), "
            "or copy the files by hand and give their folder as data (--data)"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
