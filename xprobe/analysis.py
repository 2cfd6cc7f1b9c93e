"""From the shards of a run to its tables: signals, probes, phases. Needs the run folder, no model and no data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xprobe.config import PROBES, StudyConfig
from xprobe.errors import RunFolderError, UsageError
from xprobe.lock import FolderLock
from xprobe.phases.encoding import paragraph_encoding
from xprobe.phases.segmentation import PHASE_DEFINITION
from xprobe.report.tables import example_table, layer_table, replace_signals, summaries
from xprobe.results import Study, load_study
from xprobe.shards import read_signals
from xprobe.states import STATES, StoredStates
from xprobe.store import EXAMPLES, LAYERS, PROBE_TABLE, RunFolder

if TYPE_CHECKING:
    from xprobe.probing import ProbeSettings

Progress = Callable[[str, int, int], None]
Signals = dict[str, NDArray[np.float64]]

STAGE = "probes"  # as progress is told


def analyse(
    config: StudyConfig, manifest: dict[str, Any], folder: RunFolder, timings: dict[str, float], progress: Progress
) -> dict[str, Any]:
    """Writes the tables of a run whose shards are complete; gives its manifest with the results.

    ``timings`` gets the seconds of each stage added.
    """
    progress("signals", 0, 0)
    with _timed(timings, "signals"):
        frame, signals = read_signals(folder, manifest)
        if "encoding" in (config.signals or ()):
            signals |= encoding_signals(StoredStates.of(folder, frame, manifest))
    entries: dict[str, Any] = {}
    if config.probes:
        from xprobe.probing import ProbeSettings, train

        settings = ProbeSettings(seed=config.seed)
        with _timed(timings, "probes"):
            stored = StoredStates.of(folder, frame, manifest)
            correct = frame["first_token_correct"].to_numpy(bool)
            scores, probed = train(
                stored, correct, config.probes, settings, lambda done, total: progress(STAGE, done, total)
            )
        signals |= probed
        folder.write_table(PROBE_TABLE, scores)
        entries = {name: settings.to_dict() for name in config.probes}
    progress("phases and tables", 0, 0)
    with _timed(timings, "phases"):
        examples = example_table(frame, signals, config.permutations, config.seed)
        layers = layer_table(examples, signals, config.bootstrap, config.seed)
        results = summaries(examples, signals, manifest["model"]["n_blocks"], config.bootstrap, config.seed)
        folder.write_table(EXAMPLES, examples)
        folder.write_table(LAYERS, layers)
    return {
        **manifest,
        "phase_definition": PHASE_DEFINITION,
        "probes": entries,
        "results": {s: results[s] for s in config.settings if s in results},
    }


def encoding_signals(stored: StoredStates) -> Signals:
    """``encoding`` and ``encoding_question``, each with _control, _selectivity, _top1 and _margin, [N, L + 1]."""
    shape = (len(stored.frame), stored.n_layers)
    signals: Signals = {}
    for state, name in STATES.items():
        for rows, states in stored.paragraphs(state):
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
                signals.setdefault(key, np.full(shape, np.nan))[rows] = value
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
        The run folder; its ``probes.parquet``, and the probed signals in its other tables, are replaced.
    probes : tuple of str
        Of ``alignment``, ``language``, ``correctness``.
    settings : ProbeSettings, optional
        With the run's own seed if None.

    Raises
    ------
    UsageError
        Not a run folder, no states in it, an unknown probe, or another process is at work there.
    RunFolderError
        The run is not finished, or its files cannot be read.
    """
    import pandas as pd

    from xprobe.models.loading import pick_device
    from xprobe.probing import ProbeSettings, train

    tell = progress or (lambda stage, done, total: None)
    unknown = [name for name in probes if name not in PROBES]
    if unknown or not probes:
        what = f"unknown probe {unknown[0]!r}" if unknown else "no probe given"
        raise UsageError(f"{what}; available: {', '.join(PROBES)}")
    load_study(path)  # a finished run, or it is said what is wrong before anything is locked
    folder = RunFolder(Path(path))
    with FolderLock(folder.path) as lock:
        if lock.remark:
            tell(lock.remark, 0, 0)
        study = load_study(path)
        manifest = study.manifest
        settings = settings or ProbeSettings(seed=manifest["config"]["seed"])
        if settings.device != "cpu":
            pick_device(settings.device)
        frame, _ = read_signals(folder, manifest)
        stored = StoredStates.of(folder, frame, manifest)
        if len(frame) != len(study.examples):
            raise RunFolderError(f"{folder.path / EXAMPLES} does not fit the shards: write it again with --resume")
        correct = frame["first_token_correct"].to_numpy(bool)
        timings: dict[str, float] = {}
        with _timed(timings, "probes"):
            scores, signals = train(stored, correct, probes, settings, lambda done, total: tell(STAGE, done, total))
        kept = study.all_probes[~study.all_probes["probe"].isin(probes)]
        scores = scores if kept.empty else pd.concat([kept, scores], ignore_index=True)
        config = manifest["config"]
        layers, examples = replace_signals(study.layers, study.examples, signals, config["bootstrap"], config["seed"])
        others = {name: entry for name, entry in manifest.get("probes", {}).items() if name not in probes}
        # first, so that a process that ends between two files leaves no settings beside scores of others
        folder.write_manifest({**manifest, "probes": others})
        folder.write_table(PROBE_TABLE, scores)
        folder.write_table(LAYERS, layers)
        folder.write_table(EXAMPLES, examples)
        entries = {**others, **{name: settings.to_dict() for name in probes}}
        seconds = {**manifest["timings"], "probes": round(timings["probes"], 3)}
        folder.write_manifest({**manifest, "probes": entries, "timings": seconds})
    return load_study(path)


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        timings[name] = timings.get(name, 0.0) + time.perf_counter() - started
