"""The layout of SQuAD v1.1: articles that hold paragraphs that hold questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xprobe.errors import DataError
from xprobe.qa.documents import parse_document, read_text
from xprobe.qa.records import Problem, Record
from xprobe.qa.validation import Collector, is_clean


def read_squad(path: Path, language: str) -> tuple[dict[str, Record], list[Problem], str]:
    """Reads ``path``; returns records by id in file order, problems, and the file's SHA-256.

    Raises
    ------
    UsageError
        The file does not exist or cannot be opened.
    DataError
        The file is not JSON, or not in SQuAD v1.1 format at all.
    """
    text, checksum = read_text(path)
    document = parse_document(text, path)
    articles = document.get("data") if isinstance(document, dict) else None
    if not isinstance(articles, list):
        raise DataError(f'{path} is not in SQuAD v1.1 format: expected an object with a list under "data"')
    collector = Collector(path.name, language, checksum)
    for number, article in enumerate(articles):
        add_article(article, f"article {number + 1}", number, collector)
    return collector.records, collector.problems, checksum


def is_article(item: Any) -> bool:
    """Whether an object of a file can only be an article."""
    return isinstance(item, dict) and "paragraphs" in item


def add_article(article: Any, place: str, number: int, collector: Collector) -> None:
    """Takes the questions of an article, the ``number``-th of its source, which stands at ``place``."""
    paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
    if not isinstance(paragraphs, list):
        collector.reject(place, 'no list under "paragraphs"')
        return
    for p, paragraph in enumerate(paragraphs):
        _add_paragraph(paragraph, f"{place}, paragraph {p + 1}", f"a{number:03d}p{p:03d}", collector)


def _add_paragraph(paragraph: Any, place: str, key: str, collector: Collector) -> None:
    if not isinstance(paragraph, dict) or not isinstance(paragraph.get("context"), str):
        collector.reject(place, 'no text under "context"')
    elif not is_clean(paragraph["context"]):
        collector.reject(place, "bad UTF-8", 'in "context"')
    elif not isinstance(paragraph.get("qas"), list):
        collector.reject(place, 'no list under "qas"')
    else:
        for number, question in enumerate(paragraph["qas"], start=1):
            collector.add(question, f"{place}, question {number}", key, paragraph["context"])
