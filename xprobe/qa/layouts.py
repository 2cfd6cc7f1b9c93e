"""Detects the layout of a file and reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xprobe.errors import DataError
from xprobe.qa.documents import parse_document, read_text
from xprobe.qa.flat import is_record, is_table, table_rows
from xprobe.qa.lines import first_object, read_lines
from xprobe.qa.squad import add_article, is_article
from xprobe.qa.validation import Collector

EXPECTED = (
    'expected an object with a list under "data", or records with "id", "context", "question" and "answers" '
    "as a list, as columns or one on each line"
)


def read_file(path: Path, language: str) -> Collector:
    """The records, the problems and the checksum of a file.

    The file holds articles of SQuAD v1.1 or flat records, as one JSON document or as JSON lines. It may be a gzip file.
    A ``.json`` file may hold JSON lines, as ``datasets.Dataset.to_json`` writes them.

    Raises
    ------
    UsageError
        The file does not exist or cannot be opened.
    DataError
        The file is damaged, or has none of these layouts.

    Examples
    --------
    >>> from xprobe.qa.parallel import BUILTIN_DIR
    >>> collector = read_file(BUILTIN_DIR / "builtin.th.json", "th")
    >>> len(collector.records), collector.problems
    (36, [])
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
    """Adds articles and flat records to ``collector``. Any other item is a bad record.

    Parameters
    ----------
    items : iterable of (str, object)
        Each item with its place in the source, in words.
    collector : Collector
        Takes the records and the problems.

    Returns
    -------
    set of str
        The kinds of items that were seen: ``article``, ``record``, ``other``.

    Examples
    --------
    >>> add_items([("record 1", {"question": "Who?"}), ("record 2", 7)], Collector("small.en.json", "en")) == {
    ...     "record", "other"}
    True
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
    """Whether the file holds JSON lines rather than one document. The ending of its name does not decide."""
    several = "\n" in text.strip()
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        first = first_object(text)
        if first is None and several:
            return not _is_json(text)  # JSON: one document over many lines; otherwise the first line is bad
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
            document = table_rows(document)
        except ValueError as error:
            raise DataError(f"{path} cannot be read as a table: {error}") from error
    elif is_record(document) or is_article(document):
        document = [document]
    items = document.get("data") if isinstance(document, dict) else document
    if not isinstance(items, list):
        raise _other_format(path)
    articles, records = any(is_article(item) for item in items), any(is_record(item) for item in items)
    if isinstance(document, list) and not (articles or records):
        raise _other_format(path)
    if records and not articles:
        add_items(((f"record {number}", item) for number, item in enumerate(items, start=1)), collector)
    else:  # a list under "data" with neither kind is read as a damaged SQuAD file
        for number, item in enumerate(items):
            add_article(item, f"article {number + 1}", number, collector)


def _other_format(path: Path) -> DataError:
    return DataError(f"{path} is not in SQuAD v1.1 format: {EXPECTED}")
