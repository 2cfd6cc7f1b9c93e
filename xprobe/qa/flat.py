"""Flat records: each question with its own context, as Hugging Face's sets have them, in rows or in columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# What a flat record holds; the answers may also be in columns "answers.text" and "answers.answer_start"
FIELDS = ("id", "context", "question", "answers", "answers.text", "answers.answer_start", "is_impossible")


def is_record(item: Any) -> bool:
    """Whether an object of a file is meant to be a flat record, though perhaps a bad one."""
    return isinstance(item, Mapping) and ("question" in item or "context" in item)


def is_table(document: Any) -> bool:
    """Whether ``document`` holds columns, each a list or an object of row names (as ``DataFrame.to_json`` writes)."""
    return is_record(document) and all(isinstance(document.get(key), list | dict) for key in ("context", "question"))


def rows_of(table: dict[str, Any], more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records of a table, with ``FIELDS`` and ``more``; other columns are ignored.

    Raises
    ------
    ValueError
        The columns have different lengths, or different row names.
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
