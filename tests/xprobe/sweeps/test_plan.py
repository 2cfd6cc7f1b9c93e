"""The file of a sweep: what it may say, and what each wrong entry is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import SMALL, write_toml

from xprobe.errors import RunFolderError, UsageError
from xprobe.scoring.settings import OracleSettings
from xprobe.sweeps.folder import SweepFolder
from xprobe.sweeps.plan import STAGE_SETTINGS, SweepPlan, plan_text, read_plan

ONE = [{"model": "org/one"}]


def test_a_plan_has_every_default_and_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "builtin").mkdir()  # a folder does not hide a name that xprobe knows
    models: list[dict[str, Any]] = [
        {"model": "own", "memory": "1.5 GiB", "gpus": 0.5, "batch_tokens": 100, "role": "base", "size": "0.5B"},
        {"model": "org/chat", "name": "chat", "base": "own", "dtype": "bfloat16", "template": "plain"},
    ]
    file = write_toml(
        tmp_path / "a.toml", models, {**SMALL, "data": "builtin"}, stages=["lenses", "oracle"],
        execution={"device": "cpu", "trust_remote_code": True}, resources={"cpus": 2, "hours": 1.5},
        oracle={"limit": 3, "spans": False}, slurm={"slurm_partition": "long"},
    )  # fmt: skip
    plan = read_plan(file)
    own, chat = plan.models
    assert (own.name, own.study.model, own.study.data) == ("own", str(tmp_path / "own"), "builtin")
    assert (own.resources.memory, own.resources.gpus, own.resources.cpus, own.size) == (3 * 2**29, 0.5, 2, 5e8)
    assert (own.execution.batch_tokens, own.execution.device, own.execution.trust_remote_code) == (100, "cpu", True)
    assert (chat.role, chat.base, chat.study.dtype, chat.study.template) == ("post-trained", "own", "bfloat16", "plain")
    assert list(plan.stages) == ["oracle", "lenses"]  # in the order of computation
    assert plan.settings_of("oracle") == OracleSettings(limit=3, spans=False)
    assert SweepPlan.from_dict(json.loads(plan_text(plan))) == plan


def test_every_later_stage_has_settings() -> None:
    assert {stage: type(kind()).__name__ for stage, kind in STAGE_SETTINGS.items()} == {
        "answers": "AnswerSettings", "oracle": "OracleSettings", "relevance": "RelevanceSettings",
        "patching": "PatchSettings", "lenses": "LensesSettings",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("models", "tables", "message"),
    [
        ([], {}, r"names no model"),
        ([{"name": "x"}], {}, r"models, table 1: model must be a text"),
        ([{"model": "a", "memroy": "1 GB"}], {}, r"models, table 1: unknown entry 'memroy'; known: .*memory"),
        ([{"model": "a", "limit": 3}], {}, r"unknown entry 'limit'"),  # questions are the same for all
        ([{"model": "x/a"}, {"model": "y/a"}], {}, r"two models are called a, in any case: give each its own name"),
        ([{"model": "x/a"}, {"model": "y/A"}], {}, r"two models are called a, in any case"),
        ([{"model": "a", "name": "../a"}], {}, r"name must be letters"),
        ([{"model": "a", "base": "b"}], {}, r"a: base must be the name of another model here, got 'b'"),
        ([{"model": "a", "role": "tuned"}], {}, r"a: unknown role 'tuned'; known: base, post-trained"),
        ([{"model": "a", "role": "post-trained"}, {"model": "b", "base": "a"}], {}, r"a: role .* contradicts base"),
        ([{"model": "a", "memory": "2 gigs"}], {}, r'a: memory must be a number of bytes, such as "2 GiB"'),
        ([{"model": "a", "size": "big"}], {}, r"a: size must be a number of parameters"),
        ([{"model": "a", "size": "0"}], {}, r"a: size must be a number of parameters"),
        ([{"model": "a", "memory": "0 GB"}], {}, r"a: memory must be a number of bytes"),
        ([{"model": "a", "base": "b"}, {"model": "b", "base": "a"}], {}, r"a: its base was itself post-trained from a"),
        ([{"model": "a", "gpus": -1}], {}, r"a: gpus must be a number of at least 0"),
        ([{"model": "a", "cpus": 0}], {}, r"a: cpus must be a whole number of at least 1"),
        ([{"model": "a", "tensor_parallel": True}], {}, r"a: tensor_parallel needs torchrun"),
        (ONE, {"stages": ["answer"]}, r"unknown stage 'answer'; known: answers, oracle"),
        (ONE, {"stages": "answers"}, r"stages must be a list"),
        (ONE, {"oracle": {"limit": 2}}, r"\[oracle\] has settings of a stage that stages does not name"),
        (ONE, {"stages": ["oracle"], "oracle": {"limit": 0}}, r"limit must be a whole number of at least 1"),
        (ONE, {"stages": ["oracle"], "oracle": {"limits": 1}}, r"oracle: unknown entry 'limits'; known: .*limit"),
        (ONE, {"study": {"model": "a"}}, r"study.model: each \[\[models\]\] table names its model"),
        (ONE, {"study": {"setting": ["en-x"]}}, r"study: unknown entry 'setting'; known: .*settings"),
        (ONE, {"study": {"probes": ["syntax"]}}, r"unknown probe 'syntax'"),
        (ONE, {"retries": -1}, r"retries must be a whole number of at least 0"),
        (ONE, {"sudy": {"limit": 2}}, r"unknown entry 'sudy'; known: .*study"),
    ],
)
def test_a_wrong_entry_is_named(models: Any, tables: Any, message: str, tmp_path: Path) -> None:
    file = write_toml(tmp_path / "wrong.toml", models, **{"study": {}, **tables})
    with pytest.raises(UsageError, match=rf"wrong\.toml: .*{message}"):
        read_plan(file)


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    for name in ("data", "hub"):
        (tmp_path / name).mkdir()
    models = [{"model": "one"}]
    for data, absolute in (
        ("data", str(tmp_path / "data")),
        ("hf:./hub,split=test", f"hf:{tmp_path / 'hub'},split=test"),
        ("hf:google/xquad", "hf:google/xquad"),
    ):
        plan = read_plan(write_toml(tmp_path / "a.toml", models, {"data": data}))
        assert plan["one"].study.data == absolute


def test_what_is_no_toml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.toml is no file"):
        read_plan(tmp_path / "nothing.toml")
    (tmp_path / "bad.toml").write_text("models = [")
    with pytest.raises(UsageError, match=r"bad\.toml is no TOML file"):
        read_plan(tmp_path / "bad.toml")


def test_a_folder_keeps_its_studies_and_takes_more_models(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    first = write_toml(tmp_path / "a.toml", ONE)
    SweepFolder.create(out, read_plan(first), first)
    more = write_toml(tmp_path / "b.toml", [*ONE, {"model": "org/two", "memory": "1 GB"}])
    SweepFolder.create(out, read_plan(more), more)
    assert [model.name for model in SweepFolder.open(out).plan.models] == ["one", "two"]
    other = write_toml(tmp_path / "c.toml", ONE, {**SMALL, "limit": 8})
    with pytest.raises(UsageError, match=r"another study of one \(limit: 4 before, 8 now\): choose another folder"):
        SweepFolder.create(out, read_plan(other), other)
    with pytest.raises(UsageError, match=r"holds something else than a sweep"):
        SweepFolder.create(tmp_path, read_plan(first), first)
    with pytest.raises(UsageError, match=r"holds no sweep"):
        SweepFolder.open(tmp_path)
    (out / "plan.json").write_text('{"format": 1, "models": 5}')
    with pytest.raises(RunFolderError, match=r"plan\.json is damaged"):
        SweepFolder.open(out)
    (out / "plan.json").write_text('{"format": 9}')
    with pytest.raises(UsageError, match=r"plan\.json: the plan has format 9, this version of xprobe reads 1"):
        SweepFolder.open(out)


def test_the_files_that_the_page_shows_are_plans(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    shown = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(shown) == 2
    for number, text in enumerate(shown):
        file = tmp_path / f"{number}.toml"
        file.write_text(text, encoding="utf-8")
        assert len(read_plan(file).models) == 3
    first = read_plan(tmp_path / "0.toml")
    assert {model.name: model.role for model in first.models} == {
        "Qwen2.5-7B": "base", "Qwen2.5-7B-Instruct": "post-trained", "small": "base"
    }  # fmt: skip


def test_the_page_on_forty_models_shows_what_the_benchmark_calculates() -> None:
    from benchmarks.large_sweep import tables

    page = (Path(__file__).parents[3] / "docs" / "large-sweeps.md").read_text(encoding="utf-8")
    assert tables(price=3.0) in page
