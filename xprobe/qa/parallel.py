"""Loads parallel question sets: built-in, XQuAD, files, data sets of the Hugging Face Hub, records in memory."""

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
from xprobe.qa.hub_names import PREFIX
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
    revision: str = "",
) -> Dataset:
    """Loads the dataset that ``spec`` names or holds.

    Parameters
    ----------
    spec : str, path, Dataset, or records
        ``builtin``, ``xquad``, a folder of ``NAME.<lang>.json`` files, or one such file. A file is in SQuAD v1.1
        format, or holds flat records as the data sets of Hugging Face do. It may hold JSON lines (``.jsonl``) and be
        compressed (``.gz``). ``hf:NAME`` is a data set of the Hugging Face Hub (``xprobe.qa.hub.read_hub``). For
        records in memory see ``xprobe.qa.memory.read_records``. A ``Dataset`` is returned unchanged.
    languages : iterable of str, optional
        Read only these languages (and ``needed``). All if None.
    strict : bool
        Raise on the first problem.
    needed : iterable of str
        Languages read as well if the data holds them (English, for the contexts of en-x).
    with_reference : bool
        Read the first language of the data as well: English, or else the first one by alphabet. It decides in which
        order a limited run takes questions.
    revision : str
        The commit of the Hub to read if ``spec`` names no revision.

    Raises
    ------
    UsageError
        There is nothing at ``spec``, a language is unknown, or ``spec`` has a type that cannot hold data.
    DataError
        A file is in no known format, no usable record is left, or a record is bad and ``strict`` is True.

    Examples
    --------
    >>> data = load_data("builtin", ["de", "en"])
    >>> data.languages, len(data.ids), data.problems
    (('en', 'de'), 36, ())
    """
    if isinstance(spec, Dataset):
        _languages_to_read(spec.languages, languages, needed, with_reference, spec.name)
        if strict:
            _check_strictly(spec.problems)
        return spec
    if isinstance(spec, str) and spec.startswith(PREFIX):
        return _load_hub(spec, languages, strict, needed, with_reference, revision)
    if isinstance(spec, str | os.PathLike):
        return _load_files(os.fsdecode(spec), languages, strict, needed, with_reference)
    from xprobe.qa import memory  # loads pandas

    collected, problems = memory.read_records(spec)
    kept = _languages_to_read(collected, languages, needed, with_reference, RECORDS_IN_MEMORY)
    parts = {language: (f"data[{language!r}]", collected[language]) for language in kept}
    return _join(RECORDS_IN_MEMORY, parts, problems, strict)


def _load_files(
    spec: str, languages: Iterable[str] | None, strict: bool, needed: Iterable[str], with_reference: bool
) -> Dataset:
    files = find_files(spec)
    misnamed = [] if _kind(spec) == "file" else _misnamed_files(files)
    kept = _languages_to_read(files, languages, needed, with_reference, spec)
    parts = {language: (str(files[language]), read_file(files[language], language)) for language in kept}
    data = _join(spec, parts, misnamed, strict, f". `xprobe data check {spec}` lists every problem")
    return replace(data, files=tuple(str(files[language]) for language in kept))


def _load_hub(
    spec: str, languages: Iterable[str] | None, strict: bool, needed: Iterable[str], with_reference: bool, revision: str
) -> Dataset:
    from xprobe.qa import hub  # loads pandas and datasets

    asked = None if languages is None else tuple(languages)
    held = hub.read_hub(
        spec, lambda present: _languages_to_read(present, asked, needed, with_reference, spec), revision
    )
    parts = {language: (f"{spec}[{language!r}]", collector) for language, collector in held.collected.items()}
    data = _join(spec, parts, held.problems, strict, f". `xprobe data check {spec}` lists every problem")
    return replace(data, files=held.parts, revision=held.revision)


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


def _join(
    name: str, parts: dict[str, tuple[str, Collector]], problems: list[Problem], strict: bool, advice: str = ""
) -> Dataset:
    """Joins the languages to one dataset. ``parts`` holds, by language, the name of its source and what was read."""
    records = {language: part.records for language, (_, part) in parts.items()}
    problems = [*problems, *(problem for _, part in parts.values() for problem in part.problems)]
    reported = {(language, problem.id) for language, (_, part) in parts.items() for problem in part.problems}
    names = {lang: source if source.startswith(PREFIX) else Path(source).name for lang, (source, _) in parts.items()}
    problems += _align(records, names, reported)
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
            f"{problems[0]}{more}; correct it, or run without strict=True (--strict) to leave such records out"
        )


def find_files(spec: str) -> dict[str, Path]:
    """The file of each language of the dataset that ``spec`` names. English first, then in alphabetical order.

    Raises
    ------
    UsageError
        There is no data at ``spec``, or its files are not named by language.

    Examples
    --------
    >>> files = find_files("builtin")
    >>> list(files)[:3], files["th"].name
    (['en', 'ar', 'de'], 'builtin.th.json')
    """
    if spec == "builtin":
        return _files_in_folder(BUILTIN_DIR, spec)
    if spec == "xquad":
        return _files_in_folder(xquad_dir(), spec)
    path, kind = _path(spec), _kind(spec)
    if kind == "folder":
        return _files_in_folder(path, spec)
    if kind == "file":
        match = _FILE_NAME.match(path.name)
        if match is None:
            raise UsageError(
                f"cannot tell the language of {path}: name it like xquad.en.json "
                "(NAME.<language>.json, or .jsonl, .json.gz, .jsonl.gz)"
            )
        return {match["language"]: path}
    shown = spec if len(spec) <= 200 else spec[:60] + "..."
    raise UsageError(f"no data at {shown!r}: not a file, not a folder, not one of builtin, xquad, hf:NAME")


def _path(spec: str) -> Path:
    return Path(os.path.expanduser(spec))  # Path.expanduser raises for an unknown user


def _kind(spec: str) -> str:
    """``file``, ``folder``, or ``""`` for anything else: also for text that cannot be a path, such as one too long."""
    try:
        path = _path(spec)
        return "" if not spec else "folder" if path.is_dir() else "file" if path.is_file() else ""
    except (OSError, ValueError):
        return ""


def xquad_dir() -> Path:
    """The folder of XQuAD: ``$XPROBE_XQUAD_DIR`` if set, else the cache that ``xprobe data fetch xquad`` fills.

    Raises
    ------
    UsageError
        The folder holds no data.

    Examples
    --------
    >>> xquad_dir().name  # doctest: +SKIP
    'xquad'
    """
    named = os.environ.get("XPROBE_XQUAD_DIR")
    folder = Path(named).expanduser() if named else cache_dir() / "data" / "xquad"
    if not folder.is_dir() or not _data_files(folder):
        where = f"$XPROBE_XQUAD_DIR is {folder}" if named else f"nothing in {folder}"
        raise UsageError(
            f"XQuAD is not here ({where}): run `xprobe data fetch xquad`, or give its folder as data (--data)"
        )
    return folder


def _data_files(folder: Path) -> list[Path]:
    """Files whose names end like those of data files, without hidden files."""
    try:
        return sorted(path for path in folder.iterdir() if _DATA_FILE.match(path.name))
    except OSError as error:
        raise UsageError(f"cannot read the folder {folder}: {error.strerror or error}") from error


def _files_in_folder(folder: Path, spec: str) -> dict[str, Path]:
    sets: dict[str, dict[str, Path]] = {}
    for path in _data_files(folder):
        match = _FILE_NAME.match(path.name)
        if match is None:
            continue
        other = sets.setdefault(match["name"], {}).setdefault(match["language"], path)
        if other != path:
            raise UsageError(f"{folder} holds {match['language']!r} twice: keep {other.name} or {path.name}")
    if not sets:
        raise UsageError(f"no data in {folder}: expected files like xquad.en.json (NAME.<language>.json)")
    if len(sets) > 1:
        raise UsageError(f"{folder} holds several sets ({', '.join(sorted(sets))}): keep one set per folder")
    (files,) = sets.values()
    if "all" in files:
        raise UsageError(f"{files['all']}: 'all' means all languages together, so no language can have this name")
    return dict(sorted(files.items(), key=lambda entry: (entry[0] != "en", entry[0])))


def _misnamed_files(files: dict[str, Path]) -> list[Problem]:
    """A problem for each file whose name begins like the set's but has no valid language code."""
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
    """Reports ids that a language lacks, and gives each paragraph the same key in all languages.

    Paragraphs with a common question id are the same paragraph. Its key is the one that it has in the first language
    (English if present). A paragraph without a common id keeps its own key; if another paragraph has that key, the
    language is put before it. The same holds if a language splits a paragraph in two: the first part takes the common
    key, the second part keeps its own, because a key stands for one context in each language.

    Pairs of language and id in ``reported`` are not reported again.
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
