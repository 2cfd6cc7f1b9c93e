"""The benchmark of whole runs measures what it says, on the CPU here; and gpu.py keeps what it found."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu_results, whole_run
from xprobe.config import DEFAULT_MODEL
from xprobe.errors import ModelError
from xprobe.models import loading


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    try:
        loading.resolve(DEFAULT_MODEL)
    except ModelError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("whole") / "run.json"
    some = ["--data", "builtin", "--questions", "6", "--dtype", "float32", "--device", "cpu"]
    some += ["--batch-tokens", "700,3000", "--seconds", "1", "--rounds", "2"]
    assert whole_run.main([str(out), "--shape", "tiny", *some]) == 0
    return json.loads(out.read_text())


def test_every_budget_is_measured_over_real_prompts_in_every_language(found) -> None:
    assert [rate["batch_tokens"] for rate in found["rates"]] == [700, 3000]
    assert found["rates"][0]["all"]["waves"] > found["rates"][1]["all"]["waves"]
    for rate in found["rates"]:
        whole = rate["all"]
        assert whole["examples"] == 6 * 12
        assert rate["examples_per_second"] == pytest.approx(rate["examples"] / rate["seconds"])
        assert rate["tokens_run"] < rate["tokens"]  # shared beginnings
        per_token = 2 * found["parameters_in_blocks"]
        lens = 2 * 4 * found["answer_positions"] * 49152 * 128
        assert whole["operations"] == pytest.approx(per_token * whole["tokens_run"] + lens)
        assert set(rate["stages"]) == {"forward", "lens", "write"}
        assert sum(rate["stages"][name] for name in ("forward", "lens")) <= rate["seconds"] * 1.01
        assert whole["seconds_extrapolated"] >= rate["seconds"] * 0.99


def test_the_lens_by_hand_agrees(found) -> None:
    against = found["against"]
    assert against["largest_difference_nats"] < 1e-4
    assert all(against["ratio"][name] > 0 for name in ("usual", "careful"))


def test_runs_are_gathered_and_waits_are_complained_of(found, tmp_path) -> None:
    (tmp_path / "library.json").write_text(json.dumps(found))
    assert "not run with the attention kernel" in gpu_results.add_run(tmp_path / "library.json", tmp_path)
    (tmp_path / "run.json").unlink()
    found = {**found, "rates": [{**rate, "attention_kernel": True} for rate in found["rates"]]}
    for name in ("run-demo", "run-large"):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
        assert gpu_results.add_run(tmp_path / f"{name}.json", tmp_path) is None
    assert len(json.loads((tmp_path / "run.json").read_text())["runs"]) == 2
    waiting = {**found, "rates": [{**found["rates"][0], "waits": ["rows.py:12 x 3"]}]}
    (tmp_path / "waiting.json").write_text(json.dumps(waiting))
    assert gpu_results.add_run(tmp_path / "waiting.json", tmp_path) == "waiting waits for the GPU: rows.py:12 x 3"
    assert gpu_results.add_run(tmp_path / "nothing.json", tmp_path) == "no figures of nothing"


@pytest.mark.parametrize(
    "options", [["--batch-tokens", "abc"], ["--batch-tokens", "0"], ["--questions", "0"], ["--seconds", "0"]]
)
def test_bad_options_are_refused_before_anything_is_loaded(options, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        whole_run.main([str(tmp_path / "out.json"), *options])
    assert ended.value.code == 2
    assert options[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        whole_run.main([str(tmp_path / "no" / "out.json")])
    assert "cannot write" in capsys.readouterr().err
