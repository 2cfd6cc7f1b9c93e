"""From the shards of a run to its tables: signals, probes, phases. Needs the run folder, no model and no data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xprobe.config import PROBES, SETTINGS, StudyConfig
from xprobe.errors import RunFolderError, UsageError
from xprobe.phases.encoding import paragraph_encoding
from xprobe.phases.segmentation import PHASE_DEFINITION
from xprobe.phases.tables import example_table, layer_table, replace_signals, summaries
from xprobe.results import Study, load_study
from xprobe.runs.folder import EXAMPLES, LAYERS, MANIFEST, PROBE_TABLE, RunFolder
from xprobe.runs.lock import FolderLock
from xprobe.runs.schema import config_from
from xprobe.runs.states import STATES, StoredStates
from xprobe.stages.states import read_signals

if TYPE_CHECKING:
    import pandas as pd

    from xprobe.probes.training import ProbeSettings

Progress = Callable[[str, int, int], None]
Signals = dict[str, NDArray[np.float64]]

STAGE = "probes"  # as progress is told


def analyse(
    config: StudyConfig, manifest: dict[str, Any], folder: RunFolder, timings: dict[str, float], progress: Progress
) -> dict[str, Any]:
    """Writes the tables of a run whose shards are complete; gives its manifest with the results.

    Trains the probes of ``config``, and those that ``manifest`` names (``xprobe probe`` trained them) with the settings
    in it. ``timings`` gets the seconds of each stage added.

    Raises
    ------
    RunFolderError
        Shards are not what this run wrote, do not fit the manifest, or the tables cannot be written.
    """
    progress("signals", 0, 0)
    with _timed(timings, "signals"):
        frame, signals = read_signals(folder, manifest)
        if "encoding" in (config.signals or ()):
            signals |= encoding_signals(StoredStates.of(folder, frame, manifest))
    recorded = manifest.get("probes", {})
    tables: dict[str, pd.DataFrame] = {}
    entries: dict[str, Any] = {}
    if config.probes or recorded:
        with _timed(timings, "probes"):
            stored = StoredStates.of(folder, frame, manifest)
            correct = frame["first_token_correct"].to_numpy(bool)
            wanted = _wanted(config, recorded, folder)
            scores, probed = _train_all(stored, correct, wanted, progress)
        signals |= probed
        tables[PROBE_TABLE] = scores
        entries = {name: settings.to_dict() for name, settings in wanted.items()}
    progress("phases and tables", 0, 0)
    with _timed(timings, "phases"):
        examples = example_table(frame, signals, config.permutations, config.seed)
        layers = layer_table(examples, signals, config.bootstrap, config.seed)
        results = summaries(examples, signals, manifest["model"]["n_blocks"], config.bootstrap, config.seed)
        with folder.writing_tables({LAYERS: layers, EXAMPLES: examples, **tables}) as digests:
            pass
    return {
        **manifest,
        "phase_definition": PHASE_DEFINITION,
        "probes": entries,
        "results": {s: results[s] for s in config.settings if s in results},
        "tables": digests,
    }


def _wanted(config: StudyConfig, recorded: dict[str, Any], folder: RunFolder) -> dict[str, ProbeSettings]:
    """The settings of every probe to train, in the order of ``PROBES``; those in the manifest come first."""
    from xprobe.probes.training import ProbeSettings

    unknown = [name for name in recorded if name not in PROBES]
    if unknown:
        raise RunFolderError(
            f"{folder.path / MANIFEST}: entry probes names {unknown[0]!r}, which this version of xprobe does not know: "
            "use the version that trained it"
        )
    known = [field.name for field in fields(ProbeSettings)]
    wanted = {name: ProbeSettings(seed=config.seed) for name in config.probes or ()}
    for name, entry in recorded.items():
        wanted[name] = ProbeSettings(**{key: value for key, value in entry.items() if key in known})
    return {name: wanted[name] for name in PROBES if name in wanted}


def _train_all(
    stored: StoredStates, correct: NDArray[np.bool_], wanted: dict[str, ProbeSettings], progress: Progress
) -> tuple[pd.DataFrame, Signals]:
    """Scores and signals of all probes ``wanted``; those with the same settings are trained together."""
    import pandas as pd

    from xprobe.models.loading import pick_device
    from xprobe.probes.training import train

    tables: list[pd.DataFrame] = []
    signals: Signals = {}
    for settings in dict.fromkeys(wanted.values()):
        if settings.device != "cpu":
            pick_device(settings.device)
        names = tuple(name for name, own in wanted.items() if own == settings)
        scores, probed = train(stored, correct, names, settings, lambda done, total: progress(STAGE, done, total))
        tables.append(scores)
        signals |= probed
    return _in_order(pd.concat(tables, ignore_index=True)), signals


def _in_order(scores: pd.DataFrame) -> pd.DataFrame:
    """The one order of the probe table, whichever probe was trained first: setting, state, layer, probe."""
    settings = scores["setting"].map({name: rank for rank, name in enumerate(SETTINGS)})
    states = scores["state"].map({name: rank for rank, name in enumerate(STATES)})
    probes = scores["probe"].map({name: rank for rank, name in enumerate(PROBES)})
    return scores.iloc[np.lexsort((probes, scores["layer"], states, settings))].reset_index(drop=True)


def encoding_signals(stored: StoredStates) -> Signals:
    """``encoding`` and ``encoding_question``, each with _control, _selectivity, _top1 and _margin, [N, L + 1]."""
    shape = (len(stored.frame), stored.n_layers)
    signals: Signals = {}
    for state, name in STATES.items():
        for rows, layers, states in stored.paragraphs(state):
            part = stored.frame.iloc[rows]
            found = paragraph_encoding(states, part["question_id"].to_numpy(), part["language"].to_numpy())
            values = {
                name: found.encoding,
                f"{name}_control": found.control,
                f"{name}_selectivity": found.selectivity,
                f"{name}_top1": found.top1,
                f"{name}_margin": found.margin,
            }
            for key, value in values.items():
                signals.setdefault(key, np.full(shape, np.nan))[rows, layers.start : layers.stop] = value
    return signals


def retrain(
    path: str | Path,
    probes: tuple[str, ...] = tuple(PROBES),
    settings: ProbeSettings | None = None,
    progress: Progress | None = None,
) -> Study:
    """Trains probes on a finished run anew, without its model; what other probes found stays.

    Parameters
    ----------
    path : path
        The run folder; its ``probes.parquet``, and the probed signals in its other tables, are replaced. Tables that
        are missing, or are not the ones that the run wrote, are all written again from the shards.
    probes : tuple of str
        Of ``alignment``, ``language``, ``correctness``.
    settings : ProbeSettings, optional
        With the run's own seed if None.

    Raises
    ------
    UsageError
        Not a run folder, no states in it, an unknown probe, or another process is at work there.
    RunFolderError
        The run is not finished, its manifest cannot be used, or shards are not what it wrote.
    """
    from xprobe.probes.training import ProbeSettings

    notify = progress or (lambda stage, done, total: None)
    unknown = [name for name in probes if name not in PROBES]
    if unknown or not probes:
        what = f"unknown probe {unknown[0]!r}" if unknown else "no probe given"
        raise UsageError(f"{what}; available: {', '.join(PROBES)}")
    folder = RunFolder.open(Path(path))
    folder.read_finished()  # what is wrong with the run is said before anything is locked
    with FolderLock(folder.path) as lock:
        if lock.remark:
            notify(lock.remark, 0, 0)
        manifest = folder.read_finished()
        settings = settings or ProbeSettings(seed=manifest["config"]["seed"])
        try:
            study = load_study(path)
        except RunFolderError as error:
            notify(f"all tables are written again from the shards ({error})", 0, 0)
            _write_all_again(folder, manifest, dict.fromkeys(probes, settings), notify)
        else:
            _replace_probes(folder, study, dict.fromkeys(probes, settings), notify)
    return load_study(path)


def _write_all_again(
    folder: RunFolder, manifest: dict[str, Any], wanted: dict[str, ProbeSettings], progress: Progress
) -> None:
    """All tables from the shards, with the probes ``wanted`` and those that the manifest names."""
    timings: dict[str, float] = {}
    probes = {**manifest["probes"], **{name: settings.to_dict() for name, settings in wanted.items()}}
    manifest = analyse(config_from(manifest), {**manifest, "probes": probes}, folder, timings, progress)
    folder.write_manifest(_with_seconds(manifest, timings))


def _replace_probes(folder: RunFolder, study: Study, wanted: dict[str, ProbeSettings], progress: Progress) -> None:
    """Tables and manifest with the probes ``wanted`` trained anew; everything else stays."""
    import pandas as pd

    manifest, config = study.manifest, study.manifest["config"]
    frame, _ = read_signals(folder, manifest)
    stored = StoredStates.of(folder, frame, manifest)
    keys = ["setting", "language", "question_id", "paragraph"]
    if not frame[keys].equals(study.examples[keys].astype(frame[keys].dtypes)):
        raise RunFolderError(
            f"{folder.path / MANIFEST}: entry groups does not fit {EXAMPLES}; {folder.resume_command} writes it again"
        )
    timings: dict[str, float] = {}
    with _timed(timings, "probes"):
        correct = frame["first_token_correct"].to_numpy(bool)
        scores, signals = _train_all(stored, correct, wanted, progress)
    kept = study.all_probes[~study.all_probes["probe"].isin(list(wanted))]
    if not kept.empty:
        scores = _in_order(pd.concat([kept, scores], ignore_index=True))
    layers, examples = study.layers, study.examples
    if signals:
        layers, examples = replace_signals(layers, examples, signals, config["bootstrap"], config["seed"])
    entries = {**manifest["probes"], **{name: settings.to_dict() for name, settings in wanted.items()}}
    entries = {name: entries[name] for name in sorted(entries, key=[*PROBES, *entries].index)}
    with folder.writing_tables({LAYERS: layers, EXAMPLES: examples, PROBE_TABLE: scores}) as digests:
        # The manifest goes first: a process that ends before the last table has its name leaves tables that differ
        # from it. Readers refuse them, and the tables can be written again with the settings in the manifest.
        folder.write_manifest(_with_seconds({**manifest, "probes": entries, "tables": digests}, timings))


def _with_seconds(manifest: dict[str, Any], timings: dict[str, float]) -> dict[str, Any]:
    return {**manifest, "timings": {**manifest["timings"], "probes": round(timings["probes"], 3)}}


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        timings[name] = timings.get(name, 0.0) + time.perf_counter() - started
