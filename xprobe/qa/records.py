"""What a dataset is to the rest of xprobe: records of one language, joined by question id; examples of a setting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from xprobe.errors import UsageError


@dataclass(frozen=True)
class Record:
    """One question in one language. ``context[answer_start:answer_start + len(answer)] == answer`` holds.

    ``answers`` are the distinct texts of all gold answers, ``answer`` first; ``(answer,)`` if not given.
    """

    id: str
    language: str
    paragraph: str  # equal for the questions on one paragraph, and across parallel languages
    context: str
    question: str
    answer: str
    answer_start: int
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _fill_in_answers(self)


@dataclass(frozen=True)
class Problem:
    """A record that was left out, and why."""

    file: str
    where: str  # the record's id, or its place in the file
    reason: str  # short, the same for all problems of one kind: what is counted
    detail: str = ""
    id: str = field(default="", compare=False)  # the record's, if it has a usable one

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else ""))


@dataclass(frozen=True)
class Example:
    """A question in one language as one setting asks it: what becomes one prompt.

    ``answers`` are the distinct texts of all gold answers in the context's language, ``answer`` first; ``(answer,)`` if
    not given.
    """

    setting: str
    language: str
    question_id: str
    paragraph: str
    context_language: str
    context: str
    question: str
    answer: str
    answer_start: int
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _fill_in_answers(self)

    @property
    def id(self) -> str:
        return f"{self.setting}/{self.language}/{self.question_id}"

    @property
    def group(self) -> str:
        """Examples with the same setting, context and context language: one shard."""
        return f"{self.setting}/{self.context_language}/{self.paragraph}"


@dataclass(frozen=True)
class Dataset:
    """Parallel questions: ``records[language][id]``, ids in the order of the reference language's file."""

    name: str
    records: dict[str, dict[str, Record]]
    files: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = field(default=(), repr=False)
    fingerprint: str = ""

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.records)

    @property
    def ids(self) -> tuple[str, ...]:
        """Every question id, in file order of the first language that holds it."""
        return tuple(dict.fromkeys(id_ for records in self.records.values() for id_ in records))

    def examples(
        self, settings: Iterable[str], languages: Iterable[str] | None = None, limit: int | None = None
    ) -> list[Example]:
        """The examples of ``settings``, question by question, each in every language; the first ``limit`` questions.

        Raises
        ------
        UsageError
            A language that the data does not hold, or en-x without English.
        """
        languages = tuple(languages) if languages is not None else self.languages
        for language in languages:
            if language not in self.records:
                raise UsageError(f"language {language!r} is not in {self.name}; available: {', '.join(self.languages)}")
        examples = []
        for setting in settings:
            if setting == "en-x" and "en" not in self.records:
                raise UsageError(
                    f"setting en-x needs English contexts, and {self.name} holds only {', '.join(self.languages)}: "
                    f"give the English records as well (NAME.en.json in the same folder), or use --setting x-x"
                )
            for id_ in self._selected(setting, languages, limit):
                for language in languages:
                    asked = self.records[language].get(id_)
                    told = asked if setting == "x-x" else self.records["en"].get(id_)
                    if asked is not None and told is not None:
                        examples.append(_join(setting, asked, told))
        return examples

    def _selected(self, setting: str, languages: tuple[str, ...], limit: int | None) -> list[str]:
        present = [
            id_
            for id_ in self.ids
            if any(id_ in self.records[language] for language in languages)
            and (setting == "x-x" or id_ in self.records["en"])
        ]
        return present[:limit]


def printable(text: str) -> str:
    """``text`` with line breaks, terminal codes and the like escaped: ids come from other people's files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _join(setting: str, asked: Record, told: Record) -> Example:
    return Example(
        setting=setting,
        language=asked.language,
        question_id=asked.id,
        paragraph=told.paragraph,
        context_language=told.language,
        context=told.context,
        question=asked.question,
        answer=told.answer,
        answer_start=told.answer_start,
        answers=told.answers,
    )


def _fill_in_answers(item: Record | Example) -> None:
    if not item.answers:
        object.__setattr__(item, "answers", (item.answer,))  # the class is frozen
