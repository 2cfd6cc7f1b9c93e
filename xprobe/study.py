"""A study, top to bottom: open the run folder, read the questions, compute the stages, show the results."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.arguments import check_callable, check_instance, folder_path, text_names
from xprobe.config import (
    DEFAULT_MODEL,
    DEFAULT_PROBES,
    RECORDS_IN_MEMORY,
    Execution,
    StudyConfig,
    check_probes,
    split_options,
)
from xprobe.errors import UsageError
from xprobe.events import CallerNotify, Note, Notify
from xprobe.results import Study, load_study, why_stale
from xprobe.runs.disk import check_writable
from xprobe.runs.folder import SHARDS, RunFolder
from xprobe.runs.identity import MAY_CHANGE, differences
from xprobe.runs.lock import LOCK, FolderLock
from xprobe.runs.manifest import Manifest, ModelEntry, StageEntry
from xprobe.runs.places import continued_study, first_directory, new_places

if TYPE_CHECKING:
    from xprobe.models.loading import LoadedModel, Source
    from xprobe.probes.settings import ProbeSettings
    from xprobe.stages.questions import Questions
    from xprobe.stages.run import Run


def run(
    model: Any = DEFAULT_MODEL,
    *,
    tokenizer: Any = None,
    data: Any = "builtin",
    setting: str | Iterable[str] = "en-x",
    languages: str | Iterable[str] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Notify | None = None,
    **options: Any,
) -> Study:
    """Runs a study and returns its results, which are also in its folder.

    Parameters
    ----------
    model : str, path or PreTrainedModel
        Alias, Hugging Face id, local folder or ``.gguf`` file; or a loaded transformers model, which is used as it is
        (dtype, device) and left as it was. The manifest identifies such a model by its configuration, its tokenizer,
        and a sample of every tensor.
    tokenizer : PreTrainedTokenizerBase, optional
        Of a loaded model; needed there, and only there.
    data : str, path, or records
        ``builtin``, ``xquad``, ``hf:NAME`` (a data set of the Hugging Face Hub), a folder of ``NAME.<lang>.json`` files
        or one such file; or records in memory: a list of dictionaries, a data frame, a ``datasets.Dataset`` or
        ``DatasetDict``, or a dictionary from language to one of these (docs/data.md).
    setting : str or iterable of str
        ``en-x``, ``x-x`` or both.
    languages : str or iterable of str, optional
        Question languages; all that the data holds if None.
    out : path, optional
        Run folder; a new one under ``runs/`` if None.
    resume : bool
        Continue the run in ``out``: what its shards hold is not computed again. A run of something else is refused.
    progress : callable (event), optional
        Called with the events of ``xprobe.events``, from this thread; ``xprobe.Tracker`` logs them.
    **options
        Further fields of ``StudyConfig`` (limit, template, dtype, seed, ...) and of ``Execution`` (device,
        batch_tokens, stream, ...).

    Raises
    ------
    XprobeError
        Says what is wrong, where, and what to do. Shards already written stay valid. A UsageError if another process
        or thread is at work in ``out``.

    Examples
    --------
    >>> import xprobe
    >>> study = xprobe.run("smollm2-135m", languages=["en", "de"])  # doctest: +SKIP
    >>> study["en-x"].boundary["value"]                             # doctest: +SKIP
    24.0
    """
    from xprobe.models import in_memory

    loaded = None
    if not isinstance(model, str | os.PathLike):
        loaded = in_memory.wrap_model(model, tokenizer)
        model = loaded.source.name
    elif tokenizer is not None:
        raise UsageError("tokenizer is for a model in memory: the model that is loaded by name has its own")
    if "settings" in options:
        raise UsageError("settings: xprobe.run calls it setting, which takes one or several")
    records = None
    if data is None:
        raise UsageError("data is None: leave it out for the built-in questions")
    if not isinstance(data, str | os.PathLike):
        records, data = data, RECORDS_IN_MEMORY
    what, how = split_options(options, renamed={"settings": "setting"})
    study = StudyConfig(
        model=os.fspath(model),
        data=os.fspath(data),
        settings=text_names("setting", setting),
        languages=None if languages is None else text_names("languages", languages),
        **what,
    )
    execution = Execution(**how)
    return run_config(study, execution, out=out, resume=resume, progress=progress, loaded=loaded, records=records)


def run_config(
    study: StudyConfig,
    execution: Execution | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Notify | None = None,
    loaded: LoadedModel | None = None,
    records: Any = None,
) -> Study:
    """``run`` with configurations made beforehand.

    ``loaded`` (``xprobe.models.in_memory.wrap_model``) and ``records`` replace the model and the
    data that the configuration names.
    """
    from xprobe.models.in_memory import check_options, evaluation_mode

    execution = Execution() if execution is None else execution
    check_instance("study", study, StudyConfig)
    check_instance("execution", execution, Execution)
    check_instance("resume", resume, bool)
    check_callable("progress", progress)
    if resume and out is None:
        raise UsageError("resume needs out: the folder of the run to continue")
    if not resume:  # a run that is resumed may have trained its probes already
        check_probes(study.probes or ())
    if loaded is not None:
        check_options(study.dtype, execution)
    path = default_out(study) if out is None else folder_path("out", out)
    notify = CallerNotify(progress)
    with _locked(path, notify, resume), nullcontext() if loaded is None else evaluation_mode(loaded.model):
        with notify.reporting(path, study=study.to_dict(), execution=execution.to_dict()):
            _compute_stages(study, execution, path, notify, resume, loaded, records)
        return load_study(path)


def _compute_stages(
    study: StudyConfig, execution: Execution, path: Path, notify: CallerNotify, resume: bool,
    loaded: LoadedModel | None, records: Any,
) -> None:  # fmt: skip
    """Computes the stages in order. A finished run is only read; tables that were changed are written again."""
    from xprobe.models.loading import resolve
    from xprobe.stages import phases, probes, states
    from xprobe.stages.questions import read_questions
    from xprobe.stages.run import Run

    started = time.perf_counter()
    questions = read_questions(study, records, _recorded_revision(study, path) if resume else "")
    source = resolve(study.model) if loaded is None else loaded.source
    manifest, finished = _begin(study, questions, source, loaded is not None, path, resume)
    run = Run(RunFolder(path), manifest, execution, notify)
    stale = why_stale(run.folder) if finished else None
    if not finished:
        _forget_later_stages(run, "was computed from shards that are gone")
    else:
        _forget_later_stages(run, "has lost a table, or one was changed", only_damaged=True)
    if finished:
        if not stale:
            notify(Note(f"{path} holds the finished run: shown from its files"))
        unused = _unused_options(execution, manifest)
        if unused:
            notify(Note(f"the run is finished, so these options were not used: {', '.join(unused)}", important=True))
    else:
        probes.check_registered(run)
        states.compute(run, questions, source, loaded)
    if stale:
        reason = stale.partition(": `")[0]  # without the command, which is this one
        notify(Note(f"the run is finished, and its tables are written again from the shards: {reason}", important=True))
    if stale or not finished:
        wanted = probes.settings_of(run)
        phases.compute(run)
        if wanted or probes.recorded(run):
            probes.compute(run, wanted)
    run.folder.tidy(run.manifest.groups)
    unknown = run.folder.unknown_shards(run.manifest.groups)
    if unknown:
        names = ", ".join(unknown[:3]) + (", ..." if unknown[3:] else "")
        notify(Note(f"{path / SHARDS} holds shards that this run does not use, remove them: {names}", important=True))
    if not finished:
        run.manifest.total_seconds = round(time.perf_counter() - started, 3)
    run.manifest.status = "done"
    run.folder.write_manifest(run.manifest)


def _forget_later_stages(run: Run, reason: str, *, only_damaged: bool = False) -> None:
    """Removes tables and entries of later stages, which do not fit any more and are not computed here.

    ``only_damaged``: only those of stages one of whose tables is not what the stage wrote.
    """
    for name in [name for name in run.manifest.stages if name not in ("states", "phases", "probes")]:
        entry = run.manifest.stages[name]
        if only_damaged and all(run.folder.holds_table(table, digest) for table, digest in entry.tables.items()):
            continue
        run.forget(name, reason)
    if not only_damaged:
        run.manifest.stages.pop("phases", None)  # which is computed next


def _recorded_revision(study: StudyConfig, path: Path) -> str:
    """The commit of the Hub that the run in the folder read; ``""`` if there is none, or if it read other data."""
    folder = RunFolder(path)
    if not folder.has_manifest():
        return ""
    before = folder.read_run()
    return before.data.revision if before.study.data == study.data else ""


def _unused_options(execution: Execution, manifest: Manifest) -> list[str]:
    """Options that were chosen for a run that is finished, where they differ from those that it was computed with."""
    stage = manifest.stages["states"]
    recorded, default = stage.executions[-1].options if stage.executions else Execution(), Execution()
    chosen = {field.name: getattr(execution, field.name) for field in fields(Execution)}
    del chosen["jobs"]  # it is used if tables are written again
    return [
        f"{name}={value!r}"
        for name, value in chosen.items()
        if value not in (getattr(default, name), getattr(recorded, name))
    ]


def train_probes(
    path: str | Path,
    probes: str | Iterable[str] | None = None,
    settings: ProbeSettings | None = None,
    progress: Notify | None = None,
) -> Study:
    """Trains probes on a finished run anew, without its model; what other probes found stays.

    Parameters
    ----------
    path : path
        The run folder. Tables that are missing, or are not the ones that the run wrote, are all written again from the
        shards.
    probes : str or iterable of str, optional
        Of ``xprobe.config.PROBES``; ``xprobe.config.DEFAULT_PROBES`` if None.
    settings : ProbeSettings, optional
        With the run's own seed if None.
    progress : callable (event), optional

    Raises
    ------
    UsageError
        An argument of the wrong type, not a run folder, no states in it, an unknown probe, or another process is at
        work there.
    ProbeError
        A function of a probe fails: names the probe and the place. The run stays as it was.
    RunFolderError
        The run is not finished, its manifest cannot be used, or shards are not what it wrote.
    """
    from xprobe.probes.settings import ProbeSettings
    from xprobe.stages import phases
    from xprobe.stages import probes as stage
    from xprobe.stages.run import Run

    names = tuple(DEFAULT_PROBES) if probes is None else text_names("probes", probes)
    if not names:
        raise UsageError("no probe given: name at least one, or leave out probes")
    check_probes(names)
    if settings is not None:
        check_instance("settings", settings, ProbeSettings)
    check_callable("progress", progress)
    folder, notify = RunFolder.open(folder_path("path", path)), CallerNotify(progress)
    folder.read_finished()  # says what is wrong with the run before anything is locked
    with FolderLock(folder.path) as lock:
        if lock.warning:
            notify(Note(lock.warning, important=True))
        run = Run(folder, folder.read_finished(), Execution(), notify)
        wanted = dict.fromkeys(names, settings or ProbeSettings(seed=run.manifest.study.seed))
        stale = why_stale(folder)
        if stale:
            notify(Note(f"all tables are written again from the shards ({stale})", important=True))
            wanted = {**stage.settings_of(run), **wanted}
            phases.compute(run)
        stage.compute(run, wanted)
    return load_study(path)


@contextmanager
def _locked(path: Path, notify: CallerNotify, resume: bool) -> Iterator[None]:
    """Locks the folder for this process, if a run may begin or be resumed in it."""
    check_writable(path)
    if not (path / LOCK).exists():  # a locked folder is reported as locked, whatever it holds
        RunFolder.check(path, resume=resume)
    with FolderLock(path) as lock:
        if lock.warning:
            notify(Note(lock.warning, important=True))
        RunFolder.check(path, resume=resume)
        yield


def _begin(
    study: StudyConfig, questions: Questions, source: Source, in_memory: bool, path: Path, resume: bool
) -> tuple[Manifest, bool]:
    """The manifest to continue with, and whether the run in the folder is finished and complete.

    Raises
    ------
    UsageError
        The run in the folder has another study, model or data: names every difference.
    RunFolderError
        The manifest was changed, and does not fit the shards.
    """
    from xprobe.lenses.files import lens_checksum
    from xprobe.models.in_memory import IDENTITY

    now = Manifest(
        study=study,
        model=ModelEntry(
            source.name, source.kind, source.location, source.fingerprint(), IDENTITY if in_memory else None
        ),
        data=questions.data_entry,
        template_sha256=questions.template_sha256,
        lens_sha256=lens_checksum(study.lens),
        directory=os.getcwd(),
    )
    folder = RunFolder.create(path, resume=True) if resume else RunFolder(path)
    if not resume or not folder.has_manifest():
        return now, False
    before = folder.read_run()
    changed = differences(before, now, folder.read_study())
    if changed:
        raise UsageError(f"cannot resume {path}: {'; '.join(changed)}. Choose another out (--out)")
    if folder.is_finished():
        _keep_places(folder, before, study)
        return before, True
    now.model.dtype, now.data.files_sha256 = before.model.dtype, before.data.files_sha256
    stages = {name: entry for name, entry in before.stages.items() if name in ("states", "probes")}
    if folder.manifest_is_untouched():
        now.created, now.stages = before.created, stages
    else:  # only what can be verified is written again, with a new checksum
        folder.check_key()
        folder.check_dtype(before.model.dtype)
        untouched = folder.untouched_stages()
        now.stages = {name: entry for name, entry in stages.items() if name in untouched}
        if "probes" in stages.keys() - untouched:  # the probes are trained again, so their settings are enough
            now.stages["probes"] = StageEntry(results=stages["probes"].results)
    now.directory = first_directory(before, now)
    now.study, now.places = continued_study(before, study, now.directory), new_places(before, study)
    now.places = {name: place for name, place in now.places.items() if name not in MAY_CHANGE}  # the study has those
    later = {name: entry for name, entry in before.stages.items() if name not in stages}
    now.stages |= later  # until _forget_later_stages has removed what they wrote
    return now, False


def _keep_places(folder: RunFolder, before: Manifest, study: StudyConfig) -> None:
    """Writes down where the files of a finished run lie now, for its later stages."""
    places = new_places(before, study)
    if places != before.places:
        before.places = places
        folder.write_manifest(before)


def default_out(study: StudyConfig) -> Path:
    """A new folder under ``runs/``, named after model, settings and time."""
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(study.model).name) or "model"
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{stem}_{'+'.join(study.settings)}_{now}"
