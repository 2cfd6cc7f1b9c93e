"""Sweeps as tests write them, and the processes that compute them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {"languages": ["en", "de"], "limit": 4, "bootstrap": 20, "permutations": 20, "probes": []}


def write_toml(path: Path, models: list[dict[str, Any]], study: dict[str, Any] | None = None, **tables: Any) -> Path:
    """A sweep's file. ``tables``: its other entries; a dictionary becomes a table."""
    top = {name: value for name, value in tables.items() if not isinstance(value, dict)}
    parts = [_lines(top), "[study]", _lines(SMALL if study is None else study)]
    parts += [f"[{name}]\n{_lines(table)}" for name, table in tables.items() if isinstance(table, dict)]
    parts += [f"[[models]]\n{_lines(model)}" for model in models]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _lines(values: dict[str, Any]) -> str:
    """JSON's texts, numbers, lists, true and false are TOML's as well."""
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())


def process_of(folder: Path, name: str) -> tuple[int, int] | None:
    """Process id of the run of a model, and that of its parent; None if there is none."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"--only" in words and name.encode() in words and str(folder).encode() in words:
                return int(path.name), int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
    return None


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """What ``condition`` returns, as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found
