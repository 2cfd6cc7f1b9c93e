"""Each execution of a run keeps its strategy and its warnings, also if it was stopped or failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.families import save_tiny_model
from support.runs import raw_manifest

import xprobe
from xprobe.events import Event, Step
from xprobe.runs.folder import SHARDS

OPTIONS: dict[str, Any] = {"languages": ("en", "de"), "limit": 6, "bootstrap": 20, "permutations": 20, "probes": ()}


class Stop(Exception):
    pass


def stop(event: Event) -> None:
    if isinstance(event, Step) and event.done >= 3:
        raise Stop


def test_a_resumed_run_keeps_strategy_and_warnings_of_the_execution_that_was_stopped(tmp_path: Path) -> None:
    """GPT-J does not take the tree: run whole it falls back to another strategy, and warns."""
    model, out = save_tiny_model(tmp_path / "model", "gptj"), tmp_path / "run"
    with pytest.raises(Stop):
        xprobe.run(model, out=out, progress=stop, batch_tokens=100, **OPTIONS)
    stage = raw_manifest(out)["stages"]["states"]
    (begun,) = stage["executions"]
    assert begun["strategy"] == stage["results"]["plan"]["strategy"] != "tree"
    assert any("cannot be run with" in warning for warning in begun["warnings"])
    assert stage["warnings"] == begun["warnings"]

    study = xprobe.run(model, out=out, resume=True, batch_tokens=200, stream=True, **OPTIONS)
    stage = study.manifest.stages["states"]
    first, second = stage.executions
    assert (first.strategy, first.warnings) == (begun["strategy"], begun["warnings"])
    assert second.strategy == stage.results["plan"]["strategy"]
    assert first.shards > 0 < second.shards
    assert stage.warnings == list(dict.fromkeys([*first.warnings, *second.warnings]))
    assert study.manifest.warnings[: len(stage.warnings)] == stage.warnings


def test_a_run_that_returns_to_an_earlier_execution_has_one_entry_for_it(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    study = xprobe.run(tiny, out=out, batch_tokens=100, **OPTIONS)
    first, second, *rest = sorted((out / SHARDS).iterdir())
    for lost, tokens in ((first, 200), (second, 100)):
        lost.unlink()
        study = xprobe.run(tiny, out=out, resume=True, batch_tokens=tokens, **OPTIONS)
    executions = study.manifest.stages["states"].executions
    assert [(one.options.batch_tokens, one.shards) for one in executions] == [(200, 1), (100, 1 + len(rest))]
