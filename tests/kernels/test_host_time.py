"""How many kernels a call launches. Few rows take three launches, whatever is asked for besides KL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PASS = {"prepare_kernel": 1, "lens_kernel": 1, "merge_kernel": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the driver that does nothing is not used")
def test_calls_with_few_rows_launch_no_more_than_they_need(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    command = [sys.executable, str(ROOT / "benchmarks/host_time.py"), "--rounds", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    calls = json.loads(out.read_text())["calls"]
    for name in ("lens, 99 rows", "lens, 99 rows, top 5"):
        assert calls[name]["launches"] == PASS
        assert calls[name]["operations"] == 0
    assert calls["lens, 99 rows, KL"]["launches"] == {name: 2 for name in PASS}  # final rows, then the others
    blocks = calls["lens, 16896 rows"]["launches"]["lens_kernel"]
    assert calls["lens, 16896 rows"]["launches"] == {name: blocks for name in PASS}
    assert calls["capture, 96 single rows"]["launches"] == {"capture_kernel": 1}
    assert calls["capture, 96 single rows"]["operations"] == 0
