"""Reads and validates one file in SQuAD v1.1 format: a bad record is reported with file and id, the rest goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xprobe.errors import DataError, UsageError
from xprobe.qa.records import Problem, Record


class _Bad(Exception):
    """A record that must be left out: (reason, detail)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def read_squad(path: Path, language: str) -> tuple[dict[str, Record], list[Problem], str]:
    """Reads ``path``; returns records by id in file order, problems, and the file's SHA-256.

    Raises
    ------
    UsageError
        The file does not exist or cannot be opened.
    DataError
        The file is not JSON, or not in SQuAD v1.1 format at all.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    records: dict[str, Record] = {}
    problems: list[Problem] = []
    for article_at, paragraph_at, place, item in _paragraphs(_parse(raw, path), path, problems):
        key = f"a{article_at:03d}p{paragraph_at:03d}"
        for question_at, qa in enumerate(item["qas"]):
            where = f"{place}, question {question_at + 1}"
            try:
                record = _record(qa, item["context"], key, language)
                if record.id in records:
                    raise _Bad("duplicate id", "the first one is kept")
                records[record.id] = record
            except _Bad as bad:
                id_ = qa.get("id") if isinstance(qa, dict) else None
                name = f"id {id_}" if isinstance(id_, str) and id_.strip() and _clean(id_) else where
                problems.append(Problem(path.name, name, bad.reason, bad.detail))
    return records, problems, hashlib.sha256(raw).hexdigest()


def _parse(raw: bytes, path: Path) -> list[Any]:
    """The list under ``data``. Bytes that are not UTF-8 survive as lone surrogates, to be reported record by record."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16: save it as UTF-8")
    text = raw.decode("utf-8-sig", errors="surrogateescape")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        hint = f"{error.msg.removesuffix(' starting at')} at line {error.lineno}, column {error.colno}"
        if not text.strip():
            hint = "the file is empty"
        elif error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string"):
            hint += "; the file ends early, as after a broken download"
        raise DataError(f"{path} is not valid JSON: {hint}. Get the file again, or leave its language out") from error
    except RecursionError as error:
        raise DataError(f"{path} is not in SQuAD v1.1 format: its JSON is nested too deeply") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError(f"{path} is not in SQuAD v1.1 format: {error}") from error
    articles = document.get("data") if isinstance(document, dict) else None
    if not isinstance(articles, list):
        raise DataError(f'{path} is not in SQuAD v1.1 format: expected an object with a list under "data"')
    return articles


def _paragraphs(articles: list[Any], path: Path, problems: list[Problem]) -> Iterator[tuple[int, int, str, dict]]:
    """(article, paragraph, place in words, paragraph object) for every usable paragraph; others become problems."""
    for article_at, article in enumerate(articles):
        place = f"article {article_at + 1}"
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            problems.append(Problem(path.name, place, 'no list under "paragraphs"'))
            continue
        for paragraph_at, item in enumerate(paragraphs):
            spot = f"{place}, paragraph {paragraph_at + 1}"
            if not isinstance(item, dict) or not isinstance(item.get("context"), str):
                problems.append(Problem(path.name, spot, 'no text under "context"'))
            elif not _clean(item["context"]):
                problems.append(Problem(path.name, spot, "bad UTF-8", 'in "context"'))
            elif not isinstance(item.get("qas"), list):
                problems.append(Problem(path.name, spot, 'no list under "qas"'))
            else:
                yield article_at, paragraph_at, spot, item


def _record(qa: Any, context: str, paragraph: str, language: str) -> Record:
    if not isinstance(qa, dict):
        raise _Bad("wrong type", f"a question must be an object, got {type(qa).__name__}")
    id_ = _text(qa, "id")
    question = _text(qa, "question")
    answers = qa.get("answers")
    if answers is None:
        raise _Bad('missing "answers"')
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise _Bad("wrong type", '"answers" must be a list of objects')
    if not answers:
        raise _Bad("no answer", "unanswerable questions have no span to look up")
    answer = _text(answers[0], "text")
    start = answers[0].get("answer_start")
    if start is None:
        raise _Bad('missing "answer_start"')
    if isinstance(start, bool) or not isinstance(start, int):
        raise _Bad("wrong type", f'"answer_start" must be a whole number, got {start!r}')
    if start < 0 or context[start : start + len(answer)] != answer:
        found = context.find(answer)
        hint = f"it stands at {found}" if found >= 0 else "it does not stand in the context"
        raise _Bad("answer is not at answer_start", f"{answer!r} is not at {start}; {hint}")
    stripped = answer.strip()
    lead = len(answer) - len(answer.lstrip())
    return Record(id_, language, paragraph, context, question.strip(), stripped, start + lead)


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    if value is None:
        raise _Bad(f'missing "{key}"')
    if not isinstance(value, str):
        raise _Bad("wrong type", f'"{key}" must be text, got {type(value).__name__}')
    if not _clean(value):
        raise _Bad("bad UTF-8", f'in "{key}"')
    if not value.strip():
        raise _Bad(f'empty "{key}"')
    return value


def _clean(text: str) -> bool:
    """False if the text holds lone surrogates: bytes that were not UTF-8, or half of an escaped pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
