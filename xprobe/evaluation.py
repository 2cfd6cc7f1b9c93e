"""Answers of a finished run: generated, scored, and kept in its folder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.arguments import check_callable, check_instance, folder_path
from xprobe.config import MODEL_IN_MEMORY, RECORDS_IN_MEMORY, Execution, StudyConfig
from xprobe.errors import UsageError
from xprobe.events import CallerNotify, Note, Notify
from xprobe.results import Study, load_study
from xprobe.runs.folder import RunFolder
from xprobe.runs.identity import differences, model_to_load
from xprobe.runs.lock import FolderLock
from xprobe.runs.manifest import DataEntry, Manifest, ModelEntry
from xprobe.scoring.settings import AnswerSettings

if TYPE_CHECKING:
    from xprobe.models.loading import LoadedModel
    from xprobe.stages.generation import AskedModel


def evaluate(
    path: str | Path | Study,
    settings: AnswerSettings | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    records: Any = None,
    progress: Notify | None = None,
    **options: Any,
) -> Study:
    """Generates an answer for every prompt of a finished run, and scores it.

    Answers that the folder holds are not generated again: scoring them by another normaliser needs neither the model
    nor the data. An evaluation that was stopped goes on where it was.

    Parameters
    ----------
    path : path or Study
        The run folder, or a study that was read from it. Gets ``answers.jsonl`` and ``answers.parquet``.
    settings : AnswerSettings, optional
    model, tokenizer : PreTrainedModel and PreTrainedTokenizerBase, optional
        Of a run that was made with a model in memory.
    records : optional
        Of a run that was made with questions in memory, as ``xprobe.run`` takes them in ``data``.
    progress : callable (event), optional
    **options
        Fields of ``Execution`` (device, batch_tokens, ...); those of the run's last execution where none is given.

    Raises
    ------
    UsageError
        Not a run folder, an argument of the wrong type, a model or data other than those of the run, or a streamed
        model.
    RunFolderError
        The run is not finished, or its folder cannot be used.
    XprobeError
        The model failed; what was written stays.

    Examples
    --------
    >>> import xprobe
    >>> study = xprobe.evaluate("runs/demo")                # doctest: +SKIP
    >>> study.answers.groupby("language")["f1"].mean()      # doctest: +SKIP
    """
    from xprobe.models import in_memory
    from xprobe.stages import answers
    from xprobe.stages.run import Run

    settings = AnswerSettings() if settings is None else settings
    check_instance("settings", settings, AnswerSettings)
    check_callable("progress", progress)
    place = path.path if isinstance(path, Study) else folder_path("path", path)
    folder, notify = RunFolder.open(place), CallerNotify(progress)
    states = folder.read_finished().stages["states"]
    recorded = states.executions[-1].options if states.executions else Execution()
    unknown = sorted(set(options) - set(vars(recorded)))
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(vars(recorded)))}")
    execution = recorded.resumed_with(options)
    loaded = None if model is None else in_memory.wrap_model(model, tokenizer)
    with FolderLock(folder.path) as lock, nullcontext() if loaded is None else in_memory.evaluation_mode(loaded.model):
        if lock.warning:
            notify(Note(lock.warning))
        run = Run(folder, folder.read_finished(), execution, notify)
        answers.compute(run, settings, lambda: _open_model(folder, run.manifest, loaded, records))
        folder.write_manifest(run.manifest)
    return load_study(place)


def _open_model(folder: RunFolder, manifest: Manifest, loaded: LoadedModel | None, records: Any) -> AskedModel:
    """The model and the questions of a run.

    Raises
    ------
    UsageError
        They are not here, or are not those of the run: names every difference.
    """
    from xprobe.models.loading import resolve
    from xprobe.stages.generation import AskedModel
    from xprobe.stages.questions import read_questions

    if manifest.model.kind == MODEL_IN_MEMORY and loaded is None:
        raise UsageError(f"the run in {folder.path} was made with a model in memory: pass it as model and tokenizer")
    if manifest.data.name == RECORDS_IN_MEMORY and records is None:
        raise UsageError(f"the run in {folder.path} was made with questions in memory: pass them as records")
    name = model_to_load(manifest, folder.path) if loaded is None else loaded.source.name
    study: StudyConfig = replace(manifest.study, model=name)
    source = resolve(name) if loaded is None else loaded.source
    questions = read_questions(study, records)
    now = Manifest(
        study=study,
        model=ModelEntry(source.name, source.kind, source.location, source.fingerprint()),
        data=DataEntry(questions.data.name, list(questions.data.files), questions.data.fingerprint),
        template_sha256=questions.template_sha256,
    )
    changed = differences(manifest, now, folder.read_study())
    if changed:
        raise UsageError(f"cannot add answers to the run in {folder.path}: {'; '.join(changed)}")
    return AskedModel(questions, source, loaded)
