"""Hidden states written as the shards of a run, without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from xprobe.runs.folder import RunFolder
from xprobe.runs.manifest import Manifest
from xprobe.runs.states import StoredStates


def write_states(path: Path, frame: pd.DataFrame, states: np.ndarray) -> StoredStates:
    """Shards that hold ``states`` [N, K, D] as both states of the examples in ``frame``, group by group."""
    folder = RunFolder.create(path / "run", resume=False)
    folder.write_manifest(Manifest())
    keys = frame["setting"] + "/" + frame["context_language"] + "/" + frame["paragraph"]
    for key, rows in keys.groupby(keys, sort=False).indices.items():
        part = np.ascontiguousarray(states[rows])
        folder.write_shard(str(key), {"prompt_end": part, "question_mean": part.copy()}, {"examples": []})
    return StoredStates(folder, frame, states.shape[1], states.shape[2])
