"""Logs a run to an experiment tracker: trackio or Weights & Biases."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.arguments import check_callable
from xprobe.errors import UsageError
from xprobe.events import Begun, Event, Finished, Note, Notify, Stage, Step
from xprobe.report.places import without_folders
from xprobe.results import load_study

if TYPE_CHECKING:
    from xprobe.results import Study

TRACKERS = {"trackio": "trackio, on this machine", "wandb": "Weights & Biases"}
PROJECT = "xprobe"
SECONDS_BETWEEN = 5.0  # two steps of a stage that are logged


class Tracker:
    """A ``progress`` that logs what a run reports, and its figures when it is finished.

    Logged are the configuration, seconds and rate of each stage, and at the end ``figures``. Absolute paths are cut to
    their last part. If the tracker fails, the run goes on without it, and one note says so.

    Parameters
    ----------
    to : str
        ``trackio`` or ``wandb``, or with the name of a project ``trackio:PROJECT``. The project is ``xprobe`` by
        default. How the tracker itself works is set as it wants it (``WANDB_MODE=offline``, ``TRACKIO_SPACE_ID``).
    then : callable (event), optional
        Gets each event as well, and the note. Without it the note is a Python warning.

    Raises
    ------
    UsageError
        An unknown tracker, or its package is not installed.

    Examples
    --------
    >>> import xprobe
    >>> tracker = xprobe.Tracker("trackio:phases", then=print)      # doctest: +SKIP
    >>> study = xprobe.run(limit=4, progress=tracker)               # doctest: +SKIP
    >>> study.evaluate(progress=tracker)                            # doctest: +SKIP
    >>> xprobe.Tracker("mlflow")
    Traceback (most recent call last):
    xprobe.errors.UsageError: unknown tracker 'mlflow'; known: trackio, wandb, each also with :PROJECT
    """

    def __init__(
        self, to: str = "trackio", then: Notify | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        name, _, project = to.partition(":") if isinstance(to, str) else ("", "", "")
        if name not in TRACKERS:
            raise UsageError(f"unknown tracker {to!r}; known: {', '.join(TRACKERS)}, each also with :PROJECT")
        check_callable("then", then)
        self._name, self._project, self._then, self._clock = name, project or PROJECT, then, clock
        try:
            with redirect_stdout(sys.stderr):  # stdout belongs to results
                self._package = import_module(name)
        except ImportError as error:
            raise UsageError(f"tracking with {name} needs its package: pip install 'xprobe[tracking]'") from error
        self._open = self._failed = False
        self._began = self._stage_began = self._logged = 0.0
        self._stage, self._done_before = "", 0

    def __call__(self, event: Event) -> None:
        """Logs an event, and hands it on."""
        with self._guarded():
            self._log_event(event)
        if self._then is None:
            return
        try:
            self._then(event)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the run in the tracker; a run that is finished is ended already."""
        with self._guarded():
            if self._open:
                self._open = False
                self._package.finish()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Nothing if the tracker has failed before. A failure here is the last."""
        if self._failed:
            yield
            return
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:
            self._failed = True
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            text = f"{self._name} failed, and the run goes on without it: {reason}"
            if self._then is None:
                warnings.warn(text, stacklevel=4)
            else:
                self._then(Note(text, important=True))

    def _log_event(self, event: Event) -> None:
        if self._failed:
            return
        if isinstance(event, Begun):
            self._begin(event)
        elif not self._open:
            return
        elif isinstance(event, Stage):
            self._log({"stage": event.name})
        elif isinstance(event, Step):
            self._log_step(event)
        elif isinstance(event, Finished):
            self._log({**figures(load_study(event.folder)), "seconds": self._clock() - self._began})
            self._open = False
            self._package.finish()

    def _begin(self, event: Begun) -> None:
        from xprobe import __version__

        if self._open:
            self._package.finish()  # of a run that was stopped
        name = Path(event.folder).resolve().name
        config = {"xprobe": __version__, **without_folders(event.config)}
        self._package.init(project=self._project, name=name, config=config)
        self._open, self._stage, self._began = True, "", self._clock()

    def _log_step(self, event: Step) -> None:
        now = self._clock()
        if event.stage != self._stage:
            self._stage, self._stage_began, self._done_before = event.stage, now, event.done
            self._logged = now
            return
        if now - self._logged < SECONDS_BETWEEN and event.done < event.total:
            return
        self._logged = now
        seconds, count = now - self._stage_began, event.done - self._done_before
        stage = event.stage.replace(" ", "_")
        rate = {f"{stage}/per_second": count / seconds} if seconds > 0 else {}
        self._log({f"{stage}/done": event.done, f"{stage}/total": event.total, **rate})

    def _log(self, values: dict[str, Any]) -> None:
        self._package.log(values)


def figures(study: Study) -> dict[str, float]:
    """The figures of each setting of a run as ``SETTING/NAME``, with ``_lo`` and ``_hi``; those that are defined.

    They are alpha, boundary, relative_boundary, spread and encoding_depth; of an evaluated run also f1 and exact_match.
    ``parity_error`` is that of the run.

    Examples
    --------
    >>> import xprobe
    >>> figures(xprobe.load_study("runs/demo"))["en-x/alpha"]  # doctest: +SKIP
    0.31
    """
    answers = study.manifest.stages.get("answers")
    found: dict[str, Any] = {"parity_error": study.manifest.stages["states"].results["parity_error"]}
    for setting, result in study.items():
        scores = answers.results["settings"][setting] if answers is not None else {}
        for name in ("alpha", "boundary", "relative_boundary", "spread", "encoding_depth", "f1", "exact_match"):
            estimate = {**result.summary, **scores}.get(name, {})
            for part, value in estimate.items():
                found[f"{setting}/{name}" + ("" if part == "value" else f"_{part}")] = value
    return {name: float(value) for name, value in found.items() if value is not None}
