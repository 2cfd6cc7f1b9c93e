"""``gpu.py --compare``: the stored figures of an H200 against a changed copy of them."""

from __future__ import annotations

import doctest
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_compare

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks" / "results" / "h200-2026-11-26"


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(STORED, tmp_path / "new"))


def change(folder: Path, name: str, edit: Callable[[Any], None]) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def variant(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in content["lens"][0]["variants"] if entry["name"] == name)


def compared(new: Path, capsys, *options: str) -> tuple[int, str]:
    code = gpu.main([str(new), "--steps", "none", "--compare", str(STORED), *options])
    return code, capsys.readouterr().out


def scaled(kernel: str, key: str, factor: float) -> Callable[[Any], None]:
    def edit(content: dict[str, Any]) -> None:
        variant(content, kernel)[key] *= factor

    return edit


def test_equal_figures_pass_and_every_shape_variant_and_run_is_listed(copy, capsys) -> None:
    code, out = compared(copy, capsys)
    assert code == 0
    for part in ("llama-3-8b/many: lens triton: of product 0.741 -> 0.741 (+0.0 %), x naive 12.7 -> 12.7 (+0.0 %)",
                 "gemma-2-9b/many: lens workspace", "llama-3-70b/many: naive bf16", "spans of 16, averaged: capture",
                 "run llama-3-8b: 16384 tokens per pass: of ceiling 0.546 -> 0.546 (+0.0 %), examples/s 533.3 -> 533.3",
                 "x usual 23.2 -> 23.2"):  # fmt: skip
        assert part in out
    assert "FELL" not in out
    assert "DIFFERENT" not in out


@pytest.mark.parametrize(("factor", "code"), [(0.94, 1), (0.96, 0), (1.2, 0)])
@pytest.mark.parametrize("key", ["share_of_product", "times_naive"])
def test_a_ratio_of_the_lens_may_lose_five_percent_and_no_more(copy, capsys, key, factor, code) -> None:
    change(copy, "bench.json", scaled("lens triton", key, factor))
    got, out = compared(copy, capsys)
    assert got == code
    assert out.count("FELL") == code
    assert ("FELL: llama-3-8b/many: lens triton: " in out) == bool(code)


def test_times_and_ratios_of_other_code_do_not_count(copy, capsys) -> None:
    change(copy, "bench.json", scaled("lens triton", "seconds", 3.0))
    change(copy, "bench.json", scaled("compiled naive bf16", "share_of_product", 0.5))
    change(copy, "run-8b.json", lambda run: run["rates"][0].update(examples_per_second=1.0))
    code, out = compared(copy, capsys)
    assert code == 0
    assert "compiled naive bf16: of product 0.464 -> 0.232 (-50.0 %)" in out
    assert "examples/s 471.1 -> 1.000 (-99.8 %)" in out


def test_falls_of_capture_and_whole_runs_count(copy, capsys) -> None:
    def slower_capture(content: dict[str, Any]) -> None:
        content["capture"][0]["variants"][-1]["times_whole"] *= 0.5

    change(copy, "bench.json", slower_capture)
    change(copy, "run-8b.json", lambda run: run["against"]["ratio"].update(usual=20.0))
    code, out = compared(copy, capsys)
    assert code == 1
    assert "FELL: llama-3-8b/single positions: capture: x whole 4.921 -> 2.460 (-50.0 %)" in out
    assert "FELL: run llama-3-8b: 16384 tokens per pass, against other lenses: x usual 23.2 -> 20.0 (-13.9 %)" in out


def test_a_lens_that_is_wrong_now_counts_as_fallen(copy, capsys) -> None:
    change(copy, "bench.json", lambda content: variant(content, "lens triton").update(status="wrong", message="rank 7"))
    code, out = compared(copy, capsys)
    assert code == 1
    assert "FELL: llama-3-8b/many: lens triton: wrong: rank 7" in out


@pytest.mark.parametrize("key", ["share_of_product", "times_naive"])
def test_a_ratio_that_is_not_a_number_counts_as_fallen(copy, capsys, key) -> None:
    change(copy, "bench.json", scaled("lens triton", key, float("nan")))
    code, out = compared(copy, capsys)
    assert code == 1
    assert "FELL: llama-3-8b/many: lens triton:" in out


def test_a_lens_that_is_missing_beside_others_counts_as_fallen(copy, capsys) -> None:
    def remove(content: dict[str, Any]) -> None:
        content["lens"][0]["variants"].remove(variant(content, "lens triton"))

    change(copy, "bench.json", remove)
    code, out = compared(copy, capsys)
    assert code == 1
    assert "FELL: llama-3-8b/many: lens triton: not measured now" in out


@pytest.mark.parametrize(("key", "value"), [("device", "NVIDIA H100"), ("triton", "3.7.1")])
def test_on_another_machine_falls_are_named_and_count_only_if_strict(copy, capsys, key, value) -> None:
    change(copy, "bench.json", lambda content: content["environment"].update({key: value}))
    change(copy, "bench.json", scaled("lens triton", "share_of_product", 0.5))
    code, out = compared(copy, capsys)
    assert code == 0
    assert out.count(f"DIFFERENT MACHINE: {key}: ") == 1
    assert f", {value} now" in out
    assert "FELL: llama-3-8b/many: lens triton" in out
    assert compared(copy, capsys, "--strict")[0] == 1


def test_another_size_is_not_compared(copy, capsys) -> None:
    def smaller(content: dict[str, Any]) -> None:
        content["lens"][0]["rows"] = 33
        variant(content, "lens triton")["share_of_product"] = 0.1

    change(copy, "bench.json", smaller)
    code, out = compared(copy, capsys)
    assert code == 0
    assert "llama-3-8b/many: lens triton: not compared, measured differently: rows 16896 -> 33" in out


def test_files_of_older_and_newer_code_are_both_read(copy, capsys) -> None:
    def renamed(run: dict[str, Any]) -> None:
        for rate in run["rates"]:
            rate["strategy"], rate["warnings"] = rate.pop("way"), rate.pop("remarks")

    change(copy, "run-8b.json", renamed)
    run = json.loads((copy / "run-8b.json").read_text(encoding="utf-8"))
    (copy / "run-8b.json").unlink()
    (copy / "run.json").write_text(json.dumps({"fingerprint": {}, "runs": [{"name": "llama-3-8b", **run}]}))
    code, out = compared(copy, capsys)
    assert code == 0
    assert "run llama-3-8b: 4096 tokens per pass: of ceiling 0.493 -> 0.493" in out
    assert "not measured now" not in out


def test_what_is_only_in_one_folder_is_named(copy, capsys) -> None:
    (copy / "bench-gemma-2-9b.json").unlink()
    change(copy, "bench-llama-3-70b.json", lambda content: content["lens"][0].update(name="other/many"))
    code, out = compared(copy, capsys)
    assert code == 0
    assert "gemma-2-9b/many: lens triton: not measured now" in out
    assert "other/many: lens triton: new, nothing stored" in out


def test_nothing_in_common_fails(copy, capsys) -> None:
    for path in (copy / "bench-gemma-2-9b.json", copy / "run-8b.json", copy / "bench-llama-3-70b.json"):
        path.unlink()
    change(copy, "bench.json", lambda content: content.update(lens=[], capture=[]))
    code, out = compared(copy, capsys)
    assert code == 1
    assert "no ratio of the project's own code is in both folders" in out


def test_a_file_that_is_no_result_is_named(copy, capsys) -> None:
    (copy / "bench.json").write_text("{}")
    code, out = compared(copy, capsys)
    assert code == 1
    assert "bench.json cannot be read as results" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "none"], "--steps none need --compare"),
        (["--strict"], "need --compare"),
        (["--steps", "none", "--compare", "/nowhere"], "/nowhere has no bench*.json or run*.json"),
        (["--steps", "nope"], "'nope' is not one of"),
    ],
)
def test_bad_usage_is_refused(tmp_path, capsys, arguments, words) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([str(tmp_path), *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_the_command_compares_two_folders_by_itself(copy) -> None:
    command = [sys.executable, "benchmarks/gpu.py", str(copy), "--steps", "none", "--compare", str(STORED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    assert "ratios of the project's own code fell by more than 5 %" in done.stdout


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(gpu_compare) == (0, 2)
