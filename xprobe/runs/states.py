"""Hidden states of a stored run, read one paragraph or a few layers at a time, never all at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.errors import UsageError
from xprobe.runs.folder import RunFolder
from xprobe.runs.manifest import Manifest

LAYER_BYTES = 1 << 30  # of states held at a time when layers are read


@dataclass(frozen=True, eq=False)
class StoredStates:
    """States of the N examples of a run, in the order of ``frame``.

    Parameters
    ----------
    folder : RunFolder
    frame : DataFrame
        One row per example, shard after shard (``xprobe.stages.shards.read_signals`` gives them).
    n_layers, width : int
        L + 1 and D.
    """

    folder: RunFolder
    frame: pd.DataFrame
    n_layers: int
    width: int

    @classmethod
    def from_run(cls, folder: RunFolder, frame: pd.DataFrame, manifest: Manifest) -> StoredStates:
        """
        Raises
        ------
        UsageError
            The run kept no states (``store_rows=False``).
        RunFolderError
            The shards cannot be read, or do not fit the manifest.
        """
        if not manifest.study.store_rows:
            raise UsageError(f"{folder.path} holds no hidden states: run it again without store_rows=False (--no-rows)")
        n_layers, width = manifest.model.n_blocks + 1, manifest.model.width
        for key in manifest.groups[:1]:
            layers_there, width_there = folder.row_shape(folder.shard_name(key), "prompt_end")
            folder.check_fit("model.n_blocks", n_layers - 1, layers_there - 1)
            folder.check_fit("model.width", width, width_there)
        return cls(folder, frame, n_layers, width)

    @property
    def shards(self) -> list[tuple[str, NDArray[np.int64]]]:
        """Every shard's file name, and the rows of ``frame`` that it holds."""
        keys = self.frame["setting"] + "/" + self.frame["context_language"] + "/" + self.frame["paragraph"]
        groups = keys.groupby(keys, sort=False).indices.items()
        return [(self.folder.shard_name(str(key)), np.asarray(rows)) for key, rows in groups]

    def paragraphs(
        self, state: str, limit: int = LAYER_BYTES
    ) -> Iterator[tuple[NDArray[np.int64], range, NDArray[np.float32]]]:
        """Rows, layers and states [n, K, D] of the examples on each paragraph, one setting after the other.

        All layers at once if ``limit`` bytes hold them; otherwise the same rows come several times, with a few layers.
        """
        by_paragraph: dict[tuple[str, str], list[tuple[str, NDArray[np.int64]]]] = {}
        for name, rows in self.shards:
            first = self.frame.iloc[rows[0]]
            by_paragraph.setdefault((first["setting"], first["paragraph"]), []).append((name, rows))
        for shards in by_paragraph.values():
            rows = np.concatenate([rows for _, rows in shards])
            step = max(1, min(self.n_layers, limit // max(1, len(rows) * self.width * 4)))
            for start in range(0, self.n_layers, step):
                layers = range(start, min(start + step, self.n_layers))
                states = [self.folder.read_layers(name, state, layers) for name, _ in shards]
                yield rows, layers, np.concatenate(states)

    def layers(
        self, state: str, rows: NDArray[np.int64], limit: int = LAYER_BYTES
    ) -> Iterator[tuple[range, NDArray[np.float32]]]:
        """States [K, n, D] of the examples in ``rows``, of as many layers at a time as ``limit`` bytes hold.

        Every number is read once; the array is overwritten by the next.
        """
        step = max(1, min(self.n_layers, limit // max(1, len(rows) * self.width * 4)))
        position = np.full(len(self.frame), -1)  # in ``rows``, of each row of the table
        position[rows] = np.arange(len(rows))
        shards = [(name, position[own]) for name, own in self.shards if (position[own] >= 0).any()]
        buffer = np.empty((step, len(rows), self.width), np.float32)
        for start in range(0, self.n_layers, step):
            layers = range(start, min(start + step, self.n_layers))
            for name, positions in shards:
                wanted = positions >= 0
                part = self.folder.read_layers(name, state, layers)
                buffer[: len(layers), positions[wanted]] = part.transpose(1, 0, 2)[:, wanted]
            yield layers, buffer[: len(layers)]
