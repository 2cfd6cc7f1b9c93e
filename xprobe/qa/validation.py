"""The rules for a usable record, the same in every layout. A bad record is reported and left out; reading goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xprobe.qa.records import Problem, Record


class BadRecordError(Exception):
    """The record must be left out. ``reason`` and ``detail`` are those of its ``Problem``."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass
class Collector:
    """Collects the usable records of one language from one source, and the problems of the others.

    Parameters
    ----------
    source : str
        File name that problems carry.
    language : str
        Language of the records.
    checksum : str
        SHA-256 of the source.

    Examples
    --------
    >>> collector = Collector("small.en.json", "en")
    >>> answers = [{"text": "40", "answer_start": 9}]
    >>> record = {"id": "q1", "context": "Ada sold 40 boats.", "question": "How many?", "answers": answers}
    >>> collector.add(record, "record 1")
    >>> collector.add({**record, "id": "q2", "answers": []}, "record 2")
    >>> list(collector.records)
    ['q1']
    >>> print(collector.problems[0])
    small.en.json: id q2: no answer (unanswerable questions have no span to look up)
    """

    source: str
    language: str
    checksum: str = ""
    records: dict[str, Record] = field(default_factory=dict)  # by id, in the order of the source
    problems: list[Problem] = field(default_factory=list)
    contexts: dict[str, str] = field(default_factory=dict)  # paragraph key by context

    def reject(self, place: str, reason: str, detail: str = "", id_: str = "") -> None:
        """Reports the item at ``place`` as a problem."""
        self.problems.append(Problem(self.source, place, reason, detail, id_))

    def add(self, item: Any, place: str, paragraph: str | None = None, context: str | None = None) -> None:
        """Adds one question, or reports it as a problem, by its id or else by ``place``.

        Parameters
        ----------
        item : object
            Should be a dictionary with ``id``, ``question`` and ``answers``, and with ``context`` if the argument
            ``context`` is None.
        place : str
            Position in the source, in words. A place that begins with ``line`` is named beside the id.
        paragraph : str, optional
            Key of the paragraph. If None, questions with the same context are on one paragraph.
        context : str, optional
            If None, the item holds its context.
        """
        try:
            if not isinstance(item, dict):
                what = "record" if context is None else "question"
                raise BadRecordError("wrong type", f"a {what} must be an object, got {type(item).__name__}")
            text = context if context is not None else required_text(item, "context")
            record = _make_record(item, text, paragraph or self._paragraph_key(text), self.language)
            if record.id in self.records:
                raise BadRecordError("duplicate id", "the first one is kept")
            self.records[record.id] = record
        except BadRecordError as error:
            id_ = usable_id(item)
            if id_:
                where = f"{place}, id {id_}" if place.startswith("line ") else f"id {id_}"
                self.reject(where, error.reason, error.detail, id_)
            else:
                self.reject(place, error.reason, error.detail)

    def _paragraph_key(self, context: str) -> str:
        return self.contexts.setdefault(context, f"c{len(self.contexts):03d}")


def required_text(item: dict[str, Any], key: str) -> str:
    """The text under ``key``.

    Raises
    ------
    BadRecordError
        The text is missing, blank, no string, or not valid UTF-8.

    Examples
    --------
    >>> required_text({"question": "Who?"}, "question")
    'Who?'
    """
    value = item.get(key)
    if value is None:
        raise BadRecordError(f'missing "{key}"')
    if not isinstance(value, str):
        raise BadRecordError("wrong type", f'"{key}" must be text, got {type(value).__name__}')
    if not is_valid_unicode(value):
        raise BadRecordError("bad UTF-8", f'in "{key}"')
    if not value.strip():
        raise BadRecordError(f'empty "{key}"')
    return value


def usable_id(item: Any) -> str:
    """The id of a record if a message can name the record by it; ``""`` if not.

    Examples
    --------
    >>> usable_id({"id": "q1"}), usable_id({"id": 7})
    ('q1', '')
    """
    id_ = item.get("id") if isinstance(item, dict) else None
    return id_ if isinstance(id_, str) and id_.strip() and is_valid_unicode(id_) else ""


def is_valid_unicode(text: str) -> bool:
    r"""Whether the text can be encoded as UTF-8.

    It cannot if it holds lone surrogates. They come from bytes that are not UTF-8, or from half of an escaped pair.

    Examples
    --------
    >>> is_valid_unicode("Köln"), is_valid_unicode("K\udcf6ln")
    (True, False)
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _make_record(item: dict[str, Any], context: str, paragraph: str, language: str) -> Record:
    id_, question = required_text(item, "id"), required_text(item, "question")
    answer, start, answers = _gold_answers(_answer_list(item), context)
    return Record(id_, language, paragraph, context, question.strip(), answer, start, answers)


def _answer_list(item: dict[str, Any]) -> list[Any]:
    """The answers as a list of objects, from a list (SQuAD), an object of two lists (Hugging Face) or two columns."""
    answers = item.get("answers")
    if answers is None and "answers.text" in item:
        answers = {key: item.get(f"answers.{key}") for key in ("text", "answer_start")}
    if item.get("is_impossible") is True:
        answers = []
    if answers is None:
        raise BadRecordError('missing "answers"')
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if isinstance(texts, list) and starts is None:
            raise BadRecordError('missing "answer_start"')
        if not isinstance(texts, list) or not isinstance(starts, list):
            raise BadRecordError("wrong type", '"answers" must be a list of objects, or hold two lists')
        if len(texts) != len(starts):
            detail = f'"text" holds {len(texts)} of them, "answer_start" {len(starts)}'
            raise BadRecordError("answers of unequal number", detail)
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(answers, list):
        raise BadRecordError("wrong type", '"answers" must be a list of objects, or hold two lists')
    if not answers:
        raise BadRecordError("no answer", "unanswerable questions have no span to look up")
    return answers


def _gold_answers(answers: list[Any], context: str) -> tuple[str, int, tuple[str, ...]]:
    """The first answer whose text is at its ``answer_start``, that start, and all distinct answers, this one first."""
    chosen: tuple[str, int] | None = None
    errors, texts = [], []
    for answer in answers:
        try:
            text = _answer_text(answer)
            texts.append(text.strip())
            chosen = chosen or _answer_span(text, answer.get("answer_start"), context)
        except BadRecordError as error:
            errors.append(error)
    if chosen is not None:
        return *chosen, tuple(dict.fromkeys([chosen[0], *texts]))
    first = errors[0]
    more = f"none of the {len(answers)} answers can be used" if len(answers) > 1 else ""
    raise BadRecordError(first.reason, "; ".join(part for part in (first.detail, more) if part))


def _answer_text(answer: Any) -> str:
    if not isinstance(answer, dict):
        raise BadRecordError("wrong type", f'"answers" must be a list of objects, got {type(answer).__name__}')
    return required_text(answer, "text")


def _answer_span(answer: str, start: Any, context: str) -> tuple[str, int]:
    """The answer without surrounding blanks, and its start in the context."""
    if start is None:
        raise BadRecordError('missing "answer_start"')
    if isinstance(start, bool) or not isinstance(start, int):
        raise BadRecordError("wrong type", f'"answer_start" must be a whole number, got {start!r}')
    if start < 0 or context[start : start + len(answer)] != answer:
        first = context.find(answer)
        hint = f"its text is at {first}" if first >= 0 else "the context does not hold it"
        raise BadRecordError("answer is not at answer_start", f"{answer!r} is not at {start}; {hint}")
    return answer.strip(), start + len(answer) - len(answer.lstrip())
