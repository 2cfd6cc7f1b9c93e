"""Stage "probes": trains probes on the stored hidden states, and adds their signals to the tables.

shards -> states of one layer -> folds of whole paragraphs -> probes.parquet, probed signals in the other tables
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.config import BUILT_IN_PROBES, PROBE_COLUMNS, PROBES, SETTINGS, STATES, check_probes
from xprobe.errors import RunFolderError
from xprobe.events import Note, Step
from xprobe.models.loading import pick_device
from xprobe.phases.tables import replace_signals
from xprobe.probes.registry import definition_of, get_probe
from xprobe.probes.settings import ProbeSettings
from xprobe.probes.training import train
from xprobe.results import read_tables
from xprobe.runs.folder import EXAMPLES, LAYERS, MANIFEST, PROBE_TABLE
from xprobe.runs.states import StoredStates
from xprobe.stages import phases
from xprobe.stages.run import Run
from xprobe.stages.shards import read_signals
from xprobe.timing import Stopwatch

NAME = "probes"
STEP = "probes"  # of the events that count layers
Signals = dict[str, NDArray[np.float64]]


def compute(run: Run, wanted: dict[str, ProbeSettings]) -> None:
    """Trains the probes ``wanted`` again and keeps the scores of the others.

    Needs the stages "states" and "phases". Writes ``probes.parquet``, and the probed signals in the other tables. If
    ``probes.parquet`` is lost, so are the scores of the others: they leave the manifest, and a warning names them.

    Raises
    ------
    UsageError
        No states are stored, the device cannot be used, or the labels of a probe are not one for each example.
    ProbeError
        A function of a probe fails. The folder stays as it was.
    RunFolderError
        Shards are not what this run wrote, or the tables do not fit them.
    """
    study, watch = run.manifest.study, Stopwatch()
    layers, examples = read_tables(run.folder, run.manifest, (LAYERS, EXAMPLES))
    frame, _ = read_signals(run.folder, run.manifest)
    stored = StoredStates.from_run(run.folder, frame, run.manifest)
    keys = ["setting", "language", "question_id", "paragraph"]
    if not frame[keys].equals(examples[keys].astype(frame[keys].dtypes)):
        raise RunFolderError(
            f"{run.folder.path / MANIFEST}: entry groups does not fit {EXAMPLES}; {run.folder.resume_command} writes "
            "it again"
        )
    with watch.timed("probes"):
        scores, signals = _train_all(run, stored, wanted)
    others = {name: entry for name, entry in recorded(run).items() if name not in wanted}
    kept = _read_scores(run, list(others))
    warnings = []
    if kept is None:
        warnings = [_lost_warning(run, name, entry) for name, entry in others.items()]
        others = {}
    elif others:
        scores = _in_order(pd.concat([kept, scores], ignore_index=True) if len(scores) else kept)
    if signals:
        layers, examples = replace_signals(layers, examples, signals, study.bootstrap, study.seed)
    entries = {name: _entry(name, settings, stored.frame) for name, settings in wanted.items()}
    warnings += [
        f"probe {name!r} is not the one of this name that the run had before: it has another {what}"
        for name, entry in entries.items()
        if (what := _changed(recorded(run).get(name, {}), entry))
    ]
    trained = {**others, **entries}
    trained = {name: trained[name] for name in sorted(trained, key=[*PROBES, *trained].index)}
    with run.folder.writing_tables({LAYERS: layers, EXAMPLES: examples, PROBE_TABLE: scores}) as digests:
        # The manifest goes first: a process that ends before the last table has its name leaves tables that differ
        # from it. Readers refuse them, and the tables can be written again with the settings in the manifest.
        run.manifest.stages[phases.NAME].tables |= {LAYERS: digests[LAYERS], EXAMPLES: digests[EXAMPLES]}
        digest = {PROBE_TABLE: digests[PROBE_TABLE]}
        run.entry(NAME, watch, tables=digest, results={"trained": trained}, warnings=warnings)
        run.folder.write_manifest(run.manifest)
    for warning in warnings:
        run.notify(Note(warning))


def recorded(run: Run) -> dict[str, dict[str, Any]]:
    """The settings of every probe that the manifest names."""
    stage = run.manifest.stages.get(NAME)
    return {} if stage is None else stage.results["trained"]


def _entry(name: str, settings: ProbeSettings, examples: pd.DataFrame) -> dict[str, Any]:
    """What the manifest keeps of a trained probe: its settings, and what it was unless it is built in."""
    if name in BUILT_IN_PROBES:
        return settings.to_dict()
    return {**settings.to_dict(), "definition": definition_of(get_probe(name), settings, examples)}


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two definitions of a probe, apart from its settings; empty if nothing does."""
    if "definition" not in before or "definition" not in now:
        return ""
    names = {"estimator": "estimator", "metric": "metric", "labels_sha256": "labels"}
    same_settings = {**before, "definition": None} == {**now, "definition": None}
    differing = [name for name in names if before["definition"].get(name) != now["definition"][name]]
    return " and ".join(names[name] for name in differing if name != "estimator" or same_settings)


def check_registered(run: Run) -> None:
    """Checks that the probes of the run's configuration can be trained; those that were trained before need not be.

    Raises
    ------
    UsageError
        Names the first probe that is neither built in nor registered.
    """
    check_probes(name for name in run.manifest.study.probes or () if name not in recorded(run))


def settings_of(run: Run) -> dict[str, ProbeSettings]:
    """The settings of all probes of the run that are known in this process.

    These are the probes of its configuration, and those that the manifest names. The manifest's settings come first.
    """
    study, before = run.manifest.study, recorded(run)
    known = [field.name for field in fields(ProbeSettings)]
    wanted = {name: ProbeSettings(seed=study.seed) for name in study.probes or ()}
    for name, entry in before.items():
        wanted[name] = ProbeSettings(**{key: value for key, value in entry.items() if key in known})
    return {name: replace(wanted[name], jobs=run.execution.jobs) for name in PROBES if name in wanted}


def _read_scores(run: Run, names: list[str]) -> pd.DataFrame | None:
    """The rows of other probes in the run's table; None if the table is lost."""
    if not names:
        return pd.DataFrame(columns=list(PROBE_COLUMNS))
    try:
        (table,) = read_tables(run.folder, run.manifest, (PROBE_TABLE,))
    except RunFolderError:
        return None
    return table[table["probe"].isin(names)]


def _lost_warning(run: Run, name: str, entry: dict[str, Any]) -> str:
    """What to do about a probe whose scores are lost and which cannot be trained in this process."""
    options = ""
    entry = {key: value for key, value in entry.items() if key != "definition"}
    if entry != ProbeSettings(seed=run.manifest.study.seed).to_dict():  # train_probes would use these
        usual = ProbeSettings().to_dict()
        changed = (f"{key}={value!r}" for key, value in entry.items() if key in usual and usual[key] != value)
        options = f", xprobe.probes.ProbeSettings({', '.join(changed)})"
    return (
        f"{PROBE_TABLE} was lost, and probe {name!r} is not registered here: its rows could not be written again. "
        "Register it as the script did that trained it (xprobe.probes.register), then call "
        f"xprobe.study.train_probes({str(run.folder.path)!r}, [{name!r}]{options})"
    )


def _train_all(run: Run, stored: StoredStates, wanted: dict[str, ProbeSettings]) -> tuple[pd.DataFrame, Signals]:
    """Scores and signals of all probes ``wanted``; those with the same settings are trained together."""
    if not wanted:
        return pd.DataFrame(columns=list(PROBE_COLUMNS)), {}
    tables: list[pd.DataFrame] = []
    signals: Signals = {}
    for settings in dict.fromkeys(wanted.values()):
        if settings.device != "cpu":
            pick_device(settings.device)
        names = tuple(name for name, own in wanted.items() if own == settings)
        scores, probed = train(stored, names, settings, lambda done, total: run.notify(Step(STEP, done, total)))
        tables.append(scores)
        signals |= probed
    return _in_order(pd.concat(tables, ignore_index=True)), signals


def _in_order(scores: pd.DataFrame) -> pd.DataFrame:
    """The one order of the probe table, whichever probe was trained first: setting, state, layer, probe."""
    settings = scores["setting"].map({name: rank for rank, name in enumerate(SETTINGS)})
    states = scores["state"].map({name: rank for rank, name in enumerate(STATES)})
    names = dict.fromkeys([*PROBES, *scores["probe"]])  # a table may hold probes that are not registered here
    probes = scores["probe"].map({name: rank for rank, name in enumerate(names)})
    return scores.iloc[np.lexsort((probes, scores["layer"], states, settings))].reset_index(drop=True)
