"""Records in memory: dictionaries, data frames, data sets of the package ``datasets``, and Arrow tables."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from xprobe.errors import UsageError
from xprobe.qa.codes import is_code
from xprobe.qa.flat import FIELDS, is_record, is_table, table_rows
from xprobe.qa.hub_names import SPLITS
from xprobe.qa.layouts import add_items
from xprobe.qa.records import Problem
from xprobe.qa.validation import Collector, usable_id

ACCEPTED = (
    "the name of a set, a path, a list of records or a data frame with a column 'language', "
    "or a dictionary from language to records"
)
LANGUAGE_KEYS = ("language", "lang")
_KEYS = (*FIELDS, "paragraphs")  # the keys of a flat record, and that of a SQuAD article
_DEPTH = 8  # no record nests lists and dictionaries deeper

Items = list[tuple[str, Any]]  # place in words, record


def read_records(data: Any, source: str = "data") -> tuple[dict[str, Collector], list[Problem]]:
    """The records and problems of each language, English first, and the problems of records without a language.

    Parameters
    ----------
    data : object
        A dictionary from language to records, or records with a key ``language`` (or ``lang``). Records are a list of
        dictionaries, a pandas DataFrame, an object with a method ``to_pandas`` (a ``datasets.Dataset``), a
        ``datasets.DatasetDict`` with one split, or a dictionary of columns. Each is a flat record: ``id``,
        ``context``, ``question``, ``answers``.
    source : str
        What messages call the data.

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
    data = _only_split(data, source)
    if isinstance(data, Mapping) and not _is_columns(data):
        if is_record(data):
            raise UsageError(
                f"{source} is a single record, with the keys {', '.join(map(repr, data))}: give a list of records"
            )
        for language, records in data.items():
            if not is_code(language):
                keys = "its keys must be language codes such as 'en' or 'zh-Hans'"
                raise UsageError(f"{source} is a dictionary, so {keys}; got {language!r}")
            names[language] = f"{source}[{language!r}]"
            by_language[language] = _items(_only_split(records, names[language]), names[language])
    else:
        by_language = _split_by_language(_items(data, source), problems, source)
        names = dict.fromkeys(by_language, source)
    if not by_language:
        if not problems:
            raise UsageError(f"{source} is empty: it holds no record")
        raise UsageError(
            f"{source} holds no record with a language: {problems[0]}. Add it, or give a dictionary from language to "
            "records"
        )
    collected = {}
    for language in sorted(by_language, key=lambda code: (code != "en", code)):
        collected[language] = Collector(names[language], language, _checksum(by_language[language]))
        add_items(by_language[language], collected[language])
    return collected, problems


def _only_split(data: Any, name: str) -> Any:
    """The data set of a ``datasets.DatasetDict`` with one split. Anything else as it is: its keys may be languages.

    Raises
    ------
    UsageError
        There are several splits.
    """
    if type(data).__module__.partition(".")[0] != "datasets" or not isinstance(data, Mapping):
        return data
    splits = list(data)
    if splits and all(is_code(split) and split not in SPLITS for split in splits):
        return data
    if len(splits) != 1:
        held = (
            f"the splits {', '.join(splits)}: give one of them, such as {name}[{splits[-1]!r}]" if splits else "nothing"
        )
        raise UsageError(f"{name} is a {type(data).__name__} that holds {held}")
    return data[splits[0]]


def check_columns(columns: Collection[str], name: str) -> None:
    """Checks that a table has the columns of flat records.

    Raises
    ------
    UsageError
        Names the columns that are missing, and those that are there.

    Examples
    --------
    >>> check_columns(["id", "context", "question", "answers"], "data")
    >>> check_columns(["id", "passage", "question", "answers"], "data")
    Traceback (most recent call last):
    xprobe.errors.UsageError: data has no column 'context'; it has 'id', 'passage', 'question', 'answers': rename...
    """
    lacking = [key for key in ("id", "context", "question") if key not in columns]
    if "answers" not in columns and "answers.text" not in columns:
        lacking.append("answers")
    if lacking and "paragraphs" not in columns:
        shown = ", ".join(map(repr, columns)) or "none"
        raise UsageError(
            f"{name} has no column {' and no column '.join(map(repr, lacking))}; it has {shown}: rename "
            "columns, or give records with these keys (docs/data.md)"
        )


def _split_by_language(items: Items, problems: list[Problem], source: str) -> dict[str, Items]:
    """Items by language: each item names its own."""
    by_language: dict[str, Items] = {}
    for place, item in items:
        fields = item if isinstance(item, dict) else {}
        language = next((fields[key] for key in LANGUAGE_KEYS if fields.get(key) is not None), None)
        id_ = usable_id(item)
        where = f"id {id_}" if id_ else place
        if not isinstance(item, dict):
            detail = f"a record must be a dictionary, got {type(item).__name__}"
            problems.append(Problem(source, place, "wrong type", detail))
        elif language is None:
            problems.append(Problem(source, where, 'missing "language"', "", id_))
        elif not is_code(language):
            detail = f"it must be a code such as 'en' or 'zh-Hans', got {language!r}"
            problems.append(Problem(source, where, 'bad "language"', detail, id_))
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
        if len(records):
            check_columns([str(column) for column in records.columns], name)
        records = records.to_dict("records")
    elif isinstance(records, Mapping) and _is_columns(records):
        try:
            records = table_rows(_to_json_types(records), LANGUAGE_KEYS)
        except ValueError as error:
            raise UsageError(f"{name} cannot be read as a table: {error}") from error
    elif isinstance(records, Mapping) and isinstance(records.get("data"), list):
        records = records["data"]  # a whole SQuAD document
    if not isinstance(records, list | tuple):
        wanted = ACCEPTED if "[" not in name else "a list of records or a data frame"
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
    values = {key: _to_json_types(record[key]) for key in (*_KEYS, *LANGUAGE_KEYS) if key in record}
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


def _describe(value: Any) -> str:
    """The type of a value, and the value itself if it is short."""
    text = repr(value) if isinstance(value, str | int | float | bytes | type(None)) else ""
    return f"{type(value).__name__} {text}" if text and len(text) <= 40 else f"a {type(value).__name__}"
