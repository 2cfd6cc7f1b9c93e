"""Every kernel builds for every target on a machine without a GPU, and its product's loop does not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from xprobe_kernels import aot

KERNELS = Path(__file__).parents[2] / "kernels"


def compiled(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """Runs the command in a process of its own: the interpreter, once chosen, stays."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = folder / "aot.json"
    done = subprocess.run(
        [sys.executable, "-m", "xprobe_kernels.aot", "--json", str(file), *arguments],
        env=environment | {"PYTHONPATH": str(KERNELS)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done, json.loads(file.read_text()) if file.exists() else []


@pytest.mark.parametrize(
    "target", [target if target == "sm_90" else pytest.param(target, marks=pytest.mark.slow) for target in aot.TARGETS]
)
def test_every_kernel_builds_and_no_product_spills(tmp_path, target) -> None:
    done, reports = compiled(tmp_path, "--targets", target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {report["kernel"] for report in reports} == {
        *("lens_kernel", "prepare_kernel", "merge_kernel", "select_kernel", "order_kernel", "tiles_kernel"),
        *("row_kernel", "capture_kernel", "tree_attention_kernel", "continued_attention_kernel"),
    }
    for report in reports:
        assert report["error"] is None
        assert report["shared"] <= aot.ARCHITECTURES[target].shared
        assert report["registers"] > 0
        assert not report["loop_spills"]
    products = [report for report in reports if report["kernel"] in aot.PRODUCTS and "bf16" in report["label"]]
    wanted = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}[target]
    assert products
    few = [report for report in products if report["kernel"] == "continued_attention_kernel"]  # 16 queries: others
    assert all(report["matrix"] for report in few)
    assert {report["matrix"] for report in products if report not in few} == {wanted}


def test_an_unknown_target_is_named(tmp_path) -> None:
    done, _ = compiled(tmp_path, "--targets", "sm_12")
    assert done.returncode == 2
    assert "'sm_12' is not one of sm_80, sm_90" in done.stderr


SASS = """
.L_x_1:
        /*0100*/                   LDL R4, [R1] ;
        /*0110*/              @P0  BRA `(.L_x_1) ;
.L_x_2:
        /*0200*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0210*/                   {} ;
        /*0220*/              @P1  BRA `(.L_x_2) ;
        /*0230*/                   STL [R1+0x8], R9 ;
"""


def test_only_spills_within_the_product_s_loop_count() -> None:
    assert aot.loop_spills(SASS.format("IADD3 R2, R2, 0x1, RZ")) == 0
    assert aot.loop_spills(SASS.format("STL [R1+0x4], R7")) == 1


def test_a_report_that_failed_spilled_or_does_not_fit_is_not_good() -> None:
    fine = aot.Report("lens_kernel", "", "sm_90", 255, 16, 0, 100_000, "wgmma.mma_async")
    assert fine.good
    assert not aot.Report("lens_kernel", "", "sm_90", error="out of registers").good
    assert not aot.Report("lens_kernel", "", "sm_90", 255, 16, 2, 100_000).good
    assert not aot.Report("lens_kernel", "", "sm_90", 255, 0, 0, 300_000).good
    assert "FAILED: out of registers" in aot.table([aot.Report("lens_kernel", "x", "sm_90", error="out of registers")])
