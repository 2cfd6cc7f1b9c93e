"""An opened run: what every stage is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from xprobe.config import Execution
from xprobe.errors import UsageError, XprobeError
from xprobe.events import CallerNotify, Note
from xprobe.runs.folder import RunFolder
from xprobe.runs.identity import execution_key
from xprobe.runs.manifest import ExecutionEntry, Manifest, StageEntry
from xprobe.runs.provenance import environment
from xprobe.stages import STAGES
from xprobe.timing import Stopwatch


@dataclass
class Run:
    """A run folder that this process has locked, and how its stages are computed from now on.

    A stage reads the folder, writes its tables, and enters itself in ``manifest.stages``. The caller writes the
    manifest when all is done; a stage writes it earlier where it needs it on the disk.
    """

    folder: RunFolder
    manifest: Manifest
    execution: Execution
    notify: CallerNotify

    def entry(self, stage: str, watch: Stopwatch, device: str = "cpu", **parts: Any) -> StageEntry:
        """Enters a stage in the manifest, as computed by this execution.

        Raises
        ------
        UsageError
            ``xprobe.stages.STAGES`` does not know the stage, or the run lacks one that it needs.
        """
        if stage not in STAGES:
            raise UsageError(
                f"unknown stage {stage!r}: enter it in xprobe.stages.STAGES, with the stages that it needs"
            )
        missing = [name for name in STAGES[stage][0] if name not in self.manifest.stages]
        if missing:
            raise UsageError(f"the stage {stage!r} needs the stage {missing[0]!r}, which {self.folder.path} lacks")
        owners = {
            table: name for name, entry in self.manifest.stages.items() for table in entry.tables if name != stage
        }
        taken = [table for table in parts.get("tables", {}) if table in owners]
        if taken:
            raise UsageError(
                f"the stage {stage!r} cannot enter {taken[0]}: it is a table of the stage {owners[taken[0]]!r}"
            )
        execution = self.execution_entry(device)
        seconds = {name: round(value, 3) for name, value in watch.seconds.items()}
        before = self.manifest.stages.get(stage)
        if before is not None and parts.get("executions") is before.executions:  # only its tables are written again
            seconds = {**before.seconds, **seconds}
        self.manifest.stages[stage] = StageEntry(**{"executions": [execution], "seconds": seconds, **parts})
        return self.manifest.stages[stage]

    def forget(self, stage: str, reason: str) -> None:
        """Removes a stage's tables and its entry in the manifest, and says so."""
        for table in self.manifest.stages.pop(stage).tables:
            (self.folder.path / table).unlink(missing_ok=True)
        self.notify(Note(f"the stage {stage!r} {reason}: compute it again", important=True))

    def execution_entry(self, device: str = "cpu") -> ExecutionEntry:
        """How this process computes a stage."""
        versions = environment()
        key = execution_key(self.execution.to_dict(), device, versions)
        return ExecutionEntry(self.execution, device, versions, key)

    @contextmanager
    def failing(self, kept: Callable[[], str]) -> Iterator[None]:
        """Turns what the machine or a model's own code raises into an error that says what is kept."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if error is self.notify.error:
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise XprobeError(
                f"the run failed: {reason}. {kept()}; if memory ran out, resume (resume=True, --resume) with a smaller "
                "batch_tokens (--batch-tokens)"
            ) from error
