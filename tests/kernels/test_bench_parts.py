"""The benchmark's parts: what is cut and said so, figures from times, settings, names in a figure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import xprobe_kernels
from xprobe_kernels.bench import figure, shapes
from xprobe_kernels.bench.command import Settings, SettingsError
from xprobe_kernels.bench.lens_speed import COPY, SQUARE, Large
from xprobe_kernels.bench.measure import Sample
from xprobe_kernels.bench.metrics import Ceilings, figures
from xprobe_kernels.bench.shapes import CPU, FEW, GPU, HEADS, MANY, Head, Limits, work

TINY = Head("tiny", "Tiny", layers=3, width=32, vocabulary=700, positions=8)


# shapes


@pytest.mark.parametrize(
    ("name", "rows"), [("llama-3-8b", 33 * 512), ("llama-3-70b", 81 * 512), ("smollm2-135m", 31 * 64)]
)
def test_a_gpu_does_every_shape_whole(name, rows) -> None:
    many, few = (work(HEADS[name], regime, GPU) for regime in (MANY, FEW))
    assert (many.rows, few.rows) == (rows, 3 * (HEADS[name].layers + 1))
    assert many.cut is few.cut is None
    assert "full size" in str(many)


def test_a_cpu_does_the_small_model_whole_and_says_what_it_cuts_of_a_large_one() -> None:
    assert work(HEADS["smollm2-135m"], MANY, CPU).cut is None
    large = work(HEADS["llama-3-8b"], MANY, CPU)
    assert large.operations <= CPU.scaled
    assert large.rows == 33
    assert "CUT" in str(large)
    assert "33 of 16896 rows" in str(large)


def test_the_vocabulary_is_cut_to_the_memory() -> None:
    cut = work(HEADS["llama-3-8b"], MANY, CPU, free_bytes=2 * 6 * 4096 * 1000)
    assert cut.vocabulary == 960  # 1000 entries fit; a multiple of 64
    assert "960 of 128256 vocabulary entries" in str(cut)


def test_rows_are_cut_to_whole_blocks() -> None:
    cut = work(TINY, MANY, Limits(whole=0, scaled=2 * 700 * 32 * 7))
    assert (cut.blocks, cut.positions) == (4, 1)
    assert work(TINY, MANY, Limits(whole=0, scaled=2 * 700 * 32 * 3)).rows == 3  # fewer than the blocks


# metrics


def test_figures_of_known_numbers() -> None:
    each = work(Head("x", "X", layers=0, width=10, vocabulary=100, positions=50), MANY, GPU)
    assert (each.operations, each.least_bytes(2)) == (2 * 50 * 100 * 10, 3000)
    found = figures(each, 2, 0.5, naive=2.0, product=0.25, ceilings=Ceilings(3000.0, 1e6))
    assert found == {
        "times_naive": 4.0, "share_of_product": 0.5, "times_floor": 0.5, "seconds": 0.5,
        "operations_per_second": 200_000.0, "bytes_per_second": 6000.0,
    }  # fmt: skip
    # the floor is the larger of the two: arithmetic takes 0.1 s, memory 1 s; with a slow product 10 s
    assert figures(each, 2, 20.0, naive=None, product=None, ceilings=Ceilings(3000.0, 1e4))["times_floor"] == 2.0


def test_ceilings_take_the_faster_product() -> None:
    large, each = Large(10, 500), work(TINY, MANY, GPU)
    samples = {COPY: Sample([0.5]), SQUARE: Sample([0.001])}
    assert large.ceilings(samples, each, None) == Ceilings(2000.0, 2e6)
    assert large.ceilings(samples, each, each.operations / 5e6) == Ceilings(2000.0, 5e6)
    assert large.ceilings(samples | {COPY: Sample(message="no")}, each, None) is None


def test_median_and_spread() -> None:
    sample = Sample([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (sample.median, sample.spread) == (3.0, 2 / 3)
    assert Sample([1.0, 2.0]).spread is None


# settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kernel": "run"}, "not available yet"),
        ({"kernel": "capture", "rivals": True}, "rivals are measured at their own task"),
        ({"kl": True, "rivals": True}, "rivals are measured at their own task"),
        ({"kernel": "nope"}, "kernel must be one of lens, capture, all, got 'nope'"),
        ({"shape": "gpt"}, "shape must be one of smollm2-135m"),
        ({"rows": "some"}, "rows must be one of"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"threads": -1}, "threads must be at least 1"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"backends": ("reference",)}, "backend must be one of"),
        ({"device": "nonsense"}, "device must be a torch device"),
        ({"device": "meta"}, "device must be cpu or cuda"),
        ({"device": "cuda:99"}, "does not exist"),
    ],
)
def test_wrong_settings_are_named(settings, said) -> None:
    with pytest.raises(SettingsError, match=said):
        Settings(**settings).check()


def test_a_cpu_measures_two_heads_unless_told() -> None:
    assert [head.name for head in Settings(device="cpu").heads()] == list(shapes.SMALL)
    assert [head.name for head in Settings(device="cpu", shape="all").heads()] == list(HEADS)


# names in a figure


def test_without_matplotlib_the_figure_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(figure.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install"):
        figure.check("x.png", ("lens",))


def test_names_in_a_figure_keep_their_distance() -> None:
    assert figure.move_apart([0.0, 1.0, 5.0], 0.5) == [0.0, 1.0, 5.0]
    assert figure.move_apart([1.0, 1.0, 1.0], 1.0) == [0.0, 1.0, 2.0]
    places = figure.move_apart([0.0, 0.1, 0.9, 1.0], 0.5)
    assert all(after - before >= 0.5 - 1e-9 for before, after in pairwise(places))


# environment


def test_the_commit_is_that_of_the_kernels_own_checkout_alone(tmp_path) -> None:
    """Installed into a virtual environment inside another project, the kernels lie in that project's checkout."""
    site = tmp_path / "site-packages"
    shutil.copytree(Path(xprobe_kernels.__file__).parent, site / "xprobe_kernels")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "another project"], check=True)
    code = (
        "import torch\nfrom xprobe_kernels.bench.environment import environment\n"
        "found = environment(torch.device('cpu'))\nprint(found['commit'], found['commit_changed'])"
    )

    def printed() -> list[str]:
        variables = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.split()

    assert printed() == ["None", "None"]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "the kernels are ours"], check=True)
    commit, changed = printed()
    assert (len(commit), changed) == (40, "False")
