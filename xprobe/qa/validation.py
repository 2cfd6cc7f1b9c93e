"""What a usable record is, in every layout. A bad record is reported with file and id, the rest goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xprobe.qa.records import Problem, Record


class BadRecord(Exception):
    """A record that must be left out: (reason, detail)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass
class Collector:
    """Records of one language from one source, and what was wrong with the others.

    Parameters
    ----------
    source : str
        File name that problems carry.
    language : str
    checksum : str
        SHA-256 of the source.
    """

    source: str
    language: str
    checksum: str = ""
    records: dict[str, Record] = field(default_factory=dict)  # by id, in the order of the source
    problems: list[Problem] = field(default_factory=list)
    contexts: dict[str, str] = field(default_factory=dict)  # key of the paragraph of each context

    def reject(self, place: str, reason: str, detail: str = "", id_: str = "") -> None:
        """Reports what stands at ``place``."""
        self.problems.append(Problem(self.source, place, reason, detail, id_))

    def add(self, item: Any, place: str, paragraph: str | None = None, context: str | None = None) -> None:
        """Takes one question, or reports it under its id, or under ``place`` if it has no usable one.

        Parameters
        ----------
        item : object
            Should be a dictionary of ``id``, ``question``, ``answers``, and ``context`` if that is not given.
        place : str
            Where it stands in the source, in words. One that begins with ``line`` is named beside the id.
        paragraph : str, optional
            Key of the paragraph. None: questions with the same context are on one paragraph.
        context : str, optional
            None: the item's own.
        """
        try:
            if not isinstance(item, dict):
                what = "record" if context is None else "question"
                raise BadRecord("wrong type", f"a {what} must be an object, got {type(item).__name__}")
            own = context if context is not None else text_of(item, "context")
            record = _record(item, own, paragraph or self._paragraph(own), self.language)
            if record.id in self.records:
                raise BadRecord("duplicate id", "the first one is kept")
            self.records[record.id] = record
        except BadRecord as bad:
            id_ = usable_id(item)
            if id_:
                where = f"{place}, id {id_}" if place.startswith("line ") else f"id {id_}"
                self.reject(where, bad.reason, bad.detail, id_)
            else:
                self.reject(place, bad.reason, bad.detail)

    def _paragraph(self, context: str) -> str:
        return self.contexts.setdefault(context, f"c{len(self.contexts):03d}")


def text_of(item: dict[str, Any], key: str) -> str:
    """The text under ``key``.

    Raises
    ------
    BadRecord
        Missing, not text, not UTF-8, or blank.
    """
    value = item.get(key)
    if value is None:
        raise BadRecord(f'missing "{key}"')
    if not isinstance(value, str):
        raise BadRecord("wrong type", f'"{key}" must be text, got {type(value).__name__}')
    if not is_clean(value):
        raise BadRecord("bad UTF-8", f'in "{key}"')
    if not value.strip():
        raise BadRecord(f'empty "{key}"')
    return value


def usable_id(item: Any) -> str:
    """The id of a record, by which a problem can name it; ``""`` if there is none."""
    id_ = item.get("id") if isinstance(item, dict) else None
    return id_ if isinstance(id_, str) and id_.strip() and is_clean(id_) else ""


def is_clean(text: str) -> bool:
    """False if the text holds lone surrogates: bytes that were not UTF-8, or half of an escaped pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _record(item: dict[str, Any], context: str, paragraph: str, language: str) -> Record:
    id_, question = text_of(item, "id"), text_of(item, "question")
    answer, start, answers = _gold(_answer_list(item), context)
    return Record(id_, language, paragraph, context, question.strip(), answer, start, answers)


def _answer_list(item: dict[str, Any]) -> list[Any]:
    """The answers one by one: a list as in SQuAD, an object of two lists as in Hugging Face's sets, or two columns."""
    answers = item.get("answers")
    if answers is None and "answers.text" in item:
        answers = {key: item.get(f"answers.{key}") for key in ("text", "answer_start")}
    if item.get("is_impossible") is True:
        answers = []
    if answers is None:
        raise BadRecord('missing "answers"')
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if isinstance(texts, list) and starts is None:
            raise BadRecord('missing "answer_start"')
        if not isinstance(texts, list) or not isinstance(starts, list):
            raise BadRecord("wrong type", '"answers" must be a list of objects, or hold two lists')
        if len(texts) != len(starts):
            detail = f'"text" holds {len(texts)} of them, "answer_start" {len(starts)}'
            raise BadRecord("answers of unequal number", detail)
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(answers, list):
        raise BadRecord("wrong type", '"answers" must be a list of objects, or hold two lists')
    if not answers:
        raise BadRecord("no answer", "unanswerable questions have no span to look up")
    return answers


def _gold(answers: list[Any], context: str) -> tuple[str, int, tuple[str, ...]]:
    """The first answer that stands where it should, its start, and all distinct texts of answers, that one first."""
    chosen: tuple[str, int] | None = None
    faults, texts = [], []
    for answer in answers:
        try:
            text = _answer_text(answer)
            texts.append(text.strip())
            chosen = chosen or _span(text, answer.get("answer_start"), context)
        except BadRecord as bad:
            faults.append(bad)
    if chosen is not None:
        return *chosen, tuple(dict.fromkeys([chosen[0], *texts]))
    first = faults[0]
    more = f"none of the {len(answers)} answers can be used" if len(answers) > 1 else ""
    raise BadRecord(first.reason, "; ".join(part for part in (first.detail, more) if part))


def _answer_text(answer: Any) -> str:
    if not isinstance(answer, dict):
        raise BadRecord("wrong type", f'"answers" must be a list of objects, got {type(answer).__name__}')
    return text_of(answer, "text")


def _span(answer: str, start: Any, context: str) -> tuple[str, int]:
    """The answer without blanks around it, and where it starts then."""
    if start is None:
        raise BadRecord('missing "answer_start"')
    if isinstance(start, bool) or not isinstance(start, int):
        raise BadRecord("wrong type", f'"answer_start" must be a whole number, got {start!r}')
    if start < 0 or context[start : start + len(answer)] != answer:
        first = context.find(answer)
        hint = f"it stands at {first}" if first >= 0 else "it does not stand in the context"
        raise BadRecord("answer is not at answer_start", f"{answer!r} is not at {start}; {hint}")
    return answer.strip(), start + len(answer) - len(answer.lstrip())
