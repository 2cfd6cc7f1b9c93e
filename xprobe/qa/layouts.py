"""Finds out which layout a file has, and reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xprobe.errors import DataError
from xprobe.qa.documents import parse_document, read_text
from xprobe.qa.flat import is_record, is_table, rows_of
from xprobe.qa.lines import first_object, read_lines
from xprobe.qa.squad import add_article, is_article
from xprobe.qa.validation import Collector

EXPECTED = (
    'expected an object with a list under "data", or records with "id", "context", "question" and "answers" '
    "as a list, as columns or one on each line"
)


def read_file(path: Path, language: str) -> Collector:
    """Records, problems and checksum of a file.

    The layout is that of SQuAD v1.1, or flat records; as one JSON document or as JSON lines; perhaps in a gzip file.
    A ``.json`` file may hold JSON lines: ``datasets.Dataset.to_json`` writes such files.

    Raises
    ------
    UsageError
        The file does not exist or cannot be opened.
    DataError
        The file is damaged, or has none of these layouts.
    """
    text, checksum = read_text(path)
    collector = Collector(path.name, language, checksum)
    if _has_lines(text, path):
        if add_items(read_lines(text, collector), collector) == {"other"}:
            raise _other_format(path)
    else:
        _add_document(parse_document(text, path), path, collector)
    return collector


def add_items(items: Iterable[tuple[str, Any]], collector: Collector) -> set[str]:
    """Takes articles and flat records, each given with its place in words; what is neither is a bad record.

    Returns
    -------
    set of str
        What there was: ``article``, ``record``, ``other``.
    """
    kinds = set()
    for number, (place, item) in enumerate(items):
        if is_article(item):
            kinds.add("article")
            add_article(item, place, number, collector)
        else:
            kinds.add("record" if is_record(item) else "other")
            collector.add(item, place)
    return kinds


def _has_lines(text: str, path: Path) -> bool:
    """Whether the file holds JSON lines and not one document, whatever its name says."""
    several = "\n" in text.strip()
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        first = first_object(text)
        if first is None and several:
            return not _is_json(text)  # a document over many lines, or a bad first line
        return not (isinstance(first, list) or is_table(first) or (isinstance(first, dict) and "data" in first))
    if not several:
        return False
    first = first_object(text)
    return is_article(first) or (is_record(first) and not is_table(first))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _add_document(document: Any, path: Path, collector: Collector) -> None:
    if is_table(document):
        try:
            document = rows_of(document)
        except ValueError as error:
            raise DataError(f"{path} cannot be read as a table: {error}") from error
    elif is_record(document) or is_article(document):
        document = [document]
    inside = document.get("data") if isinstance(document, dict) else document
    if not isinstance(inside, list):
        raise _other_format(path)
    articles, records = any(is_article(item) for item in inside), any(is_record(item) for item in inside)
    if isinstance(document, list) and not (articles or records):
        raise _other_format(path)
    if records and not articles:
        add_items(((f"record {number}", item) for number, item in enumerate(inside, start=1)), collector)
    else:  # so is a list under "data" in which nothing can be recognised: SQuAD, spoilt
        for number, item in enumerate(inside):
            add_article(item, f"article {number + 1}", number, collector)


def _other_format(path: Path) -> DataError:
    return DataError(f"{path} is not in SQuAD v1.1 format: {EXPECTED}")
