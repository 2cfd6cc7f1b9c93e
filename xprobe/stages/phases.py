"""Stage "phases": from the shards to signals, retrieval onsets, S(l), and the tables of layers and examples.

shards -> signals of every example -> onsets -> layers.parquet (S(l) among them), examples.parquet, summaries
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xprobe.config import STATES
from xprobe.events import Stage
from xprobe.phases.encoding import paragraph_encoding
from xprobe.phases.segmentation import PHASE_DEFINITION
from xprobe.phases.tables import example_table, layer_table, summaries
from xprobe.runs.folder import EXAMPLES, LAYERS
from xprobe.runs.states import StoredStates
from xprobe.stages.run import Run
from xprobe.stages.shards import read_signals
from xprobe.timing import Stopwatch

NAME = "phases"
Signals = dict[str, NDArray[np.float64]]


def compute(run: Run) -> None:
    """Writes ``layers.parquet`` and ``examples.parquet``, and enters the stage in the manifest.

    Needs the stage "states", no model and no data.

    Raises
    ------
    RunFolderError
        Shards are not what this run wrote, do not fit the manifest, or the tables cannot be written.
    """
    study, watch = run.manifest.study, Stopwatch()
    run.notify(Stage("signals"))
    with watch.timed("signals"):
        frame, signals = read_signals(run.folder, run.manifest)
        if "encoding" in (study.signals or ()):
            signals |= encoding_signals(StoredStates.from_run(run.folder, frame, run.manifest))
    run.notify(Stage("phases and tables"))
    with watch.timed("phases"):
        examples = example_table(frame, signals, study.permutations, study.seed)
        layers = layer_table(examples, signals, study.bootstrap, study.seed)
        found = summaries(examples, signals, run.manifest.model.n_blocks, study.bootstrap, study.seed)
        with run.folder.writing_tables({LAYERS: layers, EXAMPLES: examples}) as digests:
            pass
    results = {
        "phase_definition": PHASE_DEFINITION,
        "settings": {setting: found[setting] for setting in study.settings if setting in found},
    }
    run.entry(NAME, watch, tables=digests, results=results)


def encoding_signals(stored: StoredStates) -> Signals:
    """``encoding`` and ``encoding_question``, each with _control, _selectivity, _top1 and _margin, [N, L + 1]."""
    shape = (len(stored.frame), stored.n_layers)
    signals: Signals = {}
    for state, name in STATES.items():
        for rows, layers, states in stored.paragraphs(state):
            part = stored.frame.iloc[rows]
            paragraph = paragraph_encoding(states, part["question_id"].to_numpy(), part["language"].to_numpy())
            values = {
                name: paragraph.encoding,
                f"{name}_control": paragraph.control,
                f"{name}_selectivity": paragraph.selectivity,
                f"{name}_top1": paragraph.top1,
                f"{name}_margin": paragraph.margin,
            }
            for key, value in values.items():
                signals.setdefault(key, np.full(shape, np.nan))[rows, layers.start : layers.stop] = value
    return signals
