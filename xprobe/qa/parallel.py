"""Parallel sets: the built-in one, XQuAD, a folder of ``NAME.<lang>.json`` files, or one such file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from xprobe.cache import cache_dir
from xprobe.errors import DataError, UsageError
from xprobe.qa.records import Dataset, Problem, Record
from xprobe.qa.squad import read_squad

BUILTIN_DIR = Path(__file__).with_name("builtin")
XQUAD_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
_FILE_NAME = re.compile(r"(?P<name>.+)\.(?P<language>[a-z]{2,3}(?:[-_][A-Za-z0-9]+)*)\.json$")


def load_data(
    spec: str, languages: Iterable[str] | None = None, *, strict: bool = False, needed: Iterable[str] = ()
) -> Dataset:
    """Reads the dataset that ``spec`` names.

    Parameters
    ----------
    spec : str
        ``builtin``, ``xquad``, a folder of ``NAME.<lang>.json`` files in SQuAD v1.1 format, or one such file.
    languages : iterable of str, optional
        Read only these (and ``needed``); all if None.
    strict : bool
        Raise on the first problem.
    needed : iterable of str
        Languages read as well if the data holds them (English, for the contexts of en-x).

    Raises
    ------
    UsageError
        Nothing at ``spec``, or an unknown language.
    DataError
        A file is not JSON or not SQuAD, no usable record is left, or (``strict``) a record is bad.
    """
    files = find_files(spec)
    misnamed = _misnamed(files)
    if languages is not None:
        asked = tuple(languages)
        for language in asked:
            if language not in files:
                raise UsageError(f"language {language!r} is not in {spec}; available: {', '.join(files)}")
        files = {language: path for language, path in files.items() if language in {*asked, *needed}}
    records: dict[str, dict[str, Record]] = {}
    problems = misnamed
    digest = hashlib.sha256()
    for language, path in files.items():
        records[language], found, checksum = read_squad(path, language)
        problems += found
        digest.update(f"{language} {checksum}\n".encode())
    problems += _align(records, files, problems)
    if strict and problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}; mend the file, or run without --strict to leave such records out")
    for language, path in files.items():
        if not records[language]:
            counted = f": {len(problems)} left out, the first: {problems[0]}" if problems else ""
            raise DataError(f"{path} holds no usable question{counted}. `xprobe data check {spec}` lists every problem")
    return Dataset(spec, records, tuple(str(path) for path in files.values()), tuple(problems), digest.hexdigest())


def find_files(spec: str) -> dict[str, Path]:
    """Path per language of the dataset that ``spec`` names, in alphabetical order of language, English first."""
    if spec == "builtin":
        return _folder(BUILTIN_DIR, spec)
    if spec == "xquad":
        return _folder(xquad_dir(), spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(path, spec)
    if path.is_file():
        match = _FILE_NAME.match(path.name)
        if match is None:
            raise UsageError(f"cannot tell the language of {path}: name it like xquad.en.json (NAME.<language>.json)")
        return {match["language"]: path}
    raise UsageError(f"no data at {spec!r}: not a file, not a folder, not one of builtin, xquad")


def xquad_dir() -> Path:
    """Where XQuAD lies: ``$XPROBE_XQUAD_DIR`` if set, else the cache that ``xprobe data fetch xquad`` fills."""
    named = os.environ.get("XPROBE_XQUAD_DIR")
    folder = Path(named).expanduser() if named else cache_dir() / "data" / "xquad"
    if not folder.is_dir() or not any(folder.glob("*.json")):
        where = f"$XPROBE_XQUAD_DIR is {folder}" if named else f"nothing in {folder}"
        raise UsageError(f"XQuAD is not here ({where}): run `xprobe data fetch xquad`, or give its folder with --data")
    return folder


def _folder(folder: Path, spec: str) -> dict[str, Path]:
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        match = _FILE_NAME.match(path.name)
        if match is not None and not path.name.startswith("."):
            found.setdefault(match["name"], {})[match["language"]] = path
    if not found:
        raise UsageError(f"no data in {folder}: expected files like xquad.en.json (NAME.<language>.json)")
    if len(found) > 1:
        raise UsageError(f"{folder} holds several sets ({', '.join(sorted(found))}): keep one set per folder")
    (files,) = found.values()
    if "all" in files:
        raise UsageError(f"{files['all']}: 'all' stands for all languages together, it cannot be the name of one")
    return dict(sorted(files.items(), key=lambda entry: (entry[0] != "en", entry[0])))


def _misnamed(files: dict[str, Path]) -> list[Problem]:
    """Files that begin like the set's but whose language code is none: left out, and said so."""
    first = next(iter(files.values()))
    match = _FILE_NAME.match(first.name)
    stem = match["name"] if match else first.stem
    beside = sorted(first.parent.glob("*.json")) if len(files) > 1 else []
    return [
        Problem(path.name, "file", f"name is not {stem}.<language>.json")
        for path in beside
        if path.name.startswith(f"{stem}.") and path not in files.values()
    ]


def _align(records: dict[str, dict[str, Record]], files: dict[str, Path], known: Iterable[Problem]) -> list[Problem]:
    """Reports ids that one language has and another lacks, and gives every paragraph one key in all languages.

    Paragraphs are matched by any question id that they share: the key is the paragraph's place in the first language
    (English if present) that holds it. A paragraph that shares none keeps its own place, with its language before it
    if that key is another paragraph's. Ids reported already for a file (``known``) are not reported again.
    """
    common: dict[str, str] = {}
    for language in records:
        keys: dict[str, str] = {}
        for id_, record in records[language].items():
            if id_ in common:
                keys.setdefault(record.paragraph, common[id_])
        taken = set(common.values())
        for record in records[language].values():
            own = record.paragraph
            keys.setdefault(own, f"{language}-{own}" if own in taken else own)
        for id_, record in records[language].items():
            records[language][id_] = replace(record, paragraph=keys[record.paragraph])
            common.setdefault(id_, keys[record.paragraph])
    reported = {(problem.file, problem.where) for problem in known}
    return [
        Problem(files[language].name, f"id {id_}", "id is missing in a parallel file")
        for language in records
        for id_ in common
        if id_ not in records[language] and (files[language].name, f"id {id_}") not in reported
    ]
