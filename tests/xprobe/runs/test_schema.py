"""Whatever is wrong in a manifest: readers work, or one line names the entry, what it must be, and what it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.runs import write_signed
from xprobe_cli.main import main
from xprobe_cli.probe_tables import probe_report
from xprobe_cli.run import warnings
from xprobe_cli.tables import study_report

import xprobe
from xprobe import results
from xprobe.errors import RunFolderError, UsageError
from xprobe.runs.folder import LAYERS, MANIFEST, RunFolder
from xprobe.runs.schema import COUNT, Entries, Every, Items, complaint, whole
from xprobe.stages import probes, states
from xprobe.study import train_probes

OPTIONS: dict[str, Any] = {
    "setting": ("en-x", "x-x"), "languages": ("en", "de"), "limit": 6, "bootstrap": 20, "permutations": 20,
    "probes": ("language",),
}  # fmt: skip
MISSING = "missing"
SETTINGS = ("stages", "phases", "results", "settings")
STATES, TRAINED = ("stages", "states"), ("stages", "probes", "results", "trained")
OPTIONS_USED = (*STATES, "executions", 0, "options")
WRONG = (MISSING, None, "six", -1, True, 10**30, 1.5, float("nan"), [], {}, [1], {"x": 5})
Place = tuple[Any, ...]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    xprobe.run(str(tiny), out=out, **OPTIONS)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def places(value: Any, inside: Place = ()) -> Iterator[Place]:
    """Where every entry is, at any depth; of a list the first item."""
    if inside:
        yield inside
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*inside, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*inside, 0))


def spoil(out: Path, text: str, place: Place, value: Any, *, signed: bool = False) -> None:
    """Writes a manifest with one wrong entry; ``signed``: with a checksum that fits it."""
    manifest = json.loads(text)
    holder = manifest
    for key in place[:-1]:
        holder = holder[key]
    if value is MISSING:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    if signed:
        write_signed(out, manifest)
    else:
        (out / MANIFEST).write_text(json.dumps(manifest))


def read_everything(out: Path) -> None:
    """All that a user can ask of a finished run."""
    study = xprobe.load_study(out)
    for setting in study.settings:
        one = study[setting]
        assert one.alpha.keys() == one.boundary.keys() == {"value", "lo", "hi"}
        for table in (one.stability, one.signals, one.boundaries, one.probes):
            assert isinstance(table, pd.DataFrame)
        assert setting in repr(one)
        assert setting in one._repr_html_()
    assert str(out) in repr(study)
    json.dumps(study.to_dict(), allow_nan=False)
    assert study_report(study).endswith(str(out))
    assert probe_report(study).endswith(str(out))
    warnings(study.manifest)


# what no reader uses, or hardly: one wrong value each
UNREAD = {"environment", "prompt", "data", "plan", "options", "selection"}
ALL = pytest.param(WRONG, marks=pytest.mark.slow, id="every value")


@pytest.mark.parametrize("values", [pytest.param((MISSING, None), id="two values"), ALL])
def test_any_wrong_entry_is_either_not_needed_or_named(
    values: tuple[Any, ...], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (out / MANIFEST).read_text()
    finished = RunFolder(out).read_finished()
    names = results.table_names(finished)
    tables = results.read_tables(RunFolder(out), finished, names)
    digests = {name: digest for stage in finished.stages.values() for name, digest in stage.tables.items()}
    known = {digests[name]: table for name, table in zip(names, tables, strict=True)}
    real = RunFolder.read_table

    def read_table(self: RunFolder, name: str, digest: str) -> pd.DataFrame:
        return known[digest] if digest in known else real(self, name, digest)

    monkeypatch.setattr(RunFolder, "read_table", read_table)  # once: reading the tables is what takes long
    read, refused = 0, set()
    for place in places(json.loads(text)):
        if "x-x" in place and values != WRONG:
            continue  # as the other setting
        for value in values[:1] if UNREAD & set(map(str, place)) and len(place) > 1 else values:
            spoil(out, text, place, value, signed=True)
            try:
                read_everything(out)
                read += 1
            except (RunFolderError, UsageError):
                refused.add(place)
    assert read > 20
    for name in ("seed", "bootstrap"):
        assert ("study", name) in refused
    for name in ("name", "n_blocks", "width", "vocab_size"):
        assert ("model", name) in refused
    phases = ("stages", "phases")
    assert {
        phases,
        (*phases, "tables"),
        ("groups",),
        (*phases, "results", "settings", "en-x", "alpha", "value"),
    } <= refused


@pytest.mark.parametrize("command", ["probe", "resume"])
def test_no_wrong_entry_is_reported_as_a_fault_of_xprobe(
    command: str, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Probes are not trained, and no model is loaded: this is about what is read before."""

    class Reached(UsageError):
        pass

    def reached(*_: Any, **__: Any) -> None:
        raise Reached("reached")

    monkeypatch.setattr(probes, "_train_all", reached)
    monkeypatch.setattr(states, "open_runner", reached)
    text = (out / MANIFEST).read_text()
    arguments = ["probe", str(out)] if command == "probe" else ["run", "--out", str(out), "--resume"]
    inner = [place for place in places(json.loads(text)) if len(place) <= 3 and place[0] != "prompt"]
    for place in inner:
        for value in (MISSING, {"x": 5}, 10**30) if len(place) > 1 else WRONG:
            spoil(out, text, place, value)
            main(arguments)
            err = capsys.readouterr().err
            assert "unexpected" not in err, (place, value, err)
            assert "Traceback" not in err


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("study", "seed"), MISSING, "entry study.seed must be a whole number, is missing"),
        (("study", "bootstrap"), "six", 'entry study.bootstrap must be a whole number, is "six"'),
        (("study", "store_rows"), 1, "entry study.store_rows must be true or false, is 1"),
        (("study", "model"), "half a pair: \ud800", r'entry study.model must be text, is "half a pair: \ud800"'),
        (("study", "settings"), ["en-y"], "entry study or stages cannot be used: unknown setting 'en-y'"),
        (("model", "name"), MISSING, "entry model.name must be text, is missing"),
        (("model", "n_blocks"), MISSING, "entry model.n_blocks must be a whole number from 1 to 1000000, is missing"),
        (("model", "n_blocks"), "six", 'entry model.n_blocks must be a whole number from 1 to 1000000, is "six"'),
        (("model", "n_blocks"), 0, "entry model.n_blocks must be a whole number from 1 to 1000000, is 0"),
        (("model", "width"), True, "is true"),
        (("model", "vocab_size"), 1, "entry model.vocab_size must be a whole number from 2 "),
        (("model",), None, "entry model must be an object, is null"),
        (("stages", "phases"), MISSING, "entry stages.phases must be an object, is missing"),
        ((*TRAINED, "language", "folds"), 1, "trained.language.folds must be a whole number from 2 "),
        ((*SETTINGS[:2], "tables", LAYERS), "ab", "phases.tables.layers.parquet must be a SHA-256 in hexadecimal, is "),
        (("groups",), ["a", "a"], "entry groups must be a list of different texts that is not empty, is "),
        (("groups", 0), 5, "entry groups must be a list of different texts"),
        ((*SETTINGS,), {}, "entry stages.phases.results.settings must be an object that is not empty, is {}"),
        ((*SETTINGS, "en-x", "alpha", "lo"), float("nan"), "settings.en-x.alpha.lo must be a number or null, is NaN"),
        ((*SETTINGS, "x-x", "phased_fraction", "value"), None, "phased_fraction.value must be a number from 0 to 1"),
        ((*SETTINGS, "x-x", "languages", "de", "phase_order"), MISSING, "languages.de.phase_order must be an object"),
        ((*SETTINGS, "x-x", "phase_order", "value"), 0.5, "settings.x-x.phase_order.value must be 0, 1 or null"),
        (("counts", "skipped"), [], "entry counts.skipped must be an object, is []"),
        (("left_out", "records"), "all", "entry left_out.records must be a list of texts, is"),
        (("stages", "states", "warnings"), 5, "entry stages.states.warnings must be a list of texts, is 5"),
        ((*STATES, "seconds", "load"), -1, "states.seconds.load must be a number of at least 0, is -1"),
        ((*STATES, "results", "parity_error"), None, "parity_error must be a number of at least 0, is null"),
        ((*OPTIONS_USED, "batch_tokens"), "x", "options.batch_tokens must be a whole number or null, is "),
        ((*OPTIONS_USED, "batch_tokens"), 0, "entry stages cannot be used: batch_tokens must be "),
        ((*OPTIONS_USED, "device_map"), [1], "options.device_map must be text or an object or null, is [1]"),
        (("status",), "over", 'entry status must be "running" or "done", is "over"'),
        (("template_sha256",), 5, "entry template_sha256 must be text, is 5"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_the_entry_is_named_with_what_it_must_be_and_what_it_is(
    place: Place, value: Any, words: str, out: Path
) -> None:
    spoil(out, (out / MANIFEST).read_text(), place, value)
    pattern = rf"^{re.escape(str(out / MANIFEST))}: .*{re.escape(words)}"
    for use in (xprobe.load_study, train_probes):
        with pytest.raises(RunFolderError, match=pattern):
            use(out)


def test_resuming_writes_wrong_entries_again_except_those_that_identify_the_run(
    out: Path, tiny: Path, finished: Path
) -> None:
    text = (out / MANIFEST).read_text()
    spoil(out, text, ("study", "seed"), "six")
    with pytest.raises(RunFolderError, match=r"study.seed .*start it in a new folder"):
        xprobe.load_study(out)
    spoil(out, text, ("model", "n_blocks"), MISSING)
    with pytest.raises(RunFolderError, match=rf"`xprobe run --out {out} --resume` writes it again"):
        xprobe.load_study(out)
    xprobe.run(str(tiny), out=out, resume=True, **OPTIONS)
    assert xprobe.load_study(out).manifest.model == xprobe.load_study(finished).manifest.model


def test_entries_that_this_version_does_not_know_are_no_error(out: Path) -> None:
    manifest = json.loads((out / MANIFEST).read_text())
    manifest |= {"wavelets": {"n": [1]}, "note": "half a pair: \ud800"}
    manifest["model"]["colour"] = None
    write_signed(out, manifest)
    xprobe.load_study(out)
    train_probes(out, ("language",))
    assert xprobe.load_study(out).manifest.other["note"] == "half a pair: \ud800"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ((*SETTINGS, "en-x", "alpha", "value"), "phases"),
        ((*SETTINGS, "en-x", "boundary", "lo"), "phases"),
        ((*STATES, "results", "parity_error"), "states"),
        ((*TRAINED, "language", "folds"), "probes"),
    ],
    ids=["alpha", "boundary", "parity", "folds"],
)
def test_a_figure_that_was_edited_by_hand_is_never_shown(place: Place, name: str, out: Path, tiny: Path) -> None:
    figures = xprobe.load_study(out).to_dict()
    spoil(out, (out / MANIFEST).read_text(), place, 7)
    words = f"entry stages.{name}.results was changed after the run wrote it; `xprobe run --out {out} --resume` writes"
    for use in (xprobe.load_study, train_probes):
        with pytest.raises(RunFolderError, match=re.escape(words)):
            use(out)
    resumed = xprobe.run(str(tiny), out=out, resume=True, **OPTIONS)
    assert resumed.to_dict()["settings"].keys() == figures["settings"].keys()
    if name == "phases":
        assert resumed.to_dict()["settings"] == figures["settings"]


def test_a_run_without_checksums_of_its_results_is_read(out: Path) -> None:
    manifest = json.loads((out / MANIFEST).read_text())
    for stage in manifest["stages"].values():
        del stage["results_sha256"]
    write_signed(out, manifest)
    assert xprobe.load_study(out)["en-x"].alpha == manifest["stages"]["phases"]["results"]["settings"]["en-x"]["alpha"]


@pytest.mark.parametrize("value", [None, 5, {"x": 5}], ids=str)
@pytest.mark.parametrize("place", [("created",), ("total_seconds",), ("selection",), ("prompt",), ("stages", "later")])
def test_a_wrong_entry_that_nobody_needs_keeps_no_run_from_being_read(place: Place, value: Any, out: Path) -> None:
    before = xprobe.load_study(out).to_dict()["settings"]
    spoil(out, (out / MANIFEST).read_text(), place, value, signed=True)
    assert xprobe.load_study(out).to_dict()["settings"] == before


@pytest.mark.parametrize(
    ("place", "value"),
    [(STATES, 5), ((*STATES, "warnings"), 5), ((*OPTIONS_USED, "batch_tokens"), 0), (("stages", "phases"), [])],
    ids=["states", "warnings", "batch tokens", "phases"],
)
def test_a_wrong_entry_of_a_stage_is_written_again_when_the_run_is_resumed(
    place: Place, value: Any, out: Path, tiny: Path
) -> None:
    before = xprobe.load_study(out).to_dict()["settings"]
    spoil(out, (out / MANIFEST).read_text(), place, value)
    with pytest.raises(RunFolderError, match=re.escape(f"`xprobe run --out {out} --resume` writes it again")):
        xprobe.load_study(out)
    assert xprobe.run(str(tiny), out=out, resume=True, **OPTIONS).to_dict()["settings"] == before


def test_a_setting_that_the_tables_do_not_hold_is_named(out: Path) -> None:
    manifest = json.loads((out / MANIFEST).read_text())
    found = manifest["stages"]["phases"]["results"]["settings"]
    found["y-y"] = found.pop("x-x")
    del manifest["stages"]["phases"]["results_sha256"]
    write_signed(out, manifest)
    with pytest.raises(RunFolderError, match=r"results names y-y, which layers.parquet does not hold"):
        xprobe.load_study(out)


def test_resuming_keeps_options_that_only_python_has(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of permutations has no option."""
    assert main(["run", "--out", str(out), "--resume"]) == 0
    assert xprobe.load_study(out).manifest.study.permutations == OPTIONS["permutations"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("value", "rule", "words"),
    [
        ({"a": {"b": 1}}, Entries({"a": Entries({"b": COUNT})}), None),
        ({"a": {}}, Entries({"a": Entries({"b": COUNT})}), "entry a.b must be a whole number from 0 "),
        ({"x": 1, "y": -1}, Every(COUNT), "entry y must be "),
        ({}, Every(COUNT), None),
        ({"n": 3}, Entries({}, {"n": whole(1, 2)}), "entry n must be a whole number from 1 to 2, is 3"),
        ([{"n": 1}, {"n": -1}], Items(Entries({"n": COUNT})), "entry [1].n must be a whole number from 0 "),
        (5, Items(COUNT), "must be a list, is 5"),
        ({"a": 1, "b": -1}, Entries({"a": COUNT}, {}, COUNT), "entry b must be a whole number from 0 "),
        ({"n": "x" * 99}, Entries({"n": COUNT}), f'is "{"x" * 59}...'),
    ],
)
def test_a_rule_names_the_first_entry_that_breaks_it(value: Any, rule: Any, words: str | None) -> None:
    found = complaint(value, rule)
    assert found is None if words is None else words in str(found)
