"""One model of a sweep, computed in this process: every engine starts this, in a process of its own."""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from xprobe import evaluation
from xprobe.errors import UsageError, XprobeError
from xprobe.events import Event, Notify, Stage, Step
from xprobe.study import run_config
from xprobe.sweeps.folder import STATES, Status, SweepFolder
from xprobe.sweeps.plan import SweepModel

SECONDS_BETWEEN = 0.5  # two writings of the status file
COMPUTE: dict[str, Callable[..., Any]] = {
    "answers": evaluation.evaluate, "oracle": evaluation.oracle, "relevance": evaluation.attribute,
    "patching": evaluation.patch, "lenses": evaluation.read_lenses,
}  # fmt: skip


def compute_model(folder: SweepFolder, name: str, progress: Notify) -> Status:
    """Computes what the run folder of a model lacks.

    A later stage that fails does not stop those after it. Errors stand in the status that is returned and in the
    status file.

    Parameters
    ----------
    folder : SweepFolder
    name : str
        Of the model.
    progress : callable (event)
        As for ``xprobe.run``. What it raises ends the run: its status is ``stopped``.
    """
    model, path = folder.plan[name], folder.run(name)
    news = _News(folder, replace(folder.status(name), state="running", errors={}, host=socket.gethostname()), progress)
    trust = {key: True for key in ("trust_remote_code", "allow_pickle") if getattr(model.execution, key)}
    tried: set[str] = set()
    try:
        # anew after each stage: other answers remove the oracle
        while left := [stage for stage in folder.left(name) if stage not in tried]:
            stage = left[0]
            news.begin(stage)
            try:
                if not tried:
                    _limit_memory(model)
            except Exception as error:
                news.failed(stage, _in_words(error, model.resources.memory))
                break
            tried.add(stage)
            try:
                if stage == STATES:
                    run_config(model.study, model.execution, out=path, resume=True, progress=news)
                else:
                    settings = folder.plan.settings_of(stage)
                    # a run that was streamed gets stages from a machine that holds the model
                    COMPUTE[stage](path, settings, progress=news, stream=model.execution.stream, **trust)
            except Exception as error:
                news.failed(stage, _in_words(error, model.resources.memory))
                if stage == STATES or _memory_ran_out(error):
                    break
    except BaseException:
        news.end("stopped")
        raise
    news.end("failed" if news.status.errors else "done")
    return news.status


def _limit_memory(model: SweepModel) -> None:
    """Makes allocations fail that would take this process beyond the memory of a model.

    Only Linux counts them. On a machine with a GPU nothing is limited: its driver reserves more than it uses.

    Raises
    ------
    UsageError
        The libraries alone take more.
    """
    memory, status = model.resources.memory, Path("/proc/self/status")
    if memory is None or not status.exists():
        return
    import resource

    for library in ("torch", "transformers", "pandas", "sklearn"):
        import_module(library)  # what they reserve is more than they take, and does not count
    import torch

    if torch.cuda.is_available():
        return
    held, reserved = (int(found[1]) * 1024 for name in ("VmRSS", "VmData")
                      if (found := re.search(rf"{name}:\s+(\d+) kB", status.read_text())))  # fmt: skip
    if memory <= held:
        raise UsageError(f"memory {memory:,} is less than the {held:,} bytes that the libraries take: raise it")
    limit = memory - held + reserved
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most == resource.RLIM_INFINITY or limit < most:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class _News:
    """A ``progress`` that writes the status file, and passes the events on."""

    def __init__(self, folder: SweepFolder, status: Status, progress: Notify) -> None:
        self.status = status
        self._folder, self._progress = folder, progress
        self._started, self._written = time.monotonic(), float("-inf")

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step):
            self._set(stage=event.stage, done=event.done, total=event.total)
        elif isinstance(event, Stage):
            self._set(stage=event.name, done=0, total=0)
        self._progress(event)

    def begin(self, stage: str) -> None:
        self._set(stage=stage, done=0, total=0, at_once=True)

    def failed(self, stage: str, words: str) -> None:
        self._set(errors={**self.status.errors, stage: words}, at_once=True)

    def end(self, state: str) -> None:
        self._set(state=state, at_once=True)

    def _set(self, *, at_once: bool = False, **changes: Any) -> None:
        now = time.monotonic()
        self.status = replace(self.status, seconds=round(now - self._started, 1), **changes)
        if at_once or now - self._written >= SECONDS_BETWEEN:
            self._written = now
            self._folder.set_status(self.status)


def _in_words(error: Exception, limit: int | None) -> str:
    if isinstance(error, XprobeError) and not _memory_ran_out(error):
        return str(error)
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if not _memory_ran_out(error):
        return f"unexpected {text}"
    if limit is None:
        return f"memory ran out ({text}): use a machine with more, fewer runs at a time, or stream = true"
    return f"memory ran out under the limit of {limit:,} bytes ({text}): raise memory, or set stream = true"


def _memory_ran_out(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, means so; also one of a library that could not be mapped."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        if "torch" in sys.modules:  # memory may have run out while it was imported
            from xprobe.capture.memory import is_out_of_memory

            if is_out_of_memory(error):
                return True
        error = error.__cause__
    return False
