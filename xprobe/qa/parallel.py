"""Parallel sets: the built-in one, XQuAD, a folder of files named by language, one such file, or records in memory."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from xprobe.cache import cache_dir
from xprobe.config import RECORDS_IN_MEMORY
from xprobe.errors import DataError, UsageError
from xprobe.qa.layouts import read_file
from xprobe.qa.records import Dataset, Problem, Record
from xprobe.qa.validation import Collector

BUILTIN_DIR = Path(__file__).with_name("builtin")
XQUAD_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
_ENDING = r"\.jsonl?(?:\.gz)?$"
_FILE_NAME = re.compile(r"(?P<name>.+)\.(?P<language>[a-z]{2,3}(?:[-_][A-Za-z0-9]+)*)" + _ENDING)
_DATA_FILE = re.compile(r"[^.].*" + _ENDING)


def load_data(
    spec: Any,
    languages: Iterable[str] | None = None,
    *,
    strict: bool = False,
    needed: Iterable[str] = (),
    with_reference: bool = False,
) -> Dataset:
    """Reads the dataset that ``spec`` names, or takes the records that it holds.

    Parameters
    ----------
    spec : str, path, Dataset, or records
        ``builtin``, ``xquad``, a folder of ``NAME.<lang>.json`` files, or one such file. A file is in SQuAD v1.1
        format or holds flat records as Hugging Face's sets do; it may hold JSON lines (``.jsonl``) and be compressed
        (``.gz``). Records in memory: see ``xprobe.qa.memory.read_records``. A ``Dataset`` is returned as it is.
    languages : iterable of str, optional
        Read only these (and ``needed``); all if None.
    strict : bool
        Raise on the first problem.
    needed : iterable of str
        Languages read as well if the data holds them (English, for the contexts of en-x).
    with_reference : bool
        Read the first language of the data as well: English, or else the first one by alphabet. It decides in which
        order a limited run takes questions.

    Raises
    ------
    UsageError
        Nothing at ``spec``, an unknown language, or something that is no data.
    DataError
        A file is in no known format, no usable record is left, or (``strict``) a record is bad.
    """
    if isinstance(spec, Dataset):
        _languages_to_read(spec.languages, languages, needed, with_reference, spec.name)
        if strict:
            _check_strictly(spec.problems)
        return spec
    if isinstance(spec, str | os.PathLike):
        return _load_files(os.fsdecode(spec), languages, strict, needed, with_reference)
    from xprobe.qa import memory  # loads pandas

    collected, problems = memory.read_records(spec)
    kept = _languages_to_read(collected, languages, needed, with_reference, RECORDS_IN_MEMORY)
    parts = {language: (f"data[{language!r}]", collected[language]) for language in kept}
    return _joined(RECORDS_IN_MEMORY, parts, problems, strict)


def _load_files(
    spec: str, languages: Iterable[str] | None, strict: bool, needed: Iterable[str], with_reference: bool
) -> Dataset:
    files = find_files(spec)
    misnamed = [] if _kind(spec) == "file" else _misnamed(files)
    kept = _languages_to_read(files, languages, needed, with_reference, spec)
    parts = {language: (str(files[language]), read_file(files[language], language)) for language in kept}
    data = _joined(spec, parts, misnamed, strict, f". `xprobe data check {spec}` lists every problem")
    return replace(data, files=tuple(str(files[language]) for language in kept))


def _languages_to_read(
    present: Iterable[str], languages: Iterable[str] | None, needed: Iterable[str], with_reference: bool, name: str
) -> list[str]:
    """The languages to read, in the order of ``present``."""
    known = list(present)
    if languages is None:
        return known
    asked = tuple(languages)
    for language in asked:
        if language not in known:
            raise UsageError(f"language {language!r} is not in {name}; available: {', '.join(known)}")
    reference = known[:1] if with_reference else ()
    return [language for language in known if language in {*asked, *needed, *reference}]


def _joined(
    name: str, parts: dict[str, tuple[str, Collector]], problems: list[Problem], strict: bool, advice: str = ""
) -> Dataset:
    """One dataset of what was read of each language, which comes with the name of its source."""
    records = {language: part.records for language, (_, part) in parts.items()}
    problems = [*problems, *(problem for _, part in parts.values() for problem in part.problems)]
    reported = {(language, problem.id) for language, (_, part) in parts.items() for problem in part.problems}
    problems += _align(records, {language: Path(source).name for language, (source, _) in parts.items()}, reported)
    if strict:
        _check_strictly(problems)
    digest = hashlib.sha256()
    for language, (source, part) in parts.items():
        if not part.records:
            own = part.problems
            counted = f": {len(own)} left out, the first: {own[0]}" if own else ""
            raise DataError(f"{source} holds no usable question{counted}{advice}")
        digest.update(f"{language} {part.checksum}\n".encode())
    return Dataset(name, records, (), tuple(problems), digest.hexdigest())


def _check_strictly(problems: Sequence[Problem]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(
            f"{problems[0]}{more}; mend it, or run without --strict (strict=False) to leave such records out"
        )


def find_files(spec: str) -> dict[str, Path]:
    """Path per language of the dataset that ``spec`` names, in alphabetical order of language, English first."""
    if spec == "builtin":
        return _folder(BUILTIN_DIR, spec)
    if spec == "xquad":
        return _folder(xquad_dir(), spec)
    path, kind = _path(spec), _kind(spec)
    if kind == "folder":
        return _folder(path, spec)
    if kind == "file":
        match = _FILE_NAME.match(path.name)
        if match is None:
            raise UsageError(
                f"cannot tell the language of {path}: name it like xquad.en.json "
                "(NAME.<language>.json, or .jsonl, .json.gz, .jsonl.gz)"
            )
        return {match["language"]: path}
    shown = spec if len(spec) <= 200 else spec[:60] + "..."
    raise UsageError(f"no data at {shown!r}: not a file, not a folder, not one of builtin, xquad")


def _path(spec: str) -> Path:
    return Path(os.path.expanduser(spec))  # Path.expanduser raises where there is no such user


def _kind(spec: str) -> str:
    """What lies at a path: ``file``, ``folder`` or ``""``; also for text that can be no path, as too long a one."""
    try:
        path = _path(spec)
        return "" if not spec else "folder" if path.is_dir() else "file" if path.is_file() else ""
    except (OSError, ValueError):
        return ""


def xquad_dir() -> Path:
    """Where XQuAD lies: ``$XPROBE_XQUAD_DIR`` if set, else the cache that ``xprobe data fetch xquad`` fills."""
    named = os.environ.get("XPROBE_XQUAD_DIR")
    folder = Path(named).expanduser() if named else cache_dir() / "data" / "xquad"
    if not folder.is_dir() or not _data_files(folder):
        where = f"$XPROBE_XQUAD_DIR is {folder}" if named else f"nothing in {folder}"
        raise UsageError(f"XQuAD is not here ({where}): run `xprobe data fetch xquad`, or give its folder with --data")
    return folder


def _data_files(folder: Path) -> list[Path]:
    """Files that may hold records, by their names; hidden ones left out."""
    try:
        return sorted(path for path in folder.iterdir() if _DATA_FILE.match(path.name))
    except OSError as error:
        raise UsageError(f"cannot read the folder {folder}: {error.strerror or error}") from error


def _folder(folder: Path, spec: str) -> dict[str, Path]:
    found: dict[str, dict[str, Path]] = {}
    for path in _data_files(folder):
        match = _FILE_NAME.match(path.name)
        if match is None:
            continue
        other = found.setdefault(match["name"], {}).setdefault(match["language"], path)
        if other != path:
            raise UsageError(f"{folder} holds {match['language']!r} twice: keep {other.name} or {path.name}")
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
    return [
        Problem(path.name, "file", f"name is not {stem}.<language>.json")
        for path in _data_files(first.parent)
        if path.name.startswith(f"{stem}.") and path not in files.values()
    ]


def _align(
    records: dict[str, dict[str, Record]], names: dict[str, str], reported: Set[tuple[str, str]]
) -> list[Problem]:
    """Reports ids that one language has and another lacks, and gives every paragraph one key in all languages.

    Paragraphs are matched by any question id that they share: the key is the paragraph's place in the first language
    (English if present) that holds it. A paragraph that shares none keeps its own place, with its language before it
    if that key is another paragraph's; so does the second of two that one paragraph of another language is split into,
    since a key stands for one context in each language. A language and id in ``reported`` are not reported again.
    """
    common: dict[str, str] = {}
    for language in records:
        keys: dict[str, str] = {}
        claimed: set[str] = set()
        for id_, record in records[language].items():
            if id_ in common and record.paragraph not in keys and common[id_] not in claimed:
                keys[record.paragraph] = common[id_]
                claimed.add(common[id_])
        taken = set(common.values())
        for record in records[language].values():
            own = record.paragraph
            keys.setdefault(own, f"{language}-{own}" if own in taken else own)
        for id_, record in records[language].items():
            records[language][id_] = replace(record, paragraph=keys[record.paragraph])
            common.setdefault(id_, keys[record.paragraph])
    return [
        Problem(names[language], f"id {id_}", "id is missing in a parallel file", "", id_)
        for language in records
        for id_ in common
        if id_ not in records[language] and (language, id_) not in reported
    ]
