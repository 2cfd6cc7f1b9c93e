"""The stages of a run. Each one reads the run folder, writes its tables, and enters itself in the manifest.

A stage is a module with a ``NAME`` and a function ``compute(run, ...)``. A later stage needs nothing but the folder:
it can be computed alone, later, and again. ``xprobe.study`` calls them in order.
"""

from __future__ import annotations

# name -> the stages that it needs, and what it adds. A stage that is not here cannot enter itself in a manifest
STAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "states": ((), "forward passes and the lens: shards"),
    "phases": (("states",), "signals, retrieval onsets, stability: layers.parquet, examples.parquet"),
    "probes": (("states", "phases"), "probes on hidden states: probes.parquet"),
    "answers": (("states", "phases"), "generated answers, F1, error types: answers.jsonl, answers.parquet"),
    "oracle": (("states", "answers"), "the words that an answer depends on: oracle.jsonl, oracle.parquet"),
    "relevance": (("states", "phases"), "relevance of tokens by layer: relevance.jsonl, relevance.parquet"),
    "patching": (("states", "phases"), "patched states, causal boundaries: patching.jsonl, patching.parquet"),
    "lenses": (("states", "phases"), "phases under several lenses: lenses.jsonl, lenses.parquet"),
}
