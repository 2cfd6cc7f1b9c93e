"""What a study asks: template, data and examples, read before any model is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from xprobe.config import StudyConfig
from xprobe.errors import DataError
from xprobe.qa.parallel import load_data
from xprobe.qa.records import Dataset, Example
from xprobe.qa.selection import Selection
from xprobe.qa.templates import Template, load_template
from xprobe.runs.manifest import DataEntry


@dataclass(frozen=True)
class Questions:
    """The wording, the data, the examples that a study asks for, and how they were selected."""

    template: Template
    data: Dataset
    examples: list[Example]
    selection: Selection

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(repr(self.template).encode()).hexdigest()

    @property
    def data_entry(self) -> DataEntry:
        """What the manifest keeps of the data."""
        data = self.data
        return DataEntry(data.name, list(data.files), data.source_sha256, data.fingerprint, data.revision)


def read_questions(study: StudyConfig, records: Any = None, revision: str = "") -> Questions:
    """Reads what ``study`` asks for. ``records`` in memory take the place of its data.

    ``revision``: the commit of the Hub to read if the study names none; that of the run where one is continued.

    Raises
    ------
    UsageError, DataError
        The template or the data cannot be read, or holds none of what is asked for.
    """
    template = load_template(study.template)
    needed = ("en",) if "en-x" in study.settings else ()
    source = study.data if records is None else records
    bounds = {name: getattr(study, name) for name in ("limit", "paragraphs", "questions_per_paragraph")}
    limited = any(bounds.values())
    data = load_data(
        source, study.languages, strict=study.strict, needed=needed, with_reference=limited, revision=revision
    )
    examples, selection = data.select(study.settings, study.languages, **bounds)
    if not examples:
        raise DataError(f"{study.data} holds no question for {', '.join(study.settings)} in these languages")
    return Questions(template, data, examples, selection)
