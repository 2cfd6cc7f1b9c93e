"""All runs of a sweep in one view: a live table, lines, or one JSON object for each change."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import click

from xprobe_cli.progress import duration
from xprobe_cli.stopping import Stopped
from xprobe_cli.tables import bar

if TYPE_CHECKING:
    from xprobe.sweeps.folder import Status

COLOURS = {"running": "cyan", "done": "green", "failed": "red", "refused": "red", "stopped": "yellow", "waiting": "dim"}
ROWS_BESIDE = 6  # lines of a terminal that the table needs for other things
BESIDE = 44  # characters of a line besides the name and what the run does


class View(AbstractContextManager["View"]):
    """Shows statuses, as a ``progress`` of ``xprobe.sweep``. Without rich, or without a terminal, it writes lines."""

    def __init__(self, *, as_json: bool = False) -> None:
        self._as_json = as_json
        self._out = sys.stdout  # as it is now: while a sweep runs, what packages print goes to stderr
        self._shown: dict[str, tuple[Any, ...]] = {}
        self._live: Any = None
        if not as_json and sys.stderr.isatty() and find_spec("rich") is not None:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, statuses: list[Status]) -> None:
        if self._live is not None:
            width, height = self._live.console.size
            self._live.update(_table(statuses, height - ROWS_BESIDE, width), refresh=True)
            return
        for status in statuses:
            if self._as_json:
                news: tuple[Any, ...] = (status.state, status.stage, status.done, status.total, str(status.errors))
            else:
                news = (status.state, status.stage == "forecast", str(status.errors))
            if self._shown.get(status.name) != news:
                self._shown[status.name] = news
                if self._as_json or status.state != "waiting" or status.stage == "forecast":
                    self._write(status)

    def _write(self, status: Status) -> None:
        if self._as_json:
            click.echo(json.dumps({"event": "model", **status.to_dict()}, ensure_ascii=False), file=self._out)
            return
        state = "forecast" if status.state == "waiting" and status.stage == "forecast" else status.state
        took = f" after {duration(status.seconds)}" if state in ("done", "failed", "stopped") and status.seconds else ""
        click.echo(f"xprobe: {status.name}: {state}{took}{_errors(status)}", err=True)


def _errors(status: Status) -> str:
    return "".join(f"; {stage}: {words}" for stage, words in status.errors.items())


def _table(statuses: list[Status], most: int, width: int) -> Any:
    """The live table of at most ``most`` rows. If there are more, runs that wait or are done are only counted."""
    from rich.table import Table

    counts = Counter(status.state for status in statuses)
    caption = ", ".join(f"{count} {state}" for state, count in counts.items())
    table = Table(box=None, pad_edge=False, caption=f"{caption}; Ctrl-C stops at safe points", caption_justify="left")
    for head in ("model", "state", "doing", "", "time"):
        table.add_column(head, no_wrap=True, justify="right" if head == "time" else "left")
    if len(statuses) > most:
        statuses = [one for one in statuses if one.state not in ("waiting", "done")][: max(1, most)]
    names = max((len(status.name) for status in statuses), default=0)
    for status in statuses:
        part = f"{bar(status.done / status.total)} {status.done}/{status.total}" if status.total else ""
        doing = _errors(status).removeprefix("; ") if status.errors else status.stage
        doing = doing[: max(16, width - names - BESIDE)]
        table.add_row(
            status.name,
            f"[{COLOURS[status.state]}]{status.state}[/]",
            doing.replace("[", r"\["),
            part if status.state == "running" else "",
            duration(status.seconds) if status.seconds else "",
        )
    return table


@contextmanager
def terminated() -> Iterator[None]:
    """Inside the block SIGTERM stops the sweep as Ctrl-C does, unless somebody else handles it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
