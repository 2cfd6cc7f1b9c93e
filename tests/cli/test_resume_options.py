"""Which options a resumed run takes from its manifest, and which must be given again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.families import save_tiny_model, write_set
from xprobe_cli.main import main

from xprobe.config import Execution
from xprobe.models import loading
from xprobe.runs.folder import SHARDS, RunFolder
from xprobe.runs.lock import FolderLock

SMALL = ["--languages", "en,de", "--limit", "1", "--bootstrap", "20", "--probes", "none"]


@pytest.fixture
def unfinished(tiny: Path, tmp_path: Path) -> Path:
    """A run that was computed block by block and lacks one shard."""
    out = tmp_path / "run"
    assert main(["run", str(tiny), *SMALL, "--out", str(out), "--stream"]) == 0
    return without_last_shard(out)


def without_last_shard(out: Path) -> Path:
    sorted((out / SHARDS).iterdir())[-1].unlink()
    return out


def record(out: Path, options: Execution) -> None:
    """Writes other options of the last execution into the manifest."""
    folder = RunFolder(out)
    manifest = folder.read_run()
    manifest.stages["states"].executions[-1].options = options
    folder.write_manifest(manifest)


def last_options(out: Path) -> Execution:
    return RunFolder(out).read_finished().stages["states"].executions[-1].options


def test_a_switch_of_the_run_stays_on_unless_it_is_turned_off(unfinished: Path) -> None:
    assert main(["run", "--out", str(unfinished), "--resume"]) == 0
    assert last_options(unfinished).stream
    without_last_shard(unfinished)
    assert main(["run", "--out", str(unfinished), "--resume", "--no-stream"]) == 0
    assert not last_options(unfinished).stream


@pytest.mark.parametrize(
    "recorded",
    [Execution(device_map="auto"), Execution(tensor_parallel=True), Execution(device="cuda:7", stream=True)],
    ids=["device map", "tensor parallel", "another device"],
)
def test_a_device_on_the_command_line_replaces_what_the_run_recorded(recorded: Execution, unfinished: Path) -> None:
    record(unfinished, recorded)
    assert main(["run", "--out", str(unfinished), "--resume", "--device", "cpu"]) == 0
    options = last_options(unfinished)
    assert (options.device, options.device_map, options.tensor_parallel) == ("cpu", None, False)


def test_options_on_one_command_line_still_contradict_each_other(
    unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--out", str(unfinished), "--resume", "--device", "cpu", "--device-map", "auto"]
    assert main(command) == 2
    assert "contradict each other" in capsys.readouterr().err


def test_a_run_folder_does_not_decide_that_pickles_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = save_tiny_model(tmp_path / "pickled"), tmp_path / "run"
    state = loading.load(loading.resolve(str(model))).model.state_dict()
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    assert main(["run", str(model), *SMALL, "--out", str(out), "--allow-pickle"]) == 0
    without_last_shard(out)
    assert last_options(out).allow_pickle
    capsys.readouterr()
    assert main(["run", "--out", str(out), "--resume"]) == 1
    assert "--allow-pickle" in capsys.readouterr().err
    assert main(["run", "--out", str(out), "--resume", "--allow-pickle"]) == 0


@pytest.mark.parametrize("name", ["trust_remote_code", "allow_pickle"])
def test_trust_is_never_taken_from_the_record(name: str) -> None:
    recorded = Execution(batch_tokens=7, **{name: True})
    assert recorded.resumed_with({}) == Execution(batch_tokens=7)
    assert recorded.resumed_with({name: True}) == recorded


@pytest.mark.parametrize(
    ("recorded", "given", "resumed"),
    [
        (Execution(device="cpu", stream=True), {"device_map": "auto"}, Execution(device_map="auto")),
        (Execution(device_map="auto"), {"stream": True}, Execution(stream=True)),
        (Execution(tensor_parallel=True), {"stream": True}, Execution(stream=True)),
        (Execution(device="cpu", stream=True), {"tensor_parallel": True}, Execution(tensor_parallel=True)),
        (Execution(device_map="auto"), {"stream": False}, Execution(device_map="auto")),
        (Execution(device="cpu", stream=True), {"stream": False}, Execution(device="cpu")),
    ],
)
def test_a_given_option_replaces_the_recorded_ones_that_it_excludes(
    recorded: Execution, given: dict[str, bool | str], resumed: Execution
) -> None:
    assert recorded.resumed_with(given) == resumed
    assert replace(recorded, batch_tokens=7).resumed_with(given) == replace(resumed, batch_tokens=7)


def test_a_folder_where_another_run_is_starting_is_reported_as_busy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with FolderLock(out):
        assert main(["run", "--out", str(out), "--resume"]) == 2
    assert "is being written by this process" in capsys.readouterr().err


def test_a_run_is_resumed_from_another_working_directory(tmp_path: Path, monkeypatch, capsys) -> None:
    save_tiny_model(tmp_path / "here" / "m")
    monkeypatch.chdir(tmp_path / "here")
    assert main(["run", "m", *SMALL, "--out", "run"]) == 0
    without_last_shard(tmp_path / "here" / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["run", "--out", "../here/run", "--resume"]) == 0
    without_last_shard(tmp_path / "here" / "run")
    (tmp_path / "here" / "m").rename(tmp_path / "here" / "moved")
    capsys.readouterr()
    assert main(["run", "--out", "../here/run", "--resume"]) == 2
    assert f"no model lies at {tmp_path / 'here' / 'm'}, where the run in ../here/run had it" in capsys.readouterr().err


def test_an_empty_name_is_no_folder(tiny: Path, capsys) -> None:
    assert main(["run", str(tiny), *SMALL, "--out", ""]) == 2
    assert "is empty: name a folder" in capsys.readouterr().err


def test_a_dry_run_of_a_run_to_resume_says_that_it_is_for_the_whole_run(
    unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    n = len(list((unfinished / SHARDS).iterdir()))
    assert main(["run", "--out", str(unfinished), "--resume", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"these numbers are for the whole run; {unfinished} already holds {n} of {n + 1} shards" in out


@pytest.mark.parametrize("option", ["--limit", "--paragraphs"])
def test_a_warning_says_that_the_data_holds_fewer_questions_than_asked_for(
    option: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_set(tmp_path / "data", {"en": [("A b c.", "What?", "b"), ("D e f.", "Which?", "e")]})
    command = ["run", str(tiny), "--data", str(data), "--bootstrap", "20", "--probes", "none"]
    words = f"({option}) is 999, but the data holds 2"
    assert main([*command, option, "999", "--dry-run"]) == 0
    assert words in capsys.readouterr().out
    assert main([*command, option, "999", "--out", str(tmp_path / "run")]) == 0
    assert words in capsys.readouterr().err
    assert main([*command, option, "2", "--dry-run"]) == 0
    assert "but the data holds" not in capsys.readouterr().out
