"""The manifest of a run: what it measures, how each stage was computed, and what each stage found.

``manifest.json`` is the one place that says what a run folder holds. This module is the one place that gives it a form;
``xprobe.runs.schema`` checks a file before it is read, ``xprobe.runs.folder`` reads and writes it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from xprobe.config import Execution, StudyConfig

FORMAT = 2  # raised when older readers would misread a run folder
_UNWRITTEN = ("other", "study_as_read")  # fields of Manifest that are no entries of the file


@dataclass
class ModelEntry:
    """The model: which files, which shape, and where its parts are."""

    name: str = ""
    kind: str = ""
    location: str = ""
    files_sha256: str = ""
    identity: str | None = None  # for a model in memory: what the checksum was taken of
    type: str = ""
    n_blocks: int = 0
    width: int = 0
    vocab_size: int = 0
    dtype: str = ""
    window: int | None = None
    modules: dict[str, str] = field(default_factory=dict)
    head_sha256: str = ""
    scale: float = 1.0
    softcap: float | None = None


@dataclass
class DataEntry:
    """The questions: which files, and the checksum of what was read of them.

    ``records_sha256`` is the same wherever the records were read from. ``revision`` is the hash of the commit, of data
    from the Hugging Face Hub.
    """

    name: str = ""
    files: list[str] = field(default_factory=list)
    files_sha256: str = ""
    records_sha256: str = ""
    revision: str = ""

    def same_records(self, other: DataEntry) -> bool:
        """Whether both hold the same questions. Runs of earlier versions have the checksum of the files alone.

        Examples
        --------
        >>> DataEntry("xquad", [], "1a", "2b").same_records(DataEntry("hf:google/xquad", [], "3c", "2b"))
        True
        """
        return self.files_sha256 == other.files_sha256 or self.records_sha256 == other.records_sha256 != ""


@dataclass
class ExecutionEntry:
    """How one part of a stage was computed: options, the device they led to, and the versions at work.

    Attributes
    ----------
    key : str
        Checksum of options, device and environment; lines of the journal name it.
    shards : int
        How many shards this part wrote, where the stage writes shards.
    strategy : str
        How this part shared the beginnings of prompts, where the stage runs the model.
    warnings : list of str
        What this part warned of, where the stage runs the model.
    """

    options: Execution = field(default_factory=Execution)
    device: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    shards: int = 0
    strategy: str = ""
    warnings: list[str] = field(default_factory=list)


@dataclass
class StageEntry:
    """One stage: how it was computed, how long it took, the tables that it wrote, and what it found.

    Attributes
    ----------
    executions : list of ExecutionEntry
        One for each part that was computed differently, in order.
    seconds : dict of str to float
        Seconds of its steps.
    warnings : list of str
    tables : dict of str to str
        SHA-256 of each table, by file name.
    results : dict
        What the stage found, in plain values; docs/run-folder.md describes it for each stage.
    """

    executions: list[ExecutionEntry] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


@dataclass
class Counts:
    """Examples, answer tokens, languages and paragraphs; what was left out, by its reason."""

    examples: int = 0
    answer_tokens: int = 0
    languages: int = 0
    paragraphs: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    bad_records: dict[str, int] = field(default_factory=dict)


@dataclass
class Manifest:
    """All of ``manifest.json``.

    ``other`` keeps entries that this version does not know. ``study_as_read`` keeps the study as another version may
    have written it: shards belong to a study to the letter (``xprobe.runs.identity.run_key``), so writing the manifest
    again must neither add an option that the version that began the run did not know, nor drop one.

    Examples
    --------
    >>> manifest = Manifest(study=StudyConfig(seed=3))
    >>> Manifest.from_dict(manifest.to_dict()).study.seed
    3
    """

    format: int = FORMAT
    status: str = "running"  # or "done"
    created: str = ""
    directory: str = ""  # working directory in which the run began: relative paths in ``study`` start there
    places: dict[str, str] = field(default_factory=dict)  # name in ``study`` -> where its file lay at the last resume
    study: StudyConfig = field(default_factory=StudyConfig)
    model: ModelEntry = field(default_factory=ModelEntry)
    data: DataEntry = field(default_factory=DataEntry)
    template_sha256: str = ""
    lens_sha256: str = ""  # of the file of the lens; empty for the logit lens
    selection: dict[str, Any] = field(default_factory=dict)
    prompt: dict[str, Any] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    total_seconds: float = 0.0
    stages: dict[str, StageEntry] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    study_as_read: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("study", "stages", *_UNWRITTEN)}
        plain = {
            name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in values.items()
        }
        stages = {name: _stage_to_dict(stage) for name, stage in self.stages.items()}
        return {**plain, "study": self._study_to_dict(), "stages": stages, **self.other}

    def _study_to_dict(self) -> dict[str, Any]:
        """The study as it was read, with the options that changed since."""
        now = self.study.to_dict()
        if self.study_as_read is None:
            return now
        before = StudyConfig.from_dict(_known(StudyConfig, self.study_as_read)).to_dict()
        return {**self.study_as_read, **{name: value for name, value in now.items() if value != before[name]}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """The inverse of ``to_dict``. The values are to be checked before (``xprobe.runs.schema``)."""
        own = {f.name for f in fields(cls)} - set(_UNWRITTEN)
        known = {name: value for name, value in values.items() if name in own}
        for name, kind in (("model", ModelEntry), ("data", DataEntry), ("counts", Counts)):
            known[name] = _entry(kind, known.get(name, {}))
        study = known.get("study")
        known["study"] = StudyConfig.from_dict(_known(StudyConfig, study))
        known["stages"] = {name: _stage_from_dict(stage) for name, stage in known.get("stages", {}).items()}
        other = {name: value for name, value in values.items() if name not in own}
        return cls(**known, other=other, study_as_read=dict(study) if isinstance(study, dict) else None)

    @property
    def warnings(self) -> list[str]:
        """Warnings of all stages, in order."""
        return [warning for stage in self.stages.values() for warning in stage.warnings]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every step of every stage."""
        return {name: seconds for stage in self.stages.values() for name, seconds in stage.seconds.items()}


def _known(kind: type, values: Any) -> dict[str, Any]:
    """The entries of an object that a class has fields for; none of anything else than an object."""
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in values.items() if name in names} if isinstance(values, dict) else {}


def _entry(kind: type, values: Any) -> Any:
    return kind(**_known(kind, values))


def _stage_to_dict(stage: StageEntry) -> dict[str, Any]:
    parts = [{**asdict(part), "options": part.options.to_dict()} for part in stage.executions]
    return {**asdict(stage), "executions": parts}


def _stage_from_dict(values: dict[str, Any]) -> StageEntry:
    parts = []
    for part in values.get("executions", []):
        options = Execution.from_dict(_known(Execution, part.get("options", {})))
        parts.append(ExecutionEntry(**{**_known(ExecutionEntry, part), "options": options}))
    return StageEntry(**{**_known(StageEntry, values), "executions": parts})
