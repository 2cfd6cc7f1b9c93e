"""What a shard holds of a context group: written after the lens, read back for the phases. docs/run-folder.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xprobe.capture.readout import FIELDS, AnswerReadout
from xprobe.phases.signals import example_signals
from xprobe.store import RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from xprobe.capture.plan import Group
    from xprobe.capture.rows import Captured
    from xprobe.qa.prompts import Prompt


def write_group(folder: RunFolder, group: Group, rows: Captured, values: AnswerReadout, *, store_rows: bool) -> None:
    """Stores the lens values of a group, and with ``store_rows`` its hidden rows at prompt end and question."""
    tensors: dict[str, Any] = {name: getattr(values, name) for name in FIELDS}
    tensors |= {"offsets": rows.offsets, "targets": rows.targets}
    if store_rows:
        tensors["prompt_end"] = rows.prompt_ends.transpose(0, 1)
        tensors["question_mean"] = rows.questions.transpose(0, 1)
    folder.write_shard(group.key, tensors, {"examples": [_describe(prompt) for prompt in group.prompts]})


def read_signals(folder: RunFolder, manifest: dict[str, Any]) -> tuple[pd.DataFrame, dict[str, NDArray]]:
    """Example rows (a data frame) and signals [N, L + 1], in the order of the plan, from the shards alone.

    ``first_token_correct`` in the frame: whether the first answer token is on top at the last layer.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    signals: dict[str, list[NDArray]] = {}
    for key in manifest["groups"]:
        arrays, metadata = folder.read_shard(folder.shard_name(key), (*FIELDS, "offsets"))
        values = AnswerReadout(**{name: arrays[name] for name in FIELDS})
        correct = arrays["rank"][arrays["offsets"][:-1], -1] == 1
        for row, right in zip(metadata["examples"], correct.tolist(), strict=True):
            rows.append({**{k: v for k, v in row.items() if k != "spans"}, "first_token_correct": right})
        for name, table in example_signals(values, arrays["offsets"], manifest["model"]["vocab_size"]).items():
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
