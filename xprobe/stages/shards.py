"""What a shard holds of a context group: written after the lens, read back for the phases. docs/run-folder.md."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xprobe.lenses.reading import FIELDS, AnswerReadout
from xprobe.phases.signals import example_signals
from xprobe.runs.folder import RunFolder
from xprobe.runs.manifest import Manifest
from xprobe.runs.serialization import Shard
from xprobe.timing import Stopwatch

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from xprobe.capture.plan import Wave
    from xprobe.qa.prompts import Prompt


def write_wave(
    folder: RunFolder,
    wave: Wave,
    prompts: Sequence[Prompt],
    wanted: Container[str],
    offsets: Tensor,
    values: AnswerReadout,
    rows: dict[str, Tensor],
    watch: Stopwatch,
    execution: str = "",
    kept: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes the groups of a wave whose keys are ``wanted``, one shard each.

    The other groups of the wave were computed only to give these the same bits.

    Parameters
    ----------
    prompts : sequence of Prompt
        Of the wave's requests, in their order.
    offsets : int64 Tensor [N + 1]
        Which of the P positions each example owns.
    values, rows
        As ``xprobe.stages.states.WaveReadout.wait`` gives them.
    watch : Stopwatch
        Gets the seconds of "write".
    execution : str
        Key of the stage's execution, for the journal.
    kept : callable (count), optional
        Called with the number of examples whose shards the run folder has now, also if writing others fails.
    """
    shards: list[Shard] = []
    start = 0
    for group in wave.groups:
        stop = start + len(group.requests)
        if group.key in wanted:
            own = offsets[start : stop + 1]
            first, last = own[[0, -1]].tolist()
            part = values.part(first, last)
            tensors: dict[str, Any] = {name: getattr(part, name) for name in FIELDS}
            tensors |= {"offsets": own - first, "targets": rows["targets"][first:last]}
            tensors |= {name: rows[name][:, start:stop].transpose(0, 1) for name in rows if name != "targets"}
            examples = [_describe(prompt) for prompt in prompts[start:stop]]
            shards.append(Shard(group.key, tensors, {"examples": examples}))
        start = stop
    if shards:
        with watch.timed("write"):
            folder.write_shards(
                shards, execution, lambda stored: kept(sum(len(shard.metadata["examples"]) for shard in stored))
            )


def read_signals(folder: RunFolder, manifest: Manifest) -> tuple[pd.DataFrame, dict[str, NDArray]]:
    """Example rows (a data frame) and signals [N, L + 1], in the order of the plan, from the shards alone.

    ``first_token_correct`` in the frame: whether the first answer token is on top at the last layer.

    Raises
    ------
    RunFolderError
        Names the shards that are not what this run wrote, or the entry of the manifest that does not fit them.
    """
    import pandas as pd

    folder.check_shards(manifest.groups)
    model = manifest.model

    rows: list[dict[str, Any]] = []
    signals: dict[str, list[NDArray]] = {}
    for key in manifest.groups:
        arrays, metadata = folder.read_shard(folder.shard_name(key), (*FIELDS, "offsets"))
        values = AnswerReadout(**{name: arrays[name] for name in FIELDS})
        folder.check_fit("model.n_blocks", model.n_blocks, arrays["rank"].shape[1] - 1)
        if (largest := int(arrays["rank"].max(initial=0))) > model.vocab_size:
            folder.check_fit("model.vocab_size", model.vocab_size, largest)
        correct = arrays["rank"][arrays["offsets"][:-1], -1] == 1
        for row, right in zip(metadata["examples"], correct.tolist(), strict=True):
            rows.append({**{k: v for k, v in row.items() if k != "spans"}, "first_token_correct": right})
        for name, table in example_signals(values, arrays["offsets"], model.vocab_size).items():
            signals.setdefault(name, []).append(table)
    return pd.DataFrame(rows), {name: np.concatenate(tables) for name, tables in signals.items()}


def _describe(prompt: Prompt) -> dict[str, Any]:
    """What a shard keeps of an example: enough to analyse it without data or model."""
    example = prompt.example
    return {
        "setting": example.setting,
        "language": example.language,
        "question_id": example.question_id,
        "paragraph": example.paragraph,
        "context_language": example.context_language,
        "prompt_tokens": prompt.length,
        "answer_tokens": len(prompt.targets),
        "spans": {name: list(span) for name, span in prompt.spans.items()},
    }
