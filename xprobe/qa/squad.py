"""The layout of SQuAD v1.1: a list of articles; an article holds paragraphs, and a paragraph holds questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xprobe.errors import DataError
from xprobe.qa.documents import parse_document, read_text
from xprobe.qa.records import Problem, Record
from xprobe.qa.validation import Collector, is_valid_unicode


def read_squad(path: Path, language: str) -> tuple[dict[str, Record], list[Problem], str]:
    """Reads a file in the layout of SQuAD v1.1.

    Returns
    -------
    records : dict of str to Record
        By id, in file order.
    problems : list of Problem
        The records that were left out.
    checksum : str
        SHA-256 of the file.

    Raises
    ------
    UsageError
        The file does not exist or cannot be opened.
    DataError
        The file is not JSON, or not in SQuAD v1.1 format at all.

    Examples
    --------
    >>> from xprobe.qa.parallel import BUILTIN_DIR
    >>> records, problems, checksum = read_squad(BUILTIN_DIR / "builtin.en.json", "en")
    >>> len(records), problems
    (36, [])
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
    """Whether ``item`` is meant to be an article, even if it is a bad one.

    Examples
    --------
    >>> is_article({"paragraphs": []}), is_article({"question": "Who?"})
    (True, False)
    """
    return isinstance(item, dict) and "paragraphs" in item


def add_article(article: Any, place: str, number: int, collector: Collector) -> None:
    """Adds the questions of an article to ``collector``.

    Parameters
    ----------
    article : object
        Should be a dictionary with a list under ``paragraphs``.
    place : str
        Position of the article in the source, in words.
    number : int
        Number of the article in its source, from 0. Paragraph keys begin with it.
    collector : Collector
        Takes the questions and the problems.

    Examples
    --------
    >>> collector = Collector("small.en.json", "en")
    >>> question = {"id": "q1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}
    >>> article = {"paragraphs": [{"context": "Ada sold 40 boats.", "qas": [question]}]}
    >>> add_article(article, "article 1", 0, collector)
    >>> collector.records["q1"].paragraph
    'a000p000'
    """
    paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
    if not isinstance(paragraphs, list):
        collector.reject(place, 'no list under "paragraphs"')
        return
    for index, paragraph in enumerate(paragraphs):
        _add_paragraph(paragraph, f"{place}, paragraph {index + 1}", f"a{number:03d}p{index:03d}", collector)


def _add_paragraph(paragraph: Any, place: str, key: str, collector: Collector) -> None:
    if not isinstance(paragraph, dict) or not isinstance(paragraph.get("context"), str):
        collector.reject(place, 'no text under "context"')
    elif not is_valid_unicode(paragraph["context"]):
        collector.reject(place, "bad UTF-8", 'in "context"')
    elif not isinstance(paragraph.get("qas"), list):
        collector.reject(place, 'no list under "qas"')
    else:
        for number, question in enumerate(paragraph["qas"], start=1):
            collector.add(question, f"{place}, question {number}", key, paragraph["context"])
