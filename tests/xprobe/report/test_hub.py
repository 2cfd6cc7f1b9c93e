"""A run as a data set repository: what the card says, what it does not say, and the upload to a Hub on this machine."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.fake_hub import TOKEN, Hub, fake_hub
from support.runs import raw_manifest, write_signed
from xprobe_cli.main import main

import xprobe
from xprobe.config import PROBE_COLUMNS
from xprobe.errors import UsageError
from xprobe.report.columns import describe_column, describe_table
from xprobe.report.export import export
from xprobe.report.hub import dataset_card, tables


@pytest.fixture(scope="module")
def study(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> xprobe.Study:
    """A run with every stage, of a model and of questions that lie in folders."""
    folder = tmp_path_factory.mktemp("secret-place")
    data = shutil.copytree(Path(xprobe.__file__).parent / "qa" / "builtin", folder / "boats")
    made = xprobe.run(
        tiny, data=data, setting=["en-x", "x-x"], languages=["en", "de"], limit=8, bootstrap=20, permutations=20,
        out=folder / "run", probes=("language",),
    )  # fmt: skip
    made = made.evaluate(xprobe.AnswerSettings(max_new_tokens=2, normaliser="squad"))
    made = xprobe.oracle(made, xprobe.OracleSettings(limit=2, spans=False, normaliser="squad"))
    return made.attribute(xprobe.RelevanceSettings(limit=2)).patch(xprobe.PatchSettings(limit=2)).read_lenses()


def front_matter(card: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_lists_every_table_and_says_what_each_column_is(study: xprobe.Study) -> None:
    card = dataset_card(study)
    names = [Path(name).stem for entry in study.manifest.stages.values() for name in entry.tables]
    head = front_matter(card)
    assert [(one["config_name"], one["data_files"]) for one in head["configs"]] == [(n, f"{n}.parquet") for n in names]
    assert (head["language"], "license" in head) == (["de", "en"], False)
    assert "**Licence**: none was chosen." in card
    for name, frame in tables(study).items():
        assert describe_table(name), name
        for column in frame.columns:
            assert describe_column(name, column), (name, column)
            assert re.search(rf"^\| `{column}` \| \S", card, re.MULTILINE)
    assert all(describe_column("probes", column) for column in PROBE_COLUMNS)
    assert f"| xprobe | {xprobe.__version__} |" in card
    assert study.manifest.data.records_sha256 in card
    alpha = study["en-x"].boundary["value"]
    assert f"| en-x | boundary | {alpha:.3f} [" in card


def test_a_license_is_named_if_it_is_chosen(study: xprobe.Study, tmp_path: Path) -> None:
    assert front_matter(dataset_card(study, "cc-by-4.0"))["license"] == "cc-by-4.0"
    for wrong in ("cc by", "x\ny: z", "", 4):
        with pytest.raises(UsageError, match="license must be an identifier"):
            dataset_card(study, wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="license is for the format hub, not for csv"):
        export(study, tmp_path, "csv", license="cc-by-4.0")


def test_no_folder_of_this_machine_is_in_card_or_tables(
    study: xprobe.Study, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "secret-place" in json.dumps(study.manifest.to_dict())  # it is in the manifest
    lens = {"lenses": [f"regression:{tiny}/lens.safetensors", "logit"]}
    paths = export(study, tmp_path, "hub")
    for path in paths:
        content = path.read_bytes()
        for text in ("secret-place", str(tiny.parent), str(Path.home()), TOKEN):
            assert text.encode() not in content, (path.name, text)
    card = paths[0].read_text(encoding="utf-8")
    assert f"**Model**: {tiny.name} (llama" in card
    assert "**Data**: boats;" in card
    frame = tables(study)["lenses"]
    renamed = frame.assign(lens=lens["lenses"][0])
    named = tables(with_table(study, "lenses.parquet", renamed))["lenses"]
    assert set(named["lens"]) == {"regression:lens.safetensors"}


def with_table(study: xprobe.Study, name: str, frame: pd.DataFrame) -> Any:
    """The run with another table in the place of one."""

    class Changed:
        manifest = study.manifest

        def table(self, asked: str) -> pd.DataFrame:
            return frame if asked == name else study.table(asked)

    return Changed()


def test_the_package_datasets_reads_every_table(
    study: xprobe.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    export(study, tmp_path / "made", "hub")
    for name, frame in tables(study).items():
        read = datasets.load_dataset(str(tmp_path / "made"), name, split="train")
        assert read.column_names == list(frame.columns)
        assert len(read) == len(frame)


# -- upload ---------------------------------------------------------------------------------------------------------

CALLS = """
import json, sys
from xprobe_cli.main import main
for arguments in {calls!r}:
    print("exit code", main(["export", {run!r}, *arguments]))
"""


def upload(hub: Hub, study: xprobe.Study, cache: Path, *calls: list[str], token: str | None = TOKEN) -> tuple[str, str]:
    """What `xprobe export` prints on stdout and stderr, for several calls in one process that talks to the Hub."""
    code = CALLS.format(calls=list(calls), run=str(study.path))
    mixed = hub.run(f"import sys\nsys.stderr = sys.stdout\n{code}", cache, token=token)
    return mixed, "\n".join(line for line in mixed.splitlines() if line.startswith("xprobe: error"))


def test_a_run_is_uploaded_and_read_back(study: xprobe.Study, tmp_path: Path) -> None:
    with fake_hub() as hub:
        printed, wrong = upload(
            hub, study, tmp_path, ["--to-hub", "phases", "--private", "--license", "mit"],
            ["--to-hub", "ada/phases", "--message", "Again", "--json"],
        )  # fmt: skip
        assert wrong == ""
        assert printed.count("exit code 0") == 2
        repository = hub.repositories["ada/phases"]
        assert f"{hub.address}/datasets/ada/phases/commit/{repository.sha()}" in printed
    assert (repository.private, repository.messages) == (True, ["Tables of xprobe", "Again"])
    _, first, last = repository.commits
    assert ("license: mit" in first["README.md"].decode(), "license:" in last["README.md"].decode()) == (True, False)
    assert {*last} == {".gitattributes", "README.md", *(f"{name}.parquet" for name in tables(study))}
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(last["layers.parquet"])), study.layers)


def test_tables_that_the_run_lacks_are_removed_and_other_files_stay(study: xprobe.Study, tmp_path: Path) -> None:
    manifest = raw_manifest(shutil.copytree(study.path, tmp_path / "run"))
    del manifest["stages"]["patching"]
    write_signed(tmp_path / "run", manifest)
    fewer = xprobe.load_study(tmp_path / "run")
    others = {"old.parquet": "x", "notes.txt": "mine", "data/train-00000.parquet": "x", "data/layers.parquet": "x"}
    with fake_hub() as hub:
        card = "---\ntags:\n- xprobe\n---\n"
        repository = hub.add("ada/phases", {"README.md": card, "patching.parquet": "x", **others})
        _, wrong = upload(hub, fewer, tmp_path, ["--to-hub", "ada/phases", "--revision", "second"])
        assert "POST /api/datasets/ada/phases/commit/second" in hub.requests
    assert wrong == ""
    last = repository.commits[-1]
    assert {name: last[name].decode() for name in others} == others
    assert "patching.parquet" not in last
    assert "layers.parquet" in last


@pytest.mark.parametrize(
    "held",
    [
        {"data.parquet": "x"},
        {"README.md": "# Mine, made with xprobe"},
        {"README.md": "---\ntags:\n- boats\n---\n- xprobe\n", "layers.parquet": "x"},
        {"README.md": "---\ntags: [\n---\n"},
    ],
)
def test_a_repository_with_something_else_is_refused(
    held: dict[str, bytes | str], study: xprobe.Study, tmp_path: Path
) -> None:
    with fake_hub() as hub:
        repository = hub.add("ada/boats", held)
        _, wrong = upload(
            hub, study, tmp_path, ["--to-hub", "ada/boats"], ["--to-hub", "ada/boats", "--revision", "new"]
        )
    assert wrong.splitlines() == 2 * [
        "xprobe: error: 'ada/boats' is there and holds files, but no card of xprobe: an upload could replace what is "
        "not a run of xprobe. Choose another name, which is made if it is not there"
    ]
    assert len(repository.commits) == 1
    assert repository.branches == {"main"}


def test_what_cannot_be_uploaded_is_said_in_one_line(study: xprobe.Study, tmp_path: Path) -> None:
    with fake_hub() as hub:
        _, without = upload(hub, study, tmp_path, ["--to-hub", "phases"], token=None)
        _, other = upload(hub, study, tmp_path, ["--to-hub", "bob/phases"], ["--to-hub", "a b"])
        assert hub.repositories == {}
    _, closed = upload(hub, study, tmp_path, ["--to-hub", "phases"])
    assert without == (
        "xprobe: error: you are not logged in to the Hugging Face Hub, or your token is not valid: hf auth login, or "
        "set HF_TOKEN"
    )
    assert other.splitlines()[0].startswith(
        "xprobe: error: you may not write to 'bob/phases' (You don't have the rights"
    )
    assert other.splitlines()[1].startswith("xprobe: error: 'a b' is no name of a repository: write NAME or OWNER/NAME")
    assert closed.startswith("xprobe: error: the run was not uploaded to 'phases': the Hub cannot be reached: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the folder (--out), or a data set of the Hub (--to-hub)"),
        (["--out", "x", "--private"], "--private is for an upload: add --to-hub NAME"),
        (["--out", "x", "--message", "Again"], "--message is for an upload: add --to-hub NAME"),
        (["--to-hub", "ada/x", "--format", "csv"], "--to-hub uploads the format hub, not csv: leave out --format"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], message: str, study: xprobe.Study, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(study.path), *arguments]) == 2
    assert message in capsys.readouterr().err
