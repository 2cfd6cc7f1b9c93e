"""Stages that a finished run is given later: answers, the words that they depend on, relevance, patches, lenses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from xprobe.arguments import check_callable, check_instance, folder_path
from xprobe.attribution.settings import RelevanceSettings
from xprobe.config import MODEL_IN_MEMORY, RECORDS_IN_MEMORY, Execution
from xprobe.errors import UsageError
from xprobe.events import CallerNotify, Note, Notify
from xprobe.lenses.settings import LensesSettings
from xprobe.phases.patch_settings import PatchSettings
from xprobe.results import Study, load_study
from xprobe.runs.folder import RunFolder
from xprobe.runs.identity import differences, study_to_load
from xprobe.runs.lock import FolderLock
from xprobe.runs.manifest import Manifest, ModelEntry
from xprobe.runs.places import study_here
from xprobe.scoring.settings import AnswerSettings, OracleSettings

if TYPE_CHECKING:
    from xprobe.models.loading import LoadedModel
    from xprobe.stages.opening import AskedModel
    from xprobe.stages.oracle_forecast import OracleForecast
    from xprobe.stages.relevance import ExampleRelevance
    from xprobe.stages.run import Run

Settings = TypeVar("Settings")


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
    from xprobe.stages import answers

    settings = _settings(settings, AnswerSettings, options)
    return _add_stage(path, partial(answers.compute, settings=settings), model, tokenizer, records, progress, options)


def oracle(
    path: str | Path | Study,
    settings: OracleSettings | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    records: Any = None,
    progress: Notify | None = None,
    **options: Any,
) -> Study:
    """Finds, for every answer of a finished run, the words of the context that it depends on (oracle definition 1).

    Words are removed from the context, one span after the other, and the log-probability of the answer is measured
    again. The span whose removal costs most is the evidence; its F1 with the gold answer says whether the model found
    the answer, whatever it then said. Answers are generated first where the run has none. A call that was stopped goes
    on where it was.

    Parameters
    ----------
    path : path or Study
        The run folder, or a study that was read from it. Gets ``oracle.jsonl`` and ``oracle.parquet``.
    settings : OracleSettings, optional
    model, tokenizer, records, progress, **options
        As for ``evaluate``.

    Raises
    ------
    UsageError
        As ``evaluate``.
    RunFolderError
        The run is not finished, or its folder cannot be used.
    XprobeError
        The model failed; what was written stays.

    Examples
    --------
    >>> import xprobe
    >>> study = xprobe.oracle("runs/demo", xprobe.OracleSettings(limit=4))                  # doctest: +SKIP
    >>> study.oracle.query("target == 'own' and question")[["evidence", "f1"]].head()       # doctest: +SKIP
    """
    from xprobe.stages import oracle as stage

    settings = _settings(settings, OracleSettings, options)
    return _add_stage(path, partial(stage.compute, settings=settings), model, tokenizer, records, progress, options)


def attribute(
    path: str | Path | Study,
    settings: RelevanceSettings | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    records: Any = None,
    progress: Notify | None = None,
    **options: Any,
) -> Study:
    """Computes, for every example of a finished run, how much each token matters for the gold answer at each layer.

    One backward pass per example, under a rule that says how relevance passes attention, norms and gates. A call that
    was stopped goes on where it was.

    Parameters
    ----------
    path : path or Study
        The run folder, or a study that was read from it. Gets ``relevance.jsonl``, ``relevance.parquet`` and
        ``relevance_by_layer.parquet``.
    settings : RelevanceSettings, optional
    model, tokenizer, records, progress, **options
        As for ``evaluate``.

    Raises
    ------
    UsageError
        As ``evaluate``.
    ModelError
        The rule does not know a part of the model: names it.
    RunFolderError
        The run is not finished, or its folder cannot be used.
    XprobeError
        The model failed; what was written stays.

    Examples
    --------
    >>> import xprobe
    >>> study = xprobe.attribute("runs/demo", xprobe.RelevanceSettings(limit=4))        # doctest: +SKIP
    >>> study.relevance.query("group == 'question'")[["language", "mrd"]].head()        # doctest: +SKIP
    """
    from xprobe.stages import relevance

    settings = _settings(settings, RelevanceSettings, options)
    return _add_stage(path, partial(relevance.compute, settings=settings), model, tokenizer, records, progress, options)


def patch(
    path: str | Path | Study,
    settings: PatchSettings | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    records: Any = None,
    progress: Notify | None = None,
    **options: Any,
) -> Study:
    """Puts the states of one question into the run of another, layer by layer, and measures where the answer moves.

    So it finds the layers at which the model uses the question and has the answer: the causal boundaries. A call that
    was stopped goes on where it was.

    Parameters
    ----------
    path : path or Study
        The run folder, or a study that was read from it. Gets ``patching.jsonl``, ``patching.parquet`` and
        ``patching_by_layer.parquet``.
    settings : PatchSettings, optional
    model, tokenizer, records, progress, **options
        As for ``evaluate``.

    Raises
    ------
    UsageError
        As ``evaluate``.
    DataError
        No two questions on a paragraph have answers that differ in a token.
    RunFolderError
        The run is not finished, or its folder cannot be used.
    XprobeError
        The model failed; what was written stays.

    Examples
    --------
    >>> import xprobe
    >>> study = xprobe.patch("runs/demo", xprobe.PatchSettings(limit=6))                    # doctest: +SKIP
    >>> study.patching.query("kind == 'answer'").groupby("layer")["other"].mean()           # doctest: +SKIP
    """
    from xprobe.stages import patching

    settings = _settings(settings, PatchSettings, options)
    return _add_stage(path, partial(patching.compute, settings=settings), model, tokenizer, records, progress, options)


def read_lenses(
    path: str | Path | Study,
    settings: LensesSettings | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    records: Any = None,
    progress: Notify | None = None,
    **options: Any,
) -> Study:
    """Reads the states of a finished run by several lenses, its own among them, in one forward pass (docs/lenses.md).

    Writes ``lenses.jsonl`` and three tables; a call that was stopped goes on where it was. Arguments as for
    ``evaluate``, with ``LensesSettings``. A streamed model is read as well.

    Raises
    ------
    UsageError
        As ``evaluate``; or a lens is unknown, or has no file.
    ModelError
        A lens is of another model.
    RunFolderError, XprobeError
        As ``evaluate``.

    Examples
    --------
    >>> import xprobe
    >>> study = xprobe.read_lenses("runs/demo", xprobe.LensesSettings("jacobian:lens.pt"))     # doctest: +SKIP
    >>> study.lenses.query("language == 'all'")[["lens", "boundary", "alpha"]]                 # doctest: +SKIP
    """
    from xprobe.stages import lenses

    settings = _settings(settings, LensesSettings, options)
    return _add_stage(path, partial(lenses.compute, settings=settings), model, tokenizer, records, progress, options)


def attribute_example(
    path: str | Path | Study,
    example: str,
    settings: RelevanceSettings | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    records: Any = None,
    **options: Any,
) -> ExampleRelevance:
    """The relevance of every token of one example, layer by layer. Nothing is written.

    Parameters
    ----------
    path : path or Study
    example : str
        setting/language/question id, such as ``en-x/de/p01q1``.
    settings : RelevanceSettings, optional
    model, tokenizer, records, **options
        As for ``evaluate``.

    Raises
    ------
    UsageError
        As ``evaluate``; or the run has no such example.
    ModelError
        The rule does not know a part of the model.

    Examples
    --------
    >>> import xprobe
    >>> found = xprobe.attribute_example("runs/demo", "en-x/de/p01q1")       # doctest: +SKIP
    >>> found.values.shape == (31, len(found.tokens))                        # doctest: +SKIP
    True
    """
    from xprobe.models import in_memory
    from xprobe.stages.relevance import relevance_of_example

    settings = _settings(settings, RelevanceSettings, options)
    folder, run = _open_run(path, CallerNotify(None), options)
    loaded = None if model is None else in_memory.wrap_model(model, tokenizer)
    with nullcontext() if loaded is None else in_memory.evaluation_mode(loaded.model):
        return relevance_of_example(run, settings, example, _open_model(folder, run.manifest, loaded, records))


def forecast_oracle(
    path: str | Path | Study, settings: OracleSettings | None = None, *, records: Any = None, **options: Any
) -> OracleForecast:
    """What ``oracle`` would take, in tokens and time. No weights are read. The run must have answers.

    Raises
    ------
    UsageError, RunFolderError
        As ``oracle``; or the run has no answers.

    Examples
    --------
    >>> import xprobe
    >>> print(xprobe.forecast_oracle("runs/demo"))           # doctest: +SKIP
    1152 answers, about 86,400 removals, 4.1 million tokens, 32 times those of the states; 51 minutes at their speed
    """
    from xprobe.stages.oracle_forecast import forecast_run

    settings = _settings(settings, OracleSettings, options)
    folder, run = _open_run(path, CallerNotify(None), options)
    asked = _open_model(folder, run.manifest, None, records)
    return forecast_run(run, settings, asked)


def _settings(given: Settings | None, kind: type[Settings], options: dict[str, Any]) -> Settings:
    """The settings that were given, or the default ones. A UsageError if they, or ``options``, are of another kind."""
    for name in sorted(set(options) & {entry.name for entry in fields(cast(Any, kind))}):
        raise UsageError(f"{name} is a field of {kind.__name__}: pass xprobe.{kind.__name__}({name}=...) as settings")
    if given is None:
        return kind()
    check_instance("settings", given, kind)
    return given


def _open_run(path: str | Path | Study, notify: CallerNotify, options: dict[str, Any]) -> tuple[RunFolder, Run]:
    """A finished run, and how its next stage is computed.

    Raises
    ------
    UsageError, RunFolderError
        It is no finished run, or an option is unknown.
    """
    from xprobe.stages.run import Run

    folder = RunFolder.open(path.path if isinstance(path, Study) else folder_path("path", path))
    manifest = folder.read_finished()
    states = manifest.stages["states"]
    recorded = states.executions[-1].options if states.executions else Execution()
    unknown = sorted(set(options) - set(vars(recorded)))
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(vars(recorded)))}")
    return folder, Run(folder, manifest, recorded.resumed_with(options), notify)


def _add_stage(
    path: str | Path | Study,
    compute: Callable[..., None],
    model: Any,
    tokenizer: Any,
    records: Any,
    progress: Notify | None,
    options: dict[str, Any],
) -> Study:
    """Computes a stage of a finished run that needs its model, and writes the manifest."""
    from xprobe.models import in_memory

    check_callable("progress", progress)
    notify = CallerNotify(progress)
    folder, run = _open_run(path, notify, options)
    loaded = None if model is None else in_memory.wrap_model(model, tokenizer)
    with FolderLock(folder.path) as lock, nullcontext() if loaded is None else in_memory.evaluation_mode(loaded.model):
        if lock.warning:
            notify(Note(lock.warning))
        run.manifest = folder.read_finished()  # as it is now that no other process writes it
        config = {"study": run.manifest.study.to_dict(), "execution": run.execution.to_dict()}
        with notify.reporting(folder.path, **config):
            compute(run, open_model=cache(lambda: _open_model(folder, run.manifest, loaded, records)))
            folder.write_manifest(run.manifest)
    return load_study(folder.path)


def _open_model(folder: RunFolder, manifest: Manifest, loaded: LoadedModel | None, records: Any) -> AskedModel:
    """The model and the questions of a run.

    Raises
    ------
    UsageError
        They are not here, or are not those of the run: names every difference.
    """
    from xprobe.models.loading import resolve
    from xprobe.stages.opening import AskedModel
    from xprobe.stages.questions import read_questions

    if manifest.model.kind == MODEL_IN_MEMORY and loaded is None:
        raise UsageError(f"the run in {folder.path} was made with a model in memory: pass it (model=, tokenizer=)")
    if manifest.data.name == RECORDS_IN_MEMORY and records is None:
        raise UsageError(f"the run in {folder.path} was made with questions in memory: pass them (records=)")
    study = study_to_load(manifest, folder.path) if loaded is None else study_here(manifest)
    source = resolve(study.model) if loaded is None else loaded.source
    questions = read_questions(study, records, manifest.data.revision)
    now = Manifest(
        study=study,
        model=ModelEntry(source.name, source.kind, source.location, source.fingerprint()),
        data=questions.data_entry,
        template_sha256=questions.template_sha256,
        lens_sha256=manifest.lens_sha256,  # the only stage that reads with it, "lenses", checks it
    )
    changed = differences(manifest, now, folder.read_study())
    if changed:
        raise UsageError(f"cannot add to the run in {folder.path}: {'; '.join(changed)}")
    return AskedModel(questions, source, loaded)
