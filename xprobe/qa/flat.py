"""Flat records: every question holds its own context, as in the data sets of Hugging Face. In rows or in columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# the keys of a flat record; "answers" may be split into "answers.text" and "answers.answer_start"
FIELDS = ("id", "context", "question", "answers", "answers.text", "answers.answer_start", "is_impossible")


def is_record(item: Any) -> bool:
    """Whether ``item`` looks like a flat record, even if it is a bad one.

    Examples
    --------
    >>> is_record({"question": "Who?"}), is_record({"paragraphs": []})
    (True, False)
    """
    return isinstance(item, Mapping) and ("question" in item or "context" in item)


def is_table(document: Any) -> bool:
    """Whether ``document`` holds columns: each a list, or an object by row name as ``DataFrame.to_json`` writes it.

    Examples
    --------
    >>> is_table({"context": ["Ada sold 40 boats."], "question": ["Who?"]})
    True
    """
    return is_record(document) and all(isinstance(document.get(key), list | dict) for key in ("context", "question"))


def table_rows(table: dict[str, Any], more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records of a table. Columns other than ``FIELDS`` and ``more`` are ignored.

    Raises
    ------
    ValueError
        The columns have different lengths, or different row names.

    Examples
    --------
    >>> table_rows({"id": ["q1", "q2"], "question": ["Who?", "When?"], "title": ["A", "B"]})
    [{'id': 'q1', 'question': 'Who?'}, {'id': 'q2', 'question': 'When?'}]
    """
    columns = {key: table[key] for key in (*FIELDS, *more) if isinstance(table.get(key), list | dict)}
    sizes = {key: len(value) for key, value in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"its columns differ in length ({', '.join(f'{key} {n}' for key, n in sizes.items())})")
    named = [value for value in columns.values() if isinstance(value, dict)]
    if named and (len(named) < len(columns) or any(list(value) != list(named[0]) for value in named)):
        raise ValueError("its columns differ in the names of their rows")
    values = [list(value.values()) if isinstance(value, dict) else value for value in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
