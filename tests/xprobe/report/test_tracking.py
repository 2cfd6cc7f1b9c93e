"""Runs are logged to the real trackers, and a tracker that fails stops nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import xprobe
from xprobe.errors import UsageError
from xprobe.events import Begun, Event, Finished, Note, Stage, Step
from xprobe.report.places import without_folders
from xprobe.report.tracking import Tracker, figures

ROOT = Path(__file__).parents[3]
SMALL: dict[str, Any] = {"languages": ["en", "de"], "limit": 8, "probes": (), "bootstrap": 20, "permutations": 20}


class Recorder(SimpleNamespace):
    """Stands where the package of a tracker stands, and keeps what it is given. ``broken``: a call that fails."""

    def __init__(self, broken: str = "") -> None:
        super().__init__(calls=[], broken=broken)

    def _keep(self, call: str, value: Any = None) -> None:
        self.calls.append((call, value))
        print("a tracker may print")
        if call == self.broken:
            raise ConnectionError("no\nnetwork")

    def init(self, **options: Any) -> None:
        self._keep("init", options)

    def log(self, values: dict[str, Any]) -> None:
        self._keep("log", values)

    def finish(self) -> None:
        self._keep("finish")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


@pytest.fixture(scope="module")
def study(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> xprobe.Study:
    made = xprobe.run(tiny, out=tmp_path_factory.mktemp("tracked") / "run", **SMALL)
    return made.evaluate(xprobe.AnswerSettings(max_new_tokens=2, normaliser="squad"))


def test_a_run_and_its_evaluation_are_logged(
    recorder: Recorder, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Event] = []
    tracker = Tracker("wandb:phases", then=seen.append)
    made = xprobe.run(tiny, out=tmp_path / "mine", progress=tracker, **SMALL)
    first = list(recorder.calls)
    made = made.evaluate(xprobe.AnswerSettings(max_new_tokens=2, normaliser="squad"), progress=tracker)
    assert [first[0][0], first[-1][0]] == ["init", "finish"]
    options = first[0][1]
    assert (options["project"], options["name"]) == ("phases", "mine")
    assert options["config"]["study"]["model"] == tiny.name  # not its folder
    assert (options["config"]["study"]["limit"], options["config"]["xprobe"]) == (8, xprobe.__version__)
    stages = [values["stage"] for call, values in first if call == "log" and "stage" in values]
    assert stages == [event.name for event in seen if isinstance(event, Stage)][: len(stages)]
    last = [values for call, values in first if call == "log"][-1]
    assert last["en-x/boundary"] == made["en-x"].boundary["value"]
    assert "en-x/f1" not in last
    evaluated = [values for call, values in recorder.calls if call == "log"][-1]
    f1 = made.manifest.stages["answers"].results["settings"]["en-x"]["f1"]
    assert (evaluated["en-x/f1"], evaluated["en-x/f1_lo"]) == (f1["value"], f1["lo"])
    assert isinstance(seen[0], Begun)
    assert seen[-1] == Finished(str(made.path))
    assert "a tracker may print" not in capsys.readouterr().out


def test_steps_are_logged_with_their_rate_and_not_too_often(recorder: Recorder) -> None:
    time = iter([0.0, 10.0, 11.0, 18.0, 19.0, 20.0, 21.0])
    tracker = Tracker("wandb", clock=lambda: next(time))
    tracker(Begun("runs/mine"))
    for done in (4, 5, 20, 21, 24):  # 4 were there before
        tracker(Step("forward and lens", done, 24))
    assert [values for call, values in recorder.calls if call == "log"] == [
        {"forward_and_lens/done": 20, "forward_and_lens/total": 24, "forward_and_lens/per_second": 2.0},
        {"forward_and_lens/done": 24, "forward_and_lens/total": 24, "forward_and_lens/per_second": 2.0},
    ]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_stops_nothing(
    call: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Recorder(call)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    seen: list[Event] = []
    made = xprobe.run(tiny, out=tmp_path / "run", progress=Tracker("wandb", then=seen.append), **SMALL)
    assert made.manifest.status == "done"
    notes = [event for event in seen if isinstance(event, Note) and "wandb failed" in event.text]
    assert notes == [Note("wandb failed, and the run goes on without it: no network", important=True)]
    assert [name for name, _ in broken.calls][-1] == call  # it is not called again
    monkeypatch.setitem(sys.modules, "wandb", Recorder(call))
    with pytest.warns(UserWarning, match="wandb failed, and the run goes on without it: no network"):
        log_a_run(Tracker("wandb"))


def log_a_run(tracker: Tracker) -> None:
    """Events of a run that is stopped."""
    for event in (Begun("runs/mine"), Stage("phases")):
        tracker(event)
    tracker.close()


def test_a_run_that_is_stopped_is_ended_in_the_tracker(recorder: Recorder, tiny: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        xprobe.run(tiny, out=tmp_path / "run", progress=Tracker("wandb", then=stop), **SMALL)
    assert recorder.calls[-1] == ("finish", None)
    assert not any("en-x/alpha" in (values or {}) for _, values in recorder.calls)


def test_what_cannot_be_tracked_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("mlflow", "", 7):
        with pytest.raises(UsageError, match=r"unknown tracker .*; known: trackio, wandb"):
            Tracker(wrong)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UsageError, match=r"tracking with trackio needs its package: pip install 'xprobe\[tracking\]'"):
        Tracker("trackio")


def test_figures_leave_out_what_is_undefined(study: xprobe.Study) -> None:
    found = figures(study)
    assert found["en-x/boundary"] == study.boundary["value"]
    assert all(isinstance(value, float) and value == value for value in found.values())
    assert {"parity_error", "en-x/f1", "en-x/exact_match"} <= set(found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ada/models/tiny", "tiny"),
        ("hf:/data/sets/boats,split=test", "hf:boats,split=test"),
        ("tuned:/data/lens/", "tuned:lens"),
        ("~/models/tiny.gguf", "tiny.gguf"),
        (r"C:\models\tiny", "tiny"),
        ("/home/Ada Lovelace/my models/tiny v2", "tiny v2"),
        ("google/xquad", "google/xquad"),
        ("regression:./lens.safetensors", "regression:./lens.safetensors"),
        ("1/2 and en-x", "1/2 and en-x"),
        ("hf:/home/Lovelace, Ada/a:b/boats,config=x.{lang},split=test", "hf:boats,config=x.{lang},split=test"),
        (r"\\server\shared models\tiny", "tiny"),
        ("file:///home/ada/tiny", "tiny"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        (None, None),
    ],
)
def test_only_folders_are_cut_from_texts(text: Any, shown: Any) -> None:
    assert without_folders([text]) == [shown]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see /home/Ada Lovelace/models/tiny, and '/home/b c/x': not read", "see tiny, and 'x': not read"),
        ("(/home/ada (old)/Ada's/tiny) is not there", "(tiny) is not there"),
        ("p(own) / (p(English) + p(own)), 1 / 2, S(l)/x", "p(own) / (p(English) + p(own)), 1 / 2, S(l)/x"),
    ],
)
def test_folders_with_blanks_are_cut_inside_of_texts(text: str, shown: str) -> None:
    assert without_folders(text) == shown


CALL = """
import sys
from xprobe_cli.main import main
sys.exit(main({arguments!r}))
"""
READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("phases")
print(json.dumps([run, SQLiteStorage.get_logs("phases", run)], default=str))
"""


def in_process(code: str, folder: Path, **more: str) -> str:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "cli")))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **more}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def arguments(tiny: Path, track: str) -> list[str]:
    return ["run", str(tiny), "--languages", "en,de", "--limit", "8", "--probes", "none", "--bootstrap", "20", "--out",
            "mine", "--track", track, "--json"]  # fmt: skip


@pytest.mark.slow
def test_the_real_trackio_holds_the_figures(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="the extra tracking is not installed")
    own = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    printed = json.loads(in_process(CALL.format(arguments=arguments(tiny, "trackio:phases")), tmp_path, **own))
    name, logs = json.loads(in_process(READ_TRACKIO, tmp_path, **own).splitlines()[-1])
    assert name == "mine"
    assert logs[-1]["en-x/boundary"] == printed["settings"]["en-x"]["boundary"]["value"]


@pytest.mark.slow
def test_the_real_wandb_keeps_an_offline_run(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra tracking is not installed")
    json.loads(in_process(CALL.format(arguments=arguments(tiny, "wandb")), tmp_path, WANDB_MODE="offline"))
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert all(text in content for text in (b"en-x/boundary", b"parity_error", b"readiness"))
