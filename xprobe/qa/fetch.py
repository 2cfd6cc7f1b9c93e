"""Downloads XQuAD into the cache: one validated file per language, each renamed into place whole."""

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
    """Downloads ``url``/xquad.<lang>.json for every language that is not there yet; returns the folder.

    XQuAD (Artetxe, Ruder, Yogatama 2020) is licensed CC BY-SA 4.0. ``report(language, questions)`` is called as each
    file is in place. Files already there are kept unless ``force``.

    Raises
    ------
    UsageError
        A language that XQuAD does not have.
    DataError
        The address does not answer, or what it sends is not SQuAD data. Files fetched before stay.
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
            f"cannot fetch {address} ({reason}): try again, give another --url, "
            "or copy the files by hand and name their folder with --data"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
