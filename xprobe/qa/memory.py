"""Records in memory: dictionaries, data frames, and objects that can become a data frame."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from xprobe.errors import UsageError
from xprobe.qa.flat import FIELDS, is_record, is_table, table_rows
from xprobe.qa.layouts import add_items
from xprobe.qa.records import Problem
from xprobe.qa.validation import Collector, usable_id

ACCEPTED = (
    "the name of a set, a path, a list of records or a data frame with a column 'language', "
    "or a dictionary from language to records"
)
_CODE = re.compile(r"(?!all$)[a-z]{2,3}(?:[-_][A-Za-z0-9]+)*")
_LANGUAGE_KEYS = ("language", "lang")
_KEYS = (*FIELDS, "paragraphs")  # the keys of a flat record, and that of a SQuAD article
_DEPTH = 8  # no record nests lists and dictionaries deeper

Items = list[tuple[str, Any]]  # place in words, record


def read_records(data: Any) -> tuple[dict[str, Collector], list[Problem]]:
    """The records and problems of each language, English first, and the problems of records without a language.

    Parameters
    ----------
    data : object
        A dictionary from language to records, or records with a key ``language`` (or ``lang``). Records are a list of
        dictionaries, a pandas DataFrame, an object with a method ``to_pandas`` (a Hugging Face dataset), or a
        dictionary of columns. Each is a flat record: ``id``, ``context``, ``question``, ``answers``.

    Raises
    ------
    UsageError
        ``data`` has another form, or holds no record.

    Examples
    --------
    >>> answers = {"text": ["Ada"], "answer_start": [0]}
    >>> record = {"id": "q1", "context": "Ada sold 40 boats.", "question": "Who?", "answers": answers}
    >>> collected, problems = read_records({"en": [record]})
    >>> collected["en"].records["q1"].answer
    'Ada'
    """
    problems: list[Problem] = []
    by_language: dict[str, Items] = {}
    names: dict[str, str] = {}
    if isinstance(data, Mapping) and not _is_columns(data):
        if is_record(data):
            raise UsageError(
                f"data is a single record, with the keys {', '.join(map(repr, data))}: give a list of records"
            )
        for language, records in data.items():
            if not _is_code(language):
                keys = "its keys must be language codes such as 'en' or 'zh-Hans'"
                raise UsageError(f"data is a dictionary, so {keys}; got {language!r}")
            names[language] = f"data[{language!r}]"
            by_language[language] = _items(records, names[language])
    else:
        by_language = _split_by_language(_items(data, "data"), problems)
        names = dict.fromkeys(by_language, "data")
    if not by_language:
        raise UsageError(
            f"data holds no record with a language: {problems[0]}" if problems else "data is empty: it holds no record"
        )
    collected = {}
    for language in sorted(by_language, key=lambda code: (code != "en", code)):
        collected[language] = Collector(names[language], language, _checksum(by_language[language]))
        add_items(by_language[language], collected[language])
    return collected, problems


def _split_by_language(items: Items, problems: list[Problem]) -> dict[str, Items]:
    """Items by language: each item names its own."""
    by_language: dict[str, Items] = {}
    for place, item in items:
        fields = item if isinstance(item, dict) else {}
        language = next((fields[key] for key in _LANGUAGE_KEYS if fields.get(key) is not None), None)
        id_ = usable_id(item)
        where = f"id {id_}" if id_ else place
        if not isinstance(item, dict):
            detail = f"a record must be a dictionary, got {type(item).__name__}"
            problems.append(Problem("data", place, "wrong type", detail))
        elif language is None:
            problems.append(Problem("data", where, 'missing "language"', "", id_))
        elif not _is_code(language):
            detail = f"it must be a code such as 'en' or 'zh-Hans', got {language!r}"
            problems.append(Problem("data", where, 'bad "language"', detail, id_))
        else:
            by_language.setdefault(language, []).append((place, item))
    return by_language


def _items(records: Any, name: str) -> Items:
    """Records as dictionaries of plain values, each with its place (``record 7``)."""
    if not isinstance(records, pd.DataFrame | list | tuple | Mapping) and callable(getattr(records, "to_pandas", None)):
        kind = type(records).__name__
        try:
            records = records.to_pandas()
        except Exception as error:
            raise UsageError(
                f"{name} is a {kind}, and its to_pandas() failed: {' '.join(str(error).split())}"
            ) from error
    if isinstance(records, pd.DataFrame):
        if not records.columns.is_unique:
            repeated = records.columns[records.columns.duplicated()][0]
            raise UsageError(f"{name} is a data frame with two columns named {repeated!r}: keep one")
        records = records.to_dict("records")
    elif isinstance(records, Mapping) and _is_columns(records):
        try:
            records = table_rows(_to_json_types(records), _LANGUAGE_KEYS)
        except ValueError as error:
            raise UsageError(f"{name} cannot be read as a table: {error}") from error
    elif isinstance(records, Mapping) and isinstance(records.get("data"), list):
        records = records["data"]  # a whole SQuAD document
    if not isinstance(records, list | tuple):
        wanted = ACCEPTED if name == "data" else "a list of records or a data frame"
        raise UsageError(f"{name} must be {wanted}; got {_describe(records)}")
    if records and not any(isinstance(record, Mapping) for record in records):
        raise UsageError(
            f"{name} must hold dictionaries, one for each record; its first entry is {_describe(records[0])}"
        )
    return [(f"record {number}", _known_values(record)) for number, record in enumerate(records, start=1)]


def _is_columns(data: Mapping) -> bool:
    return is_table({key: _to_json_types(data[key], 1) for key in ("context", "question") if key in data})


def _known_values(record: Any) -> Any:
    """The values of a record under known keys, without missing values."""
    if not isinstance(record, Mapping):
        return record
    values = {key: _to_json_types(record[key]) for key in (*_KEYS, *_LANGUAGE_KEYS) if key in record}
    return {key: value for key, value in values.items() if value is not None}


def _to_json_types(value: Any, depth: int = _DEPTH) -> Any:
    """``value`` in the types of JSON where possible. NaN, which marks gaps in data frames, becomes None."""
    if value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str | int | float | type(None)):
        return value
    if callable(getattr(value, "tolist", None)):  # numpy's arrays and numbers, pandas' series
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _to_json_types(entry, depth - 1) for key, entry in value.items()} if depth else {}
    if isinstance(value, list | tuple):
        return [_to_json_types(entry, depth - 1) for entry in value] if depth else []
    return None if isinstance(value, float) and math.isnan(value) else value


def _checksum(items: Items) -> str:
    """SHA-256 of the records as JSON. The container of the records does not change it."""
    rows = [
        {key: value for key, value in item.items() if key in _KEYS} if isinstance(item, dict) else None
        for _, item in items
    ]
    text = json.dumps(rows, sort_keys=True, separators=(",", ":"), default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_code(language: Any) -> bool:
    return isinstance(language, str) and _CODE.fullmatch(language) is not None


def _describe(value: Any) -> str:
    """The type of a value, and the value itself if it is short."""
    text = repr(value) if isinstance(value, str | int | float | bytes | type(None)) else ""
    return f"{type(value).__name__} {text}" if text and len(text) <= 40 else f"a {type(value).__name__}"
