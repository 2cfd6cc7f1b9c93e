"""A sweep on this machine: every model runs, or says why not; and any call goes on where another stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.families import save_tiny_model
from support.runs import contents
from support.sweeps import SMALL, process_of, wait_for, write_toml

import xprobe
from xprobe.errors import UsageError, XprobeError
from xprobe.events import Step
from xprobe.runs.lock import FolderLock
from xprobe.sweeps import forecasts
from xprobe.sweeps.folder import SUMMARY, Status, SweepFolder
from xprobe.sweeps.forecasts import ModelForecast, Outlook, Room, fitting, look_ahead, streaming
from xprobe.sweeps.one import compute_model
from xprobe.sweeps.plan import SweepPlan
from xprobe.sweeps.run import open_sweep, prepare_only, sweep

ANSWERS = {"stages": ["answers"], "answers": {"max_new_tokens": 2}}


def states(found: xprobe.Sweep) -> dict[str, str]:
    return {status.name: status.state for status in found.statuses}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny models: two that run, and one whose weights are gone."""
    folder = tmp_path_factory.mktemp("models")
    for name, family in {"one": "llama", "two": "qwen3", "broken": "llama"}.items():
        save_tiny_model(folder / name, family)
    (folder / "broken" / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def computed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    """A sweep of one model with answers, computed."""
    file = write_toml(models / "computed.toml", [{"model": "one"}], **ANSWERS)
    folder = open_sweep(file, tmp_path_factory.mktemp("computed") / "sweep")
    assert in_this_process(folder, "one").state == "done"
    return folder


def in_this_process(folder: SweepFolder, name: str, progress: Any = lambda event: None) -> Status:
    return compute_model(folder, name, progress)


def test_a_model_is_computed_once_and_what_lacks_is_added(models: Path, tmp_path: Path) -> None:
    file = write_toml(models / "a.toml", [{"model": "one"}])
    folder = open_sweep(file, tmp_path / "sweep")
    assert folder.left("one") == ["states"]
    assert in_this_process(folder, "one").state == "done"
    before = contents(folder.run("one"))
    shutil.rmtree(folder.path / "status")  # the run folder is enough
    (folder.path / "status").mkdir()
    assert folder.status("one").state == "done"
    events: list[Any] = []
    in_this_process(folder, "one", events.append)
    assert events == []
    folder = open_sweep(write_toml(models / "a.toml", [{"model": "one"}], **ANSWERS), tmp_path / "sweep")
    assert folder.status("one").state == "waiting"
    assert folder.left("one") == ["answers"]
    in_this_process(folder, "one")
    assert folder.left("one") == []
    after = contents(folder.run("one"))
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: value for name, value in before.items() if name != "manifest.json"
    }
    for settings in ({"max_new_tokens": 3}, {}):  # other settings are another result, and so are the defaults again
        more = {**ANSWERS, "answers": settings}
        folder = open_sweep(write_toml(models / "a.toml", [{"model": "one"}], **more), tmp_path / "sweep")
        assert folder.left("one") == folder.changed("one") == ["answers"]


def test_other_answers_get_another_oracle_in_the_same_call(models: Path, tmp_path: Path) -> None:
    for count in (2, 3):
        tables = {"stages": ["answers", "oracle"], "answers": {"max_new_tokens": count}}
        file = write_toml(models / "o.toml", [{"model": "one"}], **tables, oracle={"limit": 1, "spans": False})
        folder = open_sweep(file, tmp_path / "sweep")
        assert in_this_process(folder, "one").state == "done"
        assert folder.left("one") == []
    found = xprobe.load_study(folder.run("one")).manifest.stages
    assert (found["answers"].results["max_new_tokens"], found["oracle"].results["limit"]) == (3, 1)


def test_lenses_are_found_from_the_folder_of_the_file_and_read_once(models: Path, tmp_path: Path) -> None:
    xprobe.fit_lens(str(models / "one"), out=models / "lens.pt")
    tables = {"stages": ["lenses"], "lenses": {"lenses": ["logit", "regression:lens.pt"]}}
    folder = open_sweep(write_toml(models / "l.toml", [{"model": "one"}], **tables), tmp_path / "sweep")
    assert in_this_process(folder, "one").state == "done"
    assert folder.left("one") == folder.changed("one") == []
    assert folder.plan.stages["lenses"]["lenses"] == ["logit", f"regression:{(models / 'lens.pt').resolve()}"]


def test_states_that_were_read_block_by_block_stay_so_where_the_model_does_not_fit(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_toml(models / "s.toml", [{"model": "one"}], **ANSWERS)
    with monkeypatch.context() as small:  # a model of this size takes no less block by block
        small.setattr(forecasts, "_lacking", lambda found, model, room: None if found.stream else "too large")
        for _ in range(2):  # the same call goes on
            folder = open_sweep(file, tmp_path / "sweep")
            folder.change_plan(streaming(folder.plan, look_ahead(folder, Room())))
            assert folder.plan["one"].execution.stream
            assert in_this_process(folder, "one").state == "done"
            assert folder.left("one") == []
    folder = open_sweep(file, tmp_path / "sweep")  # on a machine that holds the model
    folder.change_plan(streaming(folder.plan, look_ahead(folder, Room())))
    assert folder.left("one") == ["answers"]
    assert in_this_process(folder, "one").state == "done"
    assert folder.left("one") == []


def test_stages_of_a_run_that_no_longer_fits_are_refused_and_not_lost(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_sweep(write_toml(models / "n.toml", [{"model": "one"}]), tmp_path / "sweep")
    in_this_process(folder, "one")
    folder = open_sweep(write_toml(models / "n.toml", [{"model": "one"}], **ANSWERS), tmp_path / "sweep")
    monkeypatch.setattr(forecasts, "_lacking", lambda found, model, room: None if found.stream else "too large")
    outlook = look_ahead(folder, Room())
    folder.change_plan(streaming(folder.plan, outlook))
    assert list(outlook.refused) == ["one"]
    assert folder.left("one") == ["answers"]


def test_a_memory_limit_that_cannot_be_set_ends_the_run(
    computed: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(computed.path, tmp_path / "sweep")
    folder = SweepFolder.open(tmp_path / "sweep")
    model = replace(folder.plan["one"], resources=replace(folder.plan["one"].resources, memory=50_000_000))
    folder.plan = replace(folder.plan, models=(model,), stages={"relevance": {}, "patching": {}})
    status = in_this_process(folder, "one")
    assert list(status.errors) == ["relevance"]
    assert "memory 50,000,000 is less than the" in status.errors["relevance"]


@pytest.mark.parametrize(
    ("table", "left"),
    [("layers.parquet", ["states"]), ("answers.parquet", ["states", "answers"]), ("examples.parquet", ["states"])],
)
def test_a_table_that_was_damaged_is_written_again(
    computed: SweepFolder, tmp_path: Path, table: str, left: list[str]
) -> None:
    """Nothing is shown as done whose table is cut off or gone."""
    shutil.copytree(computed.path, tmp_path / "sweep")
    folder = SweepFolder.open(tmp_path / "sweep")
    before = contents(folder.run("one"))
    path = folder.run("one") / table
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-9]), path.unlink):
        damage()
        assert folder.left("one") == left
        assert folder.status("one").state == "waiting"
        assert in_this_process(folder, "one").state == "done"
        after = contents(folder.run("one"))
        assert after.keys() == before.keys()
        assert [name for name in before if after[name] != before[name] and name != "manifest.json"] == []


def test_a_stage_that_fails_does_not_stop_those_after_it(models: Path, tmp_path: Path) -> None:
    wrong = {"stages": ["answers", "lenses"], "answers": {"max_new_tokens": 2}, "lenses": {"lenses": ["tuned:nothing"]}}
    folder = open_sweep(write_toml(models / "b.toml", [{"model": "one"}], **wrong), tmp_path / "sweep")
    folder.plan.stages.update({"lenses": folder.plan.stages["lenses"], "answers": folder.plan.stages.pop("answers")})
    status = in_this_process(folder, "one")
    assert (status.state, list(status.errors)) == ("failed", ["lenses"])
    assert "nothing" in status.errors["lenses"]
    assert folder.left("one") == ["lenses"]


def test_what_the_caller_raises_stops_the_run_and_is_said(models: Path, tmp_path: Path) -> None:
    folder = open_sweep(write_toml(models / "c.toml", [{"model": "one"}]), tmp_path / "sweep")

    def stop(event: Any) -> None:
        if isinstance(event, Step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_this_process(folder, "one", stop)
    assert folder.status("one").state == "stopped"
    assert in_this_process(folder, "one").state == "done"


def test_what_does_not_fit_is_streamed_or_refused(models: Path, tmp_path: Path) -> None:
    """A forecast reads no weights, so a configuration is enough for a deep model."""
    for name in ("deep", "unreadable"):
        shutil.copytree(models / "one", tmp_path / name)
    config = json.loads((tmp_path / "deep" / "config.json").read_text())
    (tmp_path / "deep" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 400}))
    (tmp_path / "unreadable" / "config.json").unlink()
    entries = [{"model": "deep"}, {"model": "deep", "name": "small", "memory": "900 MB"}, {"model": "unreadable"}]
    folder = open_sweep(write_toml(tmp_path / "d.toml", entries, **ANSWERS), tmp_path / "sweep")
    outlook = look_ahead(folder, Room(memory=10**10, disk=10**9))
    assert list(outlook.forecasts) == ["deep", "small"]
    assert list(outlook.refused) == ["small"]
    assert "of main memory and may take 900 MB" in outlook.refused["small"]
    assert "config.json" in outlook.failed["unreadable"]
    deep = outlook.forecasts["deep"]
    assert deep.parameters > 400 * 7_000
    assert deep.total_seconds == deep.seconds + deep.stage_seconds["answers"] > deep.seconds
    again = open_sweep(write_toml(tmp_path / "e.toml", entries[:1], stages=["relevance"]), tmp_path / "other")
    assert list(look_ahead(again, Room()).forecasts["deep"].stage_seconds) == ["relevance"]
    seen: list[str] = []
    tight = look_ahead(folder, Room(memory=deep.memory - 1, disk=10**9), seen.append)
    assert seen == ["deep", "small", "unreadable"]
    assert "its weights are read block by block" in tight.streamed["deep"]
    assert tight.forecasts["deep"].memory < deep.memory
    assert tight.forecasts["deep"].stage_seconds == {}
    plan = streaming(folder.plan, tight)
    assert [model.execution.stream for model in plan.models] == [True, False, False]
    folder.change_plan(plan)
    assert folder.left("deep") == ["states"]  # a streamed model gives no answers
    assert SweepFolder.open(folder.path).plan == plan
    no_disk = look_ahead(folder, Room(disk=10))
    assert "on the disk, of which 10 bytes are left" in no_disk.refused["deep"]


def test_a_damaged_status_is_no_news(models: Path, tmp_path: Path) -> None:
    folder = open_sweep(write_toml(models / "e.toml", [{"model": "one"}]), tmp_path / "sweep")
    folder.set_status(replace(Status("one"), state="failed", errors={"states": "no"}))
    assert folder.status("one").errors == {"states": "no"}
    (folder.path / "status" / "one.json").write_text("{")
    assert folder.status("one") == Status("one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "cloud"}, "unknown engine 'cloud'; known: here, ray, slurm"),
        ({"workers": 0}, "workers must be a whole number of at least 1"),
        ({"address": "auto"}, "address is of a Ray cluster, and the engine is 'here'"),
        ({"progress": 5}, "progress must be a function"),
    ],
)
def test_wrong_options_are_told_before_anything_is_written(options: Any, message: str, tmp_path: Path) -> None:
    file = write_toml(tmp_path / "a.toml", [{"model": "org/one"}])
    with pytest.raises(UsageError, match=message):
        sweep(file, out=tmp_path / "sweep", **options)
    assert not (tmp_path / "sweep").exists()


def test_a_stage_with_other_settings_is_computed_again_and_a_note_says_so(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    for tokens in (2, 3):
        file = write_toml(
            models / "again.toml", [{"model": "one"}], **ANSWERS | {"answers": {"max_new_tokens": tokens}}
        )
        found = sweep(file, out=out, look=False)
        (status,) = found.statuses
        assert status.state == "done"
        words = ("has answers with other settings: it is computed again, and replaced",)
        assert status.notes == (words if tokens == 3 else ())
        entry = xprobe.load_study(SweepFolder.open(out).run("one")).manifest.stages["answers"]
        assert entry.results["max_new_tokens"] == tokens


def test_a_damaged_plan_is_written_anew_from_the_file(models: Path, tmp_path: Path) -> None:
    file = write_toml(models / "a.toml", [{"model": "one"}])
    plan = open_sweep(file, tmp_path / "sweep").path / "plan.json"
    before = plan.read_bytes()
    plan.write_bytes(before[:50])
    with pytest.raises(XprobeError, match=r"plan\.json is damaged .*start the sweep again with its TOML file"):
        SweepFolder.open(tmp_path / "sweep")
    open_sweep(file, tmp_path / "sweep")
    assert plan.read_bytes() == before


def test_two_processes_do_not_compute_one_sweep(models: Path, tmp_path: Path) -> None:
    folder = open_sweep(write_toml(models / "h.toml", [{"model": "one"}]), tmp_path / "sweep")
    plan = (folder.path / "plan.json").read_bytes()
    other = write_toml(models / "h2.toml", [{"model": "two"}], **ANSWERS)
    with FolderLock(folder.path):
        for file, out in ((folder.path, None), (other, folder.path)):
            with pytest.raises(UsageError, match="is being written by this process"):
                sweep(file, out=out)
            with pytest.raises(UsageError, match="is being written by this process"):
                prepare_only(file, out, "here", None, print)
    assert (folder.path / "plan.json").read_bytes() == plan  # the processes of a running sweep read it
    assert not (folder.path / ".lock").exists()
    sweep(other, out=folder.path / "new", look=False)
    with pytest.raises(UsageError, match="holds something else than a sweep"):
        sweep(other, out=models)
    assert not (models / ".lock").exists()


def test_what_is_finished_takes_no_room_beside_the_others() -> None:
    found = ModelForecast(1, 2 * 10**9, 0, 1, 1.0, 1, 1, "cpu", "float32", False)
    known = {"done": replace(found, memory=60 * 10**9), **{str(number): found for number in range(8)}}
    outlook = Outlook(known, to_run=[str(number) for number in range(8)])
    assert fitting(SweepPlan(()), outlook, Room(memory=64 * 10**9), most=8) == 8


def test_memory_that_the_file_allows_must_be_there(models: Path, tmp_path: Path) -> None:
    file = write_toml(models / "m.toml", [{"model": "one", "memory": "500 GB"}])
    outlook = look_ahead(open_sweep(file, tmp_path / "sweep"), Room(memory=1000))
    assert "of main memory and may take 1 kB" in outlook.refused["one"]


@pytest.mark.slow
def test_an_error_of_the_caller_stops_the_runs(models: Path, tmp_path: Path) -> None:
    study = {**SMALL, "settings": ["en-x", "x-x"], "limit": 24, "languages": ["en", "de", "ru", "zh"]}
    folder = open_sweep(write_toml(models / "i.toml", [{"model": "one", "batch_tokens": 1}], study), tmp_path / "sweep")

    def show(statuses: list[Status]) -> None:
        if list(folder.run("one").glob("shards/*.safetensors")):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep(folder.path, look=False, progress=show)
    assert process_of(folder.path.resolve(), "one") is None
    assert folder.status("one").state == "stopped"


@pytest.mark.slow
def test_failed_models_do_not_stop_the_others_and_the_end_is_a_comparison(models: Path, tmp_path: Path) -> None:
    entries = [
        {"model": "one", "role": "base"},
        {"model": "two", "base": "one"},
        {"model": "broken"},
        {"model": "one", "name": "starved", "memory": "300 MB"},
    ]
    file = write_toml(models / "f.toml", entries, **ANSWERS)
    shown: list[list[Status]] = []
    found = sweep(file, out=tmp_path / "sweep", workers=2, look=False, progress=shown.append)
    assert states(found) == {"one": "done", "two": "done", "broken": "failed", "starved": "failed"}
    assert not found.done
    errors = {status.name: status.errors["states"] for status in found.statuses if status.errors}
    assert "safetensors" in errors["broken"]
    assert "memory 300,000,000 is less than the" in errors["starved"]
    assert {status.state for statuses in shown for status in statuses} >= {"waiting", "running", "done", "failed"}
    assert set(found.compared.left_out) == {"broken", "starved"}
    assert found.comparison.table["model"].tolist() == ["one", "two"]
    claims = found.comparison.claims
    assert set(claims["claim"]) == {1, 2, 3, 4}
    change = claims[claims["statistic"].str.contains("readiness in the last quarter")].iloc[0]
    one, two = (found.comparison.studies[name].stability["readiness"].to_numpy()[-1] for name in ("one", "two"))
    assert change["value"] == pytest.approx(two - one)  # of four layers the last quarter is one
    assert change["verdict"] == "undecided"
    assert json.loads((found.path / SUMMARY).read_text()) == found.to_dict()
    page = (found.path / "comparison.html").read_text(encoding="utf-8")
    assert "Claims of the paper" in page
    assert found.comparison.pairs == (("one", "two"),)
    assert "Base and post-trained models" in page
    again = sweep(found.path, look=True)
    assert states(again)["one"] == "done"
    assert next(status for status in again.statuses if status.name == "one").starts == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["run", "stop"])
def test_a_killed_run_is_started_again_and_ctrl_c_stops_all(victim: str, models: Path, tmp_path: Path) -> None:
    study = {**SMALL, "limit": 24}
    file = write_toml(models / "g.toml", [{"model": "one", "batch_tokens": 1}], study)
    folder = open_sweep(file, tmp_path / "sweep")

    def shards() -> bool:
        return len(list(folder.run("one").glob("shards/*.safetensors"))) >= 2

    def disturb() -> None:
        wait_for(shards)
        if victim == "stop":
            os.kill(os.getpid(), signal.SIGINT)
            return
        found = process_of(folder.path.resolve(), "one")
        assert found is not None
        os.kill(found[0], signal.SIGKILL)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    if victim == "stop":
        with pytest.raises(KeyboardInterrupt):
            sweep(folder.path, look=False)
        disturber.join()
        assert folder.status("one").state == "stopped"
        assert process_of(folder.path.resolve(), "one") is None
    found = sweep(folder.path, look=False)
    disturber.join()
    assert states(found) == {"one": "done"}
    assert found.statuses[0].starts == 2
    whole = open_sweep(file, tmp_path / "whole")
    in_this_process(whole, "one")
    assert contents(found.path / "runs" / "one") == contents(whole.run("one"))
