"""Events are small values that read well as text; what the caller's function raises is the caller's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from xprobe.events import Begun, CallerNotify, Event, Finished, Note, Stage, Step


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Stage("loading the model"), "loading the model"),
        (Step("forward and lens", 3, 12), "forward and lens: 3 of 12"),
        (Step("forward and lens", 0, 0), "forward and lens: 0 of 0"),
        (Begun("runs/demo", {"study": {"limit": 4}}), "begun: runs/demo"),
        (Finished("runs/demo"), "finished: runs/demo"),
        (Note("prefixes shared: 78 % of tokens saved"), "prefixes shared: 78 % of tokens saved"),
    ],
)
def test_an_event_is_a_line_of_text(event: Event, text: str) -> None:
    assert str(event) == text


def test_events_are_immutable_values() -> None:
    assert Step("probes", 1, 2) == Step("probes", 1, 2)
    assert len({Stage("probes"), Stage("probes"), Note("probes")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Step("probes", 1, 2).done = 2  # type: ignore[misc]


def test_the_caller_gets_the_events_themselves_in_order() -> None:
    seen: list[Event] = []
    notify = CallerNotify(seen.append)
    events = [Stage("loading the model"), Step("probes", 1, 2), Note("a note")]
    for event in events:
        notify(event)
    assert seen == events
    assert notify.error is None


def test_what_fails_is_begun_and_not_finished() -> None:
    seen: list[Event] = []
    notify = CallerNotify(seen.append)
    with notify.reporting(Path("runs/demo"), study={"limit": 4}):
        notify(Stage("phases"))
    assert seen == [Begun("runs/demo", {"study": {"limit": 4}}), Stage("phases"), Finished("runs/demo")]
    with pytest.raises(ValueError, match="broke"), notify.reporting(Path("runs/demo")):
        raise ValueError("it broke")
    assert seen[3:] == [Begun("runs/demo")]


def test_events_without_a_caller_are_dropped() -> None:
    notify = CallerNotify(None)
    notify(Stage("loading the model"))
    assert notify.error is None


@pytest.mark.parametrize("error", [RuntimeError("the bar broke"), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_caller_is_raised_unchanged_and_kept(error: BaseException) -> None:
    """A run turns errors of the machine into its own; it must know which are the caller's."""

    def stopping(_: Event) -> None:
        raise error

    notify = CallerNotify(stopping)
    with pytest.raises(type(error)) as caught:
        notify(Step("probes", 1, 2))
    assert caught.value is error
    assert notify.error is error
