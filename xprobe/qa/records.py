"""The data model: records of one language, datasets that join languages by question id, examples of a setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from xprobe.config import check_selection
from xprobe.errors import UsageError
from xprobe.qa.selection import Selection, choose_questions


@dataclass(frozen=True)
class Record:
    """One question in one language. ``context[answer_start:answer_start + len(answer)] == answer`` holds.

    ``answers`` are the distinct texts of all gold answers, ``answer`` first; ``(answer,)`` if not given.

    Examples
    --------
    >>> record = Record("q1", "en", "p1", "Ada sold 40 boats.", "How many?", "40", 9)
    >>> record.answers
    ('40',)
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
    """A record that was left out, and why.

    Examples
    --------
    >>> print(Problem("small.en.json", "id q2", "no answer"))
    small.en.json: id q2: no answer
    """

    file: str
    where: str  # the id of the record, or its place in the file
    reason: str  # short; the same text for all problems of one kind, so that they can be counted
    detail: str = ""
    id: str = field(default="", compare=False)  # of the record, if it has a usable id

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else ""))


@dataclass(frozen=True)
class Example:
    """A question in one language, as one setting asks it. Each example becomes one prompt.

    ``answers`` are the distinct texts of all gold answers in the language of the context, ``answer`` first;
    ``(answer,)`` if not given.

    Examples
    --------
    >>> example = Example("en-x", "de", "q1", "p1", "en", "Ada sold 40 boats.", "Wie viele?", "40", 9)
    >>> example.id, example.group
    ('en-x/de/q1', 'en-x/en/p1')
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
        """The key of the examples with the same setting, context and context language. They share one shard."""
        return f"{self.setting}/{self.context_language}/{self.paragraph}"


@dataclass(frozen=True)
class Dataset:
    """Parallel questions: ``records[language][id]``.

    Languages are in alphabetical order, English first. The ids of each language are in the order of its file.

    Examples
    --------
    >>> from xprobe.qa.parallel import load_data
    >>> data = load_data("builtin", ["de", "en"])
    >>> data.languages, len(data.ids)
    (('en', 'de'), 36)
    """

    name: str
    records: dict[str, dict[str, Record]]
    files: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = field(default=(), repr=False)
    source_sha256: str = ""  # of the bytes of the files; of the records as JSON if there are no files
    revision: str = ""  # hash of the commit, of data from the Hugging Face Hub

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all records: the same whether they were read from files, from the Hub or from memory.

        It covers, by language and in order, what a run uses of each record: id, context, question, answers, and which
        records are on one paragraph.
        """
        digest = hashlib.sha256()
        for language, records in self.records.items():
            numbers: dict[str, int] = {}
            for one in records.values():
                number = numbers.setdefault(one.paragraph, len(numbers))
                fields = [language, one.id, number, one.context, one.question, one.answer_start, *one.answers]
                digest.update(json.dumps(fields).encode() + b"\n")
        return digest.hexdigest()

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.records)

    @property
    def ids(self) -> tuple[str, ...]:
        """Every question id, in the file order of the first language that has it."""
        return tuple(dict.fromkeys(id_ for records in self.records.values() for id_ in records))

    def select(
        self,
        settings: Iterable[str],
        languages: Iterable[str] | None = None,
        *,
        limit: int | None = None,
        paragraphs: int | None = None,
        questions_per_paragraph: int | None = None,
    ) -> tuple[list[Example], Selection]:
        """The examples of ``settings``, question by question, each in every language that has it.

        The first language of the data decides in which order questions are chosen (``xprobe.qa.selection``), whatever
        ``languages`` are asked in. A question that it lacks counts as a paragraph of its own and comes after all
        others, in the order of the ids. Questions that none of ``languages`` can ask in a setting are passed over.

        Parameters
        ----------
        settings : iterable of str
            ``en-x``, ``x-x`` or both.
        languages : iterable of str, optional
            Question languages; all that the data holds if None.
        limit : int, optional
            How many questions, each in every language.
        paragraphs, questions_per_paragraph : int, optional
            How many paragraphs, and at most how many questions of each: in place of ``limit``.

        Returns
        -------
        examples : list of Example
            In the order of the data.
        selection : Selection
            What was asked for, and how much of the data was taken.

        Raises
        ------
        UsageError
            A language that the data does not hold, en-x without English, a bound below 1, or a limit together with
            another bound.

        Examples
        --------
        >>> from xprobe.qa.parallel import load_data
        >>> data = load_data("builtin", ["en", "de"])
        >>> examples, selection = data.select(["en-x"], paragraphs=5, questions_per_paragraph=2)
        >>> len(examples), selection.paragraphs_taken, selection.questions_taken
        (20, 5, 10)
        """
        languages = tuple(languages) if languages is not None else self.languages
        for language in languages:
            if language not in self.records:
                raise UsageError(f"language {language!r} is not in {self.name}; available: {', '.join(self.languages)}")
        check_selection(limit, paragraphs, questions_per_paragraph)
        by_paragraph = self._by_paragraph()
        examples: list[Example] = []
        available_ids: set[str] = set()
        chosen_ids: set[str] = set()
        for setting in settings:
            if setting == "en-x" and "en" not in self.records:
                raise UsageError(
                    f"setting en-x needs English contexts, and {self.name} holds only {', '.join(self.languages)}: "
                    "give the English records as well (NAME.en.json in the same folder), or use setting x-x "
                    "(--setting x-x)"
                )
            available = self._available(setting, languages)
            chosen = set(
                choose_questions(
                    by_paragraph, available, limit=limit, n_paragraphs=paragraphs,
                    questions_per_paragraph=questions_per_paragraph,
                )
            )  # fmt: skip
            available_ids.update(available)
            chosen_ids |= chosen
            for id_ in available:
                if id_ in chosen:
                    examples += self._ask(id_, setting, languages)
        selection = Selection(
            limit=limit,
            paragraphs=paragraphs,
            questions_per_paragraph=questions_per_paragraph,
            paragraphs_taken=sum(not chosen_ids.isdisjoint(ids) for ids in by_paragraph),
            questions_taken=len(chosen_ids),
            paragraphs_in_data=sum(not available_ids.isdisjoint(ids) for ids in by_paragraph),
            questions_in_data=len(available_ids),
        )
        return examples, selection

    def examples(
        self, settings: Iterable[str], languages: Iterable[str] | None = None, limit: int | None = None
    ) -> list[Example]:
        """The examples of ``select`` alone."""
        return self.select(settings, languages, limit=limit)[0]

    def _by_paragraph(self) -> list[list[str]]:
        """Question ids by paragraph of the first language; then each question that it lacks, by id."""
        first = next(iter(self.records.values()), {})
        paragraphs: dict[str, list[str]] = {}
        for id_, record in first.items():
            paragraphs.setdefault(record.paragraph, []).append(id_)
        others = sorted(id_ for id_ in self.ids if id_ not in first)
        return [*paragraphs.values(), *([id_] for id_ in others)]

    def _available(self, setting: str, languages: tuple[str, ...]) -> list[str]:
        """The ids that at least one of ``languages`` can ask, in the order of the data."""
        return [
            id_
            for id_ in self.ids
            if any(id_ in self.records[language] for language in languages)
            and (setting == "x-x" or id_ in self.records["en"])
        ]

    def _ask(self, id_: str, setting: str, languages: tuple[str, ...]) -> Iterator[Example]:
        """The examples of one question: the question of each language, context and answer as the setting wants them."""
        for language in languages:
            own = self.records[language].get(id_)
            if own is not None:
                yield _make_example(setting, own, own if setting == "x-x" else self.records["en"][id_])


def printable(text: str) -> str:
    r"""``text`` with line breaks, terminal codes and the like escaped, since ids come from files of other people.

    Examples
    --------
    >>> printable("q1\n")
    'q1\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _make_example(setting: str, asked: Record, source: Record) -> Example:
    """An example with the question of ``asked``, and the context and the answers of ``source``."""
    return Example(
        setting=setting,
        language=asked.language,
        question_id=asked.id,
        paragraph=source.paragraph,
        context_language=source.language,
        context=source.context,
        question=asked.question,
        answer=source.answer,
        answer_start=source.answer_start,
        answers=source.answers,
    )


def _fill_in_answers(item: Record | Example) -> None:
    if not item.answers:
        object.__setattr__(item, "answers", (item.answer,))  # the class is frozen
