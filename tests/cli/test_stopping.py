"""Ctrl-C and SIGTERM: what is computed is kept, the message says how to go on, the second one is not swallowed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import threading
import time

import pytest
from xprobe_cli import stopping
from xprobe_cli.progress import Progress
from xprobe_cli.stopping import Stoppable, Stopped, program

import xprobe
from xprobe.events import Stage, Step

OPTIONS = ["--setting", "en-x", "--setting", "x-x", "--languages", "en,de", "--limit", "6", "--bootstrap", "20"]
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start(forks, tiny, out, slow):
    """A run whose forward passes take their time, once the first shard is there."""
    output = out.with_name("output")
    command = ["run", str(tiny), *OPTIONS, "--batch-tokens", "1", "--allow-pickle", "--out", str(out)]
    pid = forks.start_command(command, output, slow=[str(out), slow])
    wait_for(lambda: (out / "shards").is_dir() and any((out / "shards").glob("*.safetensors")))
    return pid, output


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_the_first_signal_stops_at_a_safe_point_and_prints_the_command_that_resumes(
    number, code, forks, tiny, tmp_path
):
    out = tmp_path / "a run"
    pid, output = start(forks, tiny, out, slow=0.05)
    os.kill(pid, number)
    ended = forks.wait(pid)
    assert ended == {"code": code, "restored": True}
    first, last = output.read_text().splitlines()
    assert first == "xprobe: stopping after the current examples; a second signal stops at once"
    kept, total, command = re.fullmatch(
        r"xprobe: interrupted: (\d+) of (\d+) examples are kept; continue with: xprobe (.*)", last
    ).groups()
    assert 0 < int(kept) < int(total) == 24
    assert "--allow-pickle" in command  # it is not taken from the run folder
    assert not (out / ".lock").exists()
    before = {path.name: path.stat().st_ino for path in (out / "shards").iterdir()}
    assert forks.wait(forks.start_command(shlex.split(command), output))["code"] == 0
    assert str(out) in output.read_text()
    assert {name: (out / "shards" / name).stat().st_ino for name in before} == before
    assert len(xprobe.load_study(out).examples) == int(total)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_the_second_signal_does_not_wait(number, code, forks, tiny, tmp_path):
    out = tmp_path / "run"
    pid, output = start(forks, tiny, out, slow=600)
    os.kill(pid, number)
    wait_for(lambda: "a second signal stops at once" in output.read_text())
    time.sleep(0.2)
    os.kill(pid, 0)  # it still runs
    os.kill(pid, number)
    started = time.monotonic()
    assert forks.wait(pid)["code"] == code
    assert time.monotonic() - started < 10
    assert f"--out {out} --resume" in output.read_text().splitlines()[-1]
    assert not (out / ".lock").exists()


def send_after(number, *events):
    """Sends this process a signal after these events."""
    with Stoppable(Progress()) as stoppable:
        for event in events:
            stoppable(event)
        os.kill(os.getpid(), number)
        time.sleep(1)  # the handler runs before this ends


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_the_first_signal_does_not_wait_if_nothing_can_be_lost(number, code, capfd):
    with pytest.raises(Stopped) as stopped:
        send_after(number, Stage("loading the model"))
    assert stopping.EXIT_CODES[stopped.value.signal] == code
    with pytest.raises(Stopped):
        send_after(number, Step("forward and lens", 24, 24), Stage("phases and tables"))
    assert capfd.readouterr().err == ""


def test_handlers_are_restored_and_those_of_others_are_not_replaced():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stoppable(Progress()):
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup, or the background of a script
        with Stoppable(Progress()):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])
    inside = []
    thread = threading.Thread(target=lambda: inside.append(Stoppable(Progress()).__enter__()))
    thread.start()
    thread.join()
    assert len(inside) == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_library_sets_no_signal_handlers(tiny, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before, seen = [signal.getsignal(number) for number in numbers], []
    xprobe.run(
        str(tiny), out=tmp_path / "run", languages="en", limit=1,
        progress=lambda *_: seen.append([signal.getsignal(number) for number in numbers]),
    )  # fmt: skip
    assert seen
    assert all(handlers == before for handlers in seen)


def test_the_safe_points_are_the_steps_of_the_run():
    from xprobe.stages import states

    assert stopping.STEP == states.STEP


def test_the_hint_says_if_nothing_was_computed_yet(tmp_path):
    line = stopping.resume_hint(Progress(), tmp_path / "run", [])
    assert line == "nothing was computed yet; the same command begins again"
    (tmp_path / "manifest.json").write_text("{}")
    line = stopping.resume_hint(Progress(), tmp_path, ["--json"])
    assert line == f"what was computed is kept; continue with: {program()} run --out {tmp_path} --resume --json"


@pytest.mark.parametrize(
    ("called", "path", "output"),
    [
        ("/venv/bin/xprobe", "", "/venv/bin/xprobe"),
        ("/usr/lib/xprobe_cli/__main__.py", "", f"{sys.executable} -m xprobe_cli"),
        ("/usr/bin/pytest", "", "xprobe"),
    ],
)
def test_the_hint_names_the_program_as_it_was_called(called, path, output, monkeypatch):
    monkeypatch.setattr("sys.argv", [called])
    monkeypatch.setenv("PATH", path)
    assert program() == output


def test_a_configuration_that_cannot_be_read_is_named(tiny, tmp_path, capsys):
    from xprobe_cli.main import main

    out = tmp_path / "run"
    xprobe.run(str(tiny), out=out, languages="en", limit=1)
    manifest = json.loads((out / "manifest.json").read_text())
    for config in ({"languages": 5}, {"settings": ["x-en"]}, {"wavelets": 3}, {"limit": "many"}):
        changed = {**manifest, "study": {**manifest["study"], **config}}
        (out / "manifest.json").write_text(json.dumps(changed))
        unknown = "wavelets" in config  # another version's: the run is of something else, and the entry is named
        assert main(["run", "--out", str(out), "--resume"]) == (2 if unknown else 1)
        error = capsys.readouterr().err
        assert ("wavelets was 3" if unknown else f"{out / 'manifest.json'}: entry study") in error
        assert error.count("\n") == 1
