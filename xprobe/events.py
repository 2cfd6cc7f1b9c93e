"""What a run reports while it works: one small object per event, given to the caller's ``progress``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Begun:
    """A run, or a later stage of a run, has begun in ``folder``.

    ``config`` says what is measured (``study``) and how (``execution``), in plain values.

    Examples
    --------
    >>> str(Begun("runs/demo", {"study": {"limit": 4}}))
    'begun: runs/demo'
    """

    folder: str
    config: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"begun: {self.folder}"


@dataclass(frozen=True)
class Finished:
    """What had begun is finished: ``xprobe.load_study(folder)`` reads it.

    Examples
    --------
    >>> str(Finished("runs/demo"))
    'finished: runs/demo'
    """

    folder: str

    def __str__(self) -> str:
        return f"finished: {self.folder}"


@dataclass(frozen=True)
class Stage:
    """Work that has no count has begun.

    Examples
    --------
    >>> str(Stage("loading the model"))
    'loading the model'
    """

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Step:
    """``done`` of ``total`` pieces of a stage's work are done.

    Examples
    --------
    >>> str(Step("forward and lens", 3, 12))
    'forward and lens: 3 of 12'
    """

    stage: str
    done: int
    total: int

    def __str__(self) -> str:
        return f"{self.stage}: {self.done} of {self.total}"


@dataclass(frozen=True)
class Note:
    """Something that the user should know: a fallback, a warning, what was found in the folder.

    ``important``: the manifest does not keep it, and it says what was removed, replaced or not used. The command line
    shows it even if stderr is no terminal.

    Examples
    --------
    >>> str(Note("the run is finished: shown from its files"))
    'the run is finished: shown from its files'
    """

    text: str
    important: bool = False

    def __str__(self) -> str:
        return self.text


Event = Begun | Stage | Step | Note | Finished
Notify = Callable[[Event], None]


class CallerNotify:
    """Hands events to the caller's function and remembers what that function raised.

    An error of the caller's own function is not a failure of the run, and reaches the caller unchanged.
    """

    def __init__(self, progress: Notify | None) -> None:
        self._progress = progress
        self.error: BaseException | None = None

    def __call__(self, event: Event) -> None:
        if self._progress is None:
            return
        try:
            self._progress(event)
        except BaseException as error:
            self.error = error
            raise

    @contextmanager
    def reporting(self, folder: Path, **config: dict[str, Any]) -> Iterator[None]:
        """Reports ``Begun``, and ``Finished`` if nothing is raised."""
        self(Begun(str(folder), config))
        yield
        self(Finished(str(folder)))
