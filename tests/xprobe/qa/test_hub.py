"""Data sets of the package ``datasets``: as objects, and by name from a Hub on this machine. The real clients run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_hub import TOKEN, Hub, fake_hub
from xprobe_cli.main import main

from xprobe.errors import DataError, UsageError
from xprobe.qa.hub_names import HubName, patterns_in
from xprobe.qa.parallel import load_data
from xprobe.runs.places import in_folder

datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")

TEXTS = {"en": "Ada sold {} boats.", "de": "Ada verkaufte {} Boote.", "sw": "Ada aliuza mashua {}."}


def rows(language: str, count: int = 4) -> list[dict[str, Any]]:
    """Parallel flat records, two on each context."""
    made = []
    for number in range(count):
        context = TEXTS[language].format(40 + number // 2)
        answer = ["Ada", str(40 + number // 2)][number % 2]
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        made.append({"id": f"q{number}", "context": context, "question": f"{language} {number}?", "answers": answers})
    return made


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def repository(parts: dict[str, dict[str, str]]) -> dict[str, str]:
    """The files of a data set: configuration -> split -> JSON lines."""
    card, files = ["---", "configs:"], {}
    for config, splits in parts.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, text in splits.items():
            card += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
            files[f"{config}/{split}.jsonl"] = text
    return {"README.md": "\n".join([*card, "---", ""]), **files}


XQUAD = repository({f"xquad.{language}": {"validation": lines(rows(language))} for language in TEXTS})
MLQA = repository({
    f"mlqa.{a}.{b}": {"test": lines(rows(b)), "validation": lines(rows(b, 2))} for a in TEXTS for b in TEXTS
})  # fmt: skip
BY_COLUMN = repository({
    "default": {"test": lines([{**row, "language": language} for language in TEXTS for row in rows(language)])}
})  # fmt: skip
BY_SPLIT = repository({"default": {language: lines(rows(language)) for language in TEXTS}})
ENGLISH = repository({"plain_text": {"train": lines(rows("en", 2)), "validation": lines(rows("en"))}})
NAMELESS = repository({"default": {"test": lines([{"q": "Who?", "a": "Ada"}])}})


@pytest.fixture(scope="module")
def from_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for language in TEXTS:
        (folder / f"boats.{language}.json").write_text(json.dumps(rows(language)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with fake_hub() as made:
        made.add("google/xquad", XQUAD)
        made.add("facebook/mlqa", MLQA)
        made.add("ada/by-column", BY_COLUMN)
        made.add("ada/by-split", BY_SPLIT)
        made.add("ada/english", ENGLISH)
        made.add("ada/nameless", NAMELESS)
        made.add("ada/scripted", {"scripted.py": "import os", "README.md": ""})
        made.add("ada/gated", XQUAD, gated=True)
        made.add("ada/private", XQUAD, private=True)
        yield made


LOAD = """
import json, sys
from xprobe.errors import XprobeError
from xprobe.qa.parallel import load_data
out = []
for spec, languages in json.loads(sys.argv[1] if len(sys.argv) > 1 else ASKED):
    try:
        data = load_data(spec, languages)
        out.append({"languages": data.languages, "fingerprint": data.fingerprint, "files": data.files,
                    "revision": data.revision, "name": data.name, "problems": list(map(str, data.problems))})
    except XprobeError as error:
        out.append({"error": f"{type(error).__name__}: {error}"})
print(json.dumps(out))
"""


def load(hub: Hub, cache: Path, asked: list[tuple[str, list[str] | None]], **options: Any) -> list[dict[str, Any]]:
    """What ``load_data`` makes of each name, in one process that talks to the Hub."""
    cache.mkdir(exist_ok=True)
    return json.loads(hub.run(f"ASKED = {json.dumps(asked)!r}\n{LOAD}", cache, **options).splitlines()[-1])


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf:", "names no data set; write hf:NAME"),
        ("hf:a/b,test", "unknown part 'test'"),
        ("hf:a/b,split=", "nothing after 'split='"),
        ("hf:a/b,split=x,split=y", "a second 'split=y'"),
        ("hf:a/b,language=German", "got 'German'"),
        ("hf:a/b,config=x.{lang},language=de", "leave out language=, or {lang}"),
    ],
)
def test_a_name_that_is_written_wrong_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        HubName.from_text(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("configs", "patterns"),
    [
        (["xquad.en", "xquad.zh-Hant", "xquad.pt-br"], ["xquad.{lang}"]),
        (["en", "de", "sw"], ["{lang}"]),
        (["goldp_en", "goldp_fi"], ["goldp_{lang}"]),
        (["primary_task", "secondary_task"], []),
        (["train", "test", "dev", "all", "default"], []),
        (["xquad.en"], []),
    ],
)
def test_configurations_that_differ_in_the_language_are_seen(configs: list[str], patterns: list[str]) -> None:
    assert patterns_in(configs) == patterns


# -- objects --------------------------------------------------------------------------------------------------------


def objects() -> dict[str, Any]:
    own = {language: datasets.Dataset.from_list(rows(language)) for language in TEXTS}
    column = datasets.Dataset.from_list([{**row, "language": lang} for lang in TEXTS for row in rows(lang)])
    return {
        "a dictionary of data sets": own,
        "a DatasetDict of languages": datasets.DatasetDict(own),
        "a dictionary of DatasetDicts": {lang: datasets.DatasetDict({"validation": one}) for lang, one in own.items()},
        "a column": column,
        "a DatasetDict with a column": datasets.DatasetDict({"test": column}),
        "a stream": column.to_iterable_dataset(),
        "a stream of splits": datasets.IterableDatasetDict({"test": column.to_iterable_dataset()}),
        "a selection of rows": datasets.concatenate_datasets([column, column]).select(range(len(column))),
        "tensors": column.with_format("torch"),
    }


@pytest.mark.parametrize("name", objects())
def test_objects_are_read_as_the_same_records_in_files(name: str, from_files: Path) -> None:
    data, files = load_data(objects()[name], strict=True), load_data(str(from_files))
    assert data.languages == ("en", "de", "sw")
    assert data.fingerprint == files.fingerprint


def test_several_splits_are_refused_with_their_names() -> None:
    one = datasets.Dataset.from_list(rows("en"))
    splits = datasets.DatasetDict({"train": one, "validation": one})
    for held, name in ((splits, "data"), ({"en": splits}, "data['en']")):
        with pytest.raises(UsageError) as caught:
            load_data(held)
        expected = f"{name} is a DatasetDict that holds the splits train, validation: give one of them, such as"
        assert str(caught.value).startswith(f"{expected} {name}['validation']")


# -- folders in the layout of the Hub -------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("content", [XQUAD, BY_COLUMN, BY_SPLIT], ids=["configurations", "a column", "splits"])
def test_a_folder_in_the_layout_of_the_hub_is_read(content: dict[str, str], tmp_path: Path, from_files: Path) -> None:
    for name, text in content.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text(text, encoding="utf-8")
    shown = datasets.are_progress_bars_disabled()
    data = load_data(f"hf:{tmp_path / 'set'}", ["de"], needed=["en"])
    assert datasets.are_progress_bars_disabled() == shown
    assert data.languages == ("en", "de")
    assert data.fingerprint == load_data(str(from_files), ["en", "de"]).fingerprint
    with pytest.raises(UsageError, match=r"language 'fr' is not in hf:.*; available: en, de, sw"):
        load_data(f"hf:{tmp_path / 'set'}", ["fr"])
    with pytest.raises(UsageError, match="a folder on this machine, which has no revision"):
        load_data(f"hf:{tmp_path / 'set'},revision=main")


def test_languages_of_several_commits_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the cache may hold a configuration of an older commit."""
    for name, text in XQUAD.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text(text, encoding="utf-8")
    commits = iter(["a" * 40, "b" * 40])
    monkeypatch.setattr("xprobe.qa.hub._commit", lambda splits: next(commits))
    monkeypatch.setattr("xprobe.qa.hub._Source.load", _loaded_without_check)
    with pytest.raises(DataError, match=r"at several commits \(a{40}, b{40}\): try again with a network"):
        load_data(f"hf:{tmp_path / 'set'}", ["en", "de"])


def _loaded_without_check(source: Any, config: str) -> Any:
    return datasets.load_dataset(source.place, config)


def test_a_folder_with_a_comma_in_its_name_is_read(tmp_path: Path, from_files: Path) -> None:
    for name, text in XQUAD.items():
        (tmp_path / "my, set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my, set" / name).write_text(text, encoding="utf-8")
    assert in_folder("hf:my, set,split=validation", tmp_path) == f"hf:{tmp_path / 'my, set'},split=validation"
    assert HubName.from_text(f"hf:{tmp_path / 'my, set'},language=en").name == str(tmp_path / "my, set")
    assert load_data(f"hf:{tmp_path / 'my, set'}", ["en"]).languages == ("en",)
    assert in_folder("x" * 300, tmp_path) == "x" * 300


def test_a_folder_that_is_no_data_set_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xprobe.qa.hub._MOST_FILES", 3)
    for number in range(4):
        (tmp_path / "home" / str(number)).mkdir(parents=True)
        (tmp_path / "home" / str(number) / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=f"{tmp_path / 'home'} holds more than 3 files: name the folder of the data"):
        load_data(f"hf:{tmp_path / 'home'}")


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match=r"need the package datasets: pip install 'xprobe\[datasets\]'"):
        load_data("hf:google/xquad")


# -- the Hub --------------------------------------------------------------------------------------------------------


def test_every_layout_on_the_hub_gives_the_records_of_files(hub: Hub, tmp_path: Path, from_files: Path) -> None:
    everything, english = load_data(str(from_files)), load_data(str(from_files / "boats.en.json"))
    xquad, mlqa, column, split, alone = load(hub, tmp_path / "cache", [
        ("hf:google/xquad", None),
        ("hf:facebook/mlqa,config=mlqa.{lang}.{lang},split=test", None),
        ("hf:ada/by-column", None),
        ("hf:ada/by-split", None),
        ("hf:ada/english,language=en,split=validation", None),
    ])  # fmt: skip
    for found in (xquad, mlqa, column, split):
        assert found["languages"] == ["en", "de", "sw"], found
        assert (found["fingerprint"], found["problems"]) == (everything.fingerprint, [])
    assert alone["fingerprint"] == english.fingerprint
    assert xquad["files"] == ["xquad.en/validation", "xquad.de/validation", "xquad.sw/validation"]
    assert mlqa["files"] == ["mlqa.en.en/test", "mlqa.de.de/test", "mlqa.sw.sw/test"]
    assert (xquad["name"], xquad["revision"]) == ("hf:google/xquad", hub.repositories["google/xquad"].sha())


def test_only_the_languages_that_are_needed_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    (found,) = load(hub, tmp_path / "cache", [("hf:google/xquad", ["de"])])
    assert found["files"] == ["xquad.de/validation"]
    assert [one.split("/")[-2] for one in hub.requests if one.startswith("GET") and ".jsonl" in one] == ["xquad.de"]


def test_a_name_can_be_pinned_to_a_revision(tmp_path: Path) -> None:
    with fake_hub() as hub:
        moving = hub.add("ada/moving", XQUAD)
        changed = {name: text.replace("Ada", "Eva") for name, text in XQUAD.items()}
        hub.add("ada/moving", changed)
        old, new, unknown = load(hub, tmp_path / "cache", [
            (f"hf:ada/moving,revision={moving.sha(0)}", ["en"]), ("hf:ada/moving", ["en"]),
            ("hf:ada/moving,revision=v9", ["en"]),
        ])  # fmt: skip
        assert (old["revision"], new["revision"]) == (moving.sha(0), moving.sha(1))
        assert old["fingerprint"] != new["fingerprint"]
        assert unknown["error"].startswith("UsageError: the data set 'ada/moving' has no revision 'v9': name a branch")


def test_what_was_read_once_is_used_without_a_network(tmp_path: Path) -> None:
    with fake_hub() as hub:
        sha = hub.add("google/xquad", XQUAD).sha()
        online = load(hub, tmp_path / "cache", [("hf:google/xquad", ["en", "de"])])
        offline = load(hub, tmp_path / "cache", [("hf:google/xquad", None)], HF_HUB_OFFLINE="1")
        wanted = [(f"hf:google/xquad,revision={one}", None) for one in (sha, "a" * 40)]
    unreachable, pinned, other = load(hub, tmp_path / "cache", [("hf:google/xquad", None), *wanted])  # it is closed
    assert online == offline == [unreachable]
    assert {**pinned, "name": ""} == {**unreachable, "name": ""}
    assert other["error"].startswith("DataError: the Hub cannot be reached, and the cache holds 'google/xquad' only at")
    (never,) = load(hub, tmp_path / "other", [("hf:google/xquad", None)])
    assert never["error"].startswith("DataError: cannot read the data set 'google/xquad' (")
    assert never["error"].endswith("What was read once is kept, and is used again without one")


MESSAGES = {
    "hf:google/nothing": "the data set 'google/nothing' is not on the Hub, or is private",
    "hf:a b/c": "the data set 'a b/c' is not on the Hub, or is private",
    "hf:ada/private": "the data set 'ada/private' is not on the Hub, or is private",
    "hf:ada/gated": "the data set 'ada/gated' is gated: ask for access",
    "hf:ada/scripted": "the data set 'ada/scripted' is read by a Python script",
    "hf:google/xquad,config=xquad.fr": "has no configuration 'xquad.fr'; it has xquad.en, xquad.de, xquad.sw",
    "hf:google/xquad,config=x.{lang}": "has no configuration like 'x.{lang}'; it has xquad.en, xquad.de, xquad.sw",
    "hf:google/xquad,split=test": "has no split 'test' in 'xquad.en'; it has validation",
    "hf:facebook/mlqa": "choose one with config=, of mlqa.{lang}.{lang}, mlqa.en.{lang}",
    "hf:facebook/mlqa,config=mlqa.{lang}.{lang}": "choose one with split=, of test, validation",
    "hf:google/xquad,language=en": "choose one with config=, of xquad.en, xquad.de, xquad.sw",
    "hf:ada/english,split=validation": "does not say which language it is in: add language=CODE",
    "hf:ada/nameless,language=en": "no column 'id' and no column 'context' and no column 'question'",
}


def test_what_cannot_be_read_is_refused_in_one_line(hub: Hub, tmp_path: Path) -> None:
    found = load(hub, tmp_path / "cache", [(spec, None) for spec in MESSAGES])
    for (spec, message), result in zip(MESSAGES.items(), found, strict=True):
        assert message in result.get("error", ""), (spec, result)
        assert "\n" not in result["error"]
    private, gated = load(hub, tmp_path / "cache", [("hf:ada/private", None), ("hf:ada/gated", None)], token=TOKEN)
    assert private["languages"] == gated["languages"] == ["en", "de", "sw"]


# -- runs -----------------------------------------------------------------------------------------------------------

STUDY = """
import json, sys
import xprobe
from xprobe.errors import XprobeError
tiny, folder, asked = {arguments}
options = dict(limit=4, probes=(), bootstrap=20, permutations=20, setting="x-x")
for name, data, resume in asked:
    try:
        study = xprobe.run(tiny, data=data, out=f"{{folder}}/{{name}}", resume=resume, **options)
        entry = study.manifest.data
        print(json.dumps([entry.name, entry.revision, entry.records_sha256, study["x-x"].alpha["value"]]))
        study.evaluate(xprobe.AnswerSettings(max_new_tokens=1, normaliser="squad"))
    except XprobeError as error:
        print(json.dumps(str(error)))
print(len(xprobe.compare([f"{{folder}}/{{name}}" for name in ("files", "hub")]).studies))
"""


def test_a_run_keeps_to_the_revision_that_it_began_with(tiny: Path, tmp_path: Path, from_files: Path) -> None:
    runs = tmp_path / "runs"
    with fake_hub() as hub:
        first = hub.add("google/xquad", XQUAD).sha()
        asked: list[tuple[str, str, bool]] = [("files", str(from_files), False), ("hub", "hf:google/xquad", False)]
        code = STUDY.format(arguments=repr((str(tiny), str(runs), asked)))
        files, online, compared = map(json.loads, hub.run(code, tmp_path).splitlines()[-3:])
        assert files[2:] == online[2:]
        assert (online[:2], files[1], compared) == (["hf:google/xquad", first], "", 2)
        hub.add("google/xquad", {name: text.replace("Ada", "Eva") for name, text in XQUAD.items()})
        resumed = [("hub", "hf:google/xquad", True), ("files", "hf:google/xquad", True),
                   ("hub", str(from_files), True), ("files", f"hf:google/xquad,revision={first}", True)]  # fmt: skip
        code = STUDY.format(arguments=repr((str(tiny), str(runs), resumed)))
        again, moved, *others, _ = map(json.loads, hub.run(code, tmp_path).splitlines()[-5:])
        assert again == online
        assert "is now 'hf:google/xquad' (other bytes)" in moved
        assert [one[2] for one in others] == [files[2]] * 2


def test_the_command_checks_a_set_of_the_hub(
    hub: Hub, tmp_path: Path, from_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = (
        "import sys\nfrom xprobe_cli.main import main\nsys.exit(main(['data', 'check', 'hf:google/xquad', '--json']))"
    )
    found = json.loads(hub.run(call, tmp_path))
    assert main(["data", "check", str(from_files), "--json"]) == 0
    assert found["questions"] == json.loads(capsys.readouterr().out)["questions"]
    assert found["revision"] == hub.repositories["google/xquad"].sha()
