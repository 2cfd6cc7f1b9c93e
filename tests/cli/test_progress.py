"""The bar: rate and time left of this process, notes above it, silence where nobody looks."""

from __future__ import annotations

import io

import pytest
from xprobe_cli.progress import Progress, duration

from xprobe.events import Note, Stage, Step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What stands on the screen: of every line what was written last."""
        return [line.split("\r")[-1].rstrip() for line in self.getvalue().split("\n")]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


@pytest.fixture
def clock():
    return Clock()


def test_rate_and_time_left_are_those_of_this_process(terminal, clock):
    progress = Progress(terminal, clock)
    progress(Step("forward", 900, 1000))  # what a resumed run held already
    assert terminal.lines()[-1].endswith("900/1000")
    clock.now += 10
    progress(Step("forward", 920, 1000))
    assert terminal.lines()[-1].endswith("920/1000  2.0 per s, 0:40 left")
    clock.now += 10
    progress(Step("forward", 980, 1000))
    assert terminal.lines()[-1].endswith("980/1000  4.0 per s, 0:05 left")
    clock.now += 5
    progress(Step("forward", 1000, 1000))
    progress.close()
    assert terminal.lines() == [f"forward  [{'#' * 30}]  1000/1000  4.0 per s, took 0:25", ""]


def test_the_rate_of_slow_work_is_in_seconds_per_step(terminal, clock):
    progress = Progress(terminal, clock)
    progress(Step("forward", 0, 3))
    clock.now += 90
    progress(Step("forward", 1, 3))
    assert terminal.lines()[-1] == f"forward  [{'#' * 10}{'-' * 20}]  1/3  90.0 s each, 3:00 left"


def test_a_note_is_a_line_above_the_bar(terminal, clock):
    progress = Progress(terminal, clock)
    progress(Stage("loading the model"))
    progress(Step("forward", 0, 10))
    clock.now += 1
    progress(Step("forward", 5, 10))
    progress(Note("prefixes shared: 78 % of tokens saved"))
    assert terminal.lines()[:2] == ["loading the model", "prefixes shared: 78 % of tokens saved"]
    assert terminal.lines()[-1].endswith("5/10  5.0 per s, 0:01 left")
    clock.now += 1
    progress(Step("forward", 10, 10))
    progress(Stage("phases and tables"))
    assert [line.split("  ")[0] for line in terminal.lines()] == [
        "loading the model", "prefixes shared: 78 % of tokens saved", "forward", "phases and tables", "",
    ]  # fmt: skip
    assert terminal.lines()[2].endswith("10/10  5.0 per s, took 0:02")


def test_a_bar_that_is_closed_early_shows_the_last_step(terminal, clock):
    with Progress(terminal, clock) as progress:
        progress(Step("forward", 0, 10))
        clock.now += 0.01
        progress(Step("forward", 3, 10))  # too soon after the last drawing
        assert terminal.lines()[-1].endswith("0/10")
    assert terminal.lines()[0].endswith("3/10  300.0 per s, 0:00 left")
    assert terminal.lines()[-1] == ""


def test_a_narrow_terminal_gets_a_bar_of_one_line(terminal, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    progress = Progress(terminal, clock)
    progress(Step("forward and lens", 1, 1000))
    assert max(len(line) for line in terminal.lines()) < 40


def test_without_a_terminal_only_important_notes_are_printed(clock):
    stream = io.StringIO()
    progress = Progress(stream, clock)
    progress(Stage("loading"))
    progress(Note("shared beginnings save 80 %"))
    progress(Note("the stage 'mine' was removed", important=True))
    assert stream.getvalue() == "xprobe: the stage 'mine' was removed\n"


def test_without_a_terminal_steps_are_counted_and_nothing_is_printed(clock):
    stream = io.StringIO()
    with Progress(stream, clock) as progress:
        progress(Stage("loading the model"))
        progress(Step("forward", 3, 10))
        progress(Note("a note"))
    assert stream.getvalue() == ""
    assert (progress.done, progress.total) == (3, 10)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (750, "12:30"), (11040, "3:04:00"), (90000, "25:00:00"), (270000, "3 d 3 h")],
)
def test_durations_are_shown_in_the_unit_that_fits(seconds, text):
    assert duration(seconds) == text
