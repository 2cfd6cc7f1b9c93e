"""Runs in forks of a process that has everything imported: see server.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Forks:
    """Starts runs of one model and tells how they ended. ``options``: what all of them are called with."""

    def __init__(self, model: Path) -> None:
        self.options = {"model": str(model), "setting": ["en-x", "x-x"], "languages": ["en", "de"], "limit": 6}
        self.options |= {"bootstrap": 20, "permutations": 20, "probes": ["language"]}
        self.options |= {"batch_tokens": 1400}  # waves of one group and of several
        self._process = subprocess.Popen(
            [sys.executable, "-m", "forks.server", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
        )

    def start(self, out: Path, **how: Any) -> int:
        """Process id of a new fork that runs into ``out``, resuming what is there."""
        return self._ask({"run": {**self.options, "resume": True}, "out": str(out), **how})["pid"]

    def start_command(self, arguments: list[str], say: Path, **how: Any) -> int:
        """Process id of a new fork that is the command line; ``say`` gets what it prints."""
        return self._ask({"cli": arguments, "say": str(say), **how})["pid"]

    def wait(self, pid: int) -> dict[str, Any]:
        return self._ask({"wait": pid})

    def run(self, out: Path, **how: Any) -> dict[str, Any]:
        return self.wait(self.start(out, **how))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()
