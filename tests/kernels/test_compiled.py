"""The compiled pass over tiles: where it comes from, what happens without it, and what it computes on its own."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xprobe_kernels
from support.lens_cases import random_case
from support.lens_truth import INF, NAN, STATISTICS, Truth, assert_ranks, assert_statistic, assert_top, same_bits
from torch import Tensor
from xprobe_kernels import compiled, cpu

CASE = random_case(torch.float32, softcap=30.0, bias=True)
COMPILER = next(filter(None, map(shutil.which, compiled.COMPILERS)), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Path:
    """As in a new process with an empty cache: the folder where the library will lie."""
    monkeypatch.setenv("XPROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("XPROBE_CC", raising=False)
    monkeypatch.setattr(compiled, "row_pass", compiled.functools.cache(compiled.row_pass.__wrapped__))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def program(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Makes a shell script the compiler that is asked for; returns the log of its calls."""

    def make(body: str) -> Path:
        script, log = tmp_path / "compiler", tmp_path / "log"
        script.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{body}\n')
        script.chmod(0o755)
        monkeypatch.setenv("XPROBE_CC", str(script))
        return log

    return make


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, str]]:
    """Threads and precision of products at every compiled pass."""
    seen: list[tuple[int, str]] = []
    row_pass = compiled.row_pass()
    assert row_pass is not None

    def watched(tile: compiled.Tile) -> None:
        seen.append((tile.threads, torch.backends.mkldnn.matmul.fp32_precision))
        row_pass(tile)

    monkeypatch.setattr(compiled, "row_pass", lambda: watched)
    return seen


# -- where it comes from ---------------------------------------------------------------------------------


def test_a_machine_with_a_compiler_has_it_and_says_nothing(fresh) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.row_pass() is not None
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


def test_it_serves_fp32_arithmetic_on_the_cpu_and_nothing_else(passes) -> None:
    CASE.read("cpu-eager")
    random_case(torch.float64).read("cpu")
    assert not passes
    CASE.read("cpu")
    assert len(passes) == 2 * math.ceil(4099 / cpu.TILE)  # rows and final rows
    random_case(torch.bfloat16).read("cpu")
    assert len(passes) == 4 * math.ceil(4099 / cpu.TILE)


def test_without_a_compiler_plain_torch_reads_the_tiles(fresh, monkeypatch) -> None:
    eager = CASE.read("cpu-eager")
    assert not same_bits(CASE.read("cpu"), eager)  # they do differ, in the last place
    for absent in ({"XPROBE_CC": "none"}, {"PATH": str(fresh)}):
        compiled.row_pass.cache_clear()
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            for name, value in absent.items():
                patch.setenv(name, value)
            assert same_bits(CASE.read("cpu"), eager)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo no licence >&2; exit 1", "no licence"),
        ('test "$1" = --version || { echo internal error >&2; exit 1; }', "internal error"),
        ('for last; do test "$name" = -o && echo garbage > "$last"; name=$last; done', "rowpass"),
        ('for last; do test "$name" = -o && exec cc -x c -shared -o "$last" /dev/null; name=$last; done', "xprobe_row"),
        (None, "no such program"),
    ],
    ids=["fails at once", "fails to compile", "makes garbage", "makes another library", "is not there"],
)
def test_a_compiler_that_fails_is_reported_once_and_plain_torch_reads_the_tiles(
    fresh, program, monkeypatch, body, reason
) -> None:
    if body is None:
        monkeypatch.setenv("XPROBE_CC", "/nowhere/cc")
    else:
        program(body)
    with pytest.warns(RuntimeWarning) as caught:
        readouts = [CASE.read("cpu") for _ in range(2)]
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert all(same_bits(readout, CASE.read("cpu-eager")) for readout in readouts)


def compilations(log: Path) -> int:
    return sum("-shared" in line for line in log.read_text().splitlines())


def test_it_is_compiled_once(fresh, program) -> None:
    log = program(f'exec {COMPILER} "$@"')
    for _ in range(2):
        compiled.row_pass.cache_clear()
        assert compiled.row_pass() is not None
    assert compilations(log) == 1


@pytest.mark.parametrize("damage", ["cut short", "one byte changed", "empty", "no library"])
def test_a_damaged_library_is_compiled_anew(fresh, program, monkeypatch, damage) -> None:
    log = program(f'exec {COMPILER} "$@"')
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_load", lambda path: path)  # a process loads a path once, whatever becomes of the file
        compiled.row_pass()
    (path,) = fresh.iterdir()
    whole = path.read_bytes()
    path.write_bytes({
        "cut short": whole[: len(whole) // 2],
        "one byte changed": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "empty": b"",
        "no library": b"text" + compiled.hashlib.sha256(b"text").digest(),
    }[damage])  # fmt: skip
    compiled.row_pass.cache_clear()
    assert compiled.row_pass() is not None
    assert compilations(log) == 2
    compiled.row_pass.cache_clear()
    assert compiled.row_pass() is not None
    assert compilations(log) == 2


@pytest.mark.parametrize("changed", ["source", "flags", "compiler", "processor"])
def test_what_it_depends_on_gives_it_another_name(fresh, program, monkeypatch, tmp_path, changed) -> None:
    program(f'exec {COMPILER} "$@"')
    assert compiled.row_pass() is not None
    if changed == "source":
        other = tmp_path / "other.c"
        other.write_text(compiled.SOURCE.read_text() + "\n")
        monkeypatch.setattr(compiled, "SOURCE", other)
    elif changed == "flags":
        monkeypatch.setattr(compiled, "FLAGS", ("-O2", *compiled.FLAGS[1:]))
    elif changed == "compiler":
        program(f'test "$1" = --version && echo 99.0 || exec {COMPILER} "$@"')
    else:
        monkeypatch.setattr(compiled, "_processor", lambda: "abacus")
    compiled.row_pass.cache_clear()
    assert compiled.row_pass() is not None
    assert len(list(fresh.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_done_without(fresh) -> None:
    fresh.parent.write_text("a file where the folder should be")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.row_pass() is not None


def run_python(script: str, **environment: str) -> subprocess.Popen[str]:
    kernels = str(Path(xprobe_kernels.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script],
        env=os.environ | {"PYTHONPATH": kernels} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def test_processes_that_start_at_once_do_not_disturb_each_other(fresh) -> None:
    script = "from xprobe_kernels import compiled; print(compiled.row_pass() is not None)"
    processes = [run_python(script) for _ in range(3)]
    assert [printed(process).strip() for process in processes] == ["True"] * 3
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


# -- threads and settings --------------------------------------------------------------------------------


def test_its_threads_are_torch_s_own_and_as_many_as_torch_was_given() -> None:
    script = """
import os, torch
from xprobe_kernels import Unembedding, lens
def threads(): return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
head, lookup = Unembedding(torch.ones(5000, 8)), torch.zeros(600, dtype=torch.int64)
def read(): lens(torch.ones(600, 8), head, lookup, backend="cpu")
start = threads()
read()
alone = threads()
torch.set_num_threads(3)
read()
three = threads()
torch.ones(3000, 3000).exp_() @ torch.ones(3000, 3000)
after = threads()
print(alone - start, three - start, after - start)
print(len({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line}))
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("no /proc here")
    assert printed(run_python(script, OMP_NUM_THREADS="2")).split() == ["0", "2", "2", "1"]


def test_the_number_of_threads_changes_no_bit() -> None:
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(swept(torch.linspace(-40, 40, 70 * 999).view(70, 999).sin() * 40, 5))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(left.equal(right) for left, right in zip(results[0], other, strict=True))


def test_products_are_not_rounded_and_the_caller_s_setting_comes_back(passes) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, inside in (("highest", ("none", "ieee")), ("medium", ("ieee",))):
            torch.set_float32_matmul_precision(setting)
            old = torch.backends.mkldnn.matmul.fp32_precision
            passes.clear()
            CASE.read("cpu")
            assert passes
            assert all(precision in inside for _, precision in passes)
            assert torch.backends.mkldnn.matmul.fp32_precision == old
            assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


# -- what it computes ------------------------------------------------------------------------------------


def swept(z: Tensor, k: int, widths: tuple[int, ...] = (999,)) -> tuple[Tensor, ...]:
    """Reads logits [r, v] tile by tile; top logits, top ids, peak, sum of exponentials, their weighted sum."""
    row_pass = compiled.row_pass()
    assert row_pass is not None
    rows, start, turn = z.shape[0], 0, 0
    top, ids = torch.full((rows, k), NAN), torch.full((rows, k), -7)
    peak = torch.full((rows,), -INF, dtype=torch.float64)
    total, weighted = torch.zeros(2, rows, dtype=torch.float64)
    while start < z.shape[1]:
        tile = z[:, start : start + widths[turn % len(widths)]].contiguous()
        sums = {"peak": peak, "exp": total, "exp_z": weighted}
        compiled.run(row_pass, tile, scale=1.0, start=start, top_k=k, top_logits=top, top_ids=ids, **sums)
        start, turn = start + tile.shape[1], turn + 1
    return top, ids, peak, total, weighted


def merged(z: Tensor, k: int, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The same from plain torch: top logits and top ids."""
    top, ids = torch.full((z.shape[0], k), NAN), torch.full((z.shape[0], k), -7)
    start = turn = 0
    while start < z.shape[1]:
        tile = z[:, start : start + widths[turn % len(widths)]].clone()
        cpu._merge_top(tile, start, top, ids)
        start, turn = start + tile.shape[1], turn + 1
    return top, ids


@pytest.mark.parametrize("read", [swept, merged], ids=["compiled", "eager"])
@pytest.mark.parametrize("widths", [(1,), (3, 40), (63,), (64, 65), (1000,)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 5, 32])
@pytest.mark.parametrize("kind", ["few values", "distinct", "rising", "falling", "mostly -inf", "all equal", "zeros"])
def test_top_k_lists_equals_by_rising_id_whatever_the_tiles(read, widths, k, kind) -> None:
    random = torch.Generator().manual_seed(k)
    values = {
        "few values": torch.randint(-3, 3, (9, 600), generator=random).float(),
        "distinct": torch.rand(9, 600, generator=random),
        "rising": torch.arange(600.0).expand(9, -1).clone(),
        "falling": -torch.arange(600.0).expand(9, -1).clone(),
        "mostly -inf": torch.where(torch.rand(9, 600, generator=random) < 0.03, 1.0, -INF),
        "all equal": torch.full((9, 600), 2.5),
        "zeros": torch.where(torch.rand(9, 600, generator=random) < 0.5, -0.0, 0.0),
    }[kind]
    top, ids = read(values, k, widths)[:2]
    known = values.sort(dim=-1, descending=True, stable=True)
    assert ids.equal(known.indices[:, :k])
    assert top.equal(known.values[:, :k])


def weights_of(z: Tensor) -> Tensor:
    """e^(z - max), as the pass leaves it for final rows."""
    z = z.clone()
    swept_fields = {name: torch.zeros(len(z), dtype=torch.float64) for name in ("exp", "exp_z", "rescale")}
    peak = torch.full((len(z),), -INF, dtype=torch.float64)
    row_pass = compiled.row_pass()
    assert row_pass is not None
    compiled.run(row_pass, z, scale=1.0, peak=peak, **swept_fields)
    return z


def test_exponentials_are_right_to_the_last_place() -> None:
    x = torch.cat([torch.linspace(-86.9, 0, 200001), -torch.logspace(-30, 0, 1000), torch.zeros(1)])
    truth = x.double().exp()
    assert float(((weights_of(x[None])[0] - truth) / truth).abs().max()) <= 2**-23
    ends = torch.tensor([[0.0, -87.5, -1000.0, -3e38, -INF]])
    assert weights_of(ends).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]


def test_the_soft_cap_is_right_to_the_last_places() -> None:
    x = torch.cat([torch.linspace(-12, 12, 200001), torch.logspace(-30, 0, 1000)])
    z = x[None].clone()
    row_pass = compiled.row_pass()
    assert row_pass is not None
    sums = {name: torch.zeros(1, dtype=torch.float64) for name in ("peak", "exp", "exp_z")}
    compiled.run(row_pass, z, scale=1.0, softcap=1.0, **sums)
    truth = x.double().tanh()
    assert float(((z[0] - truth) / truth).abs().nan_to_num(0).max()) <= 2 * 2**-23
    far = torch.tensor([[INF, -INF, 3e38, -3e38, 0.0, -0.0]])
    compiled.run(row_pass, far, scale=1.0, softcap=1.0, **sums)
    assert far.tolist() == [[1.0, -1.0, 1.0, -1.0, 0.0, 0.0]]


def test_neighbours_in_memory_stay_as_they_were() -> None:
    row_pass = compiled.row_pass()
    assert row_pass is not None

    def room(*shape: int, dtype: torch.dtype, value: float) -> tuple[Tensor, Tensor]:
        size = math.prod(shape)
        whole = torch.full((size + 256,), -7777, dtype=dtype)
        inside = whole[128 : 128 + size].view(shape)
        inside.fill_(value)
        return whole, inside

    whole, fields = {}, {}
    for name, shape, dtype, value in (
        ("z", (7, 131), torch.float32, 1.0),
        ("above", (7, 2), torch.int64, 0),
        ("top_logits", (7, 5), torch.float32, 0),
        ("top_ids", (7, 5), torch.int64, 0),
        *((name, (7,), torch.float64, 0.5) for name in ("peak", "exp", "exp_z", "rescale", "cross")),
    ):
        whole[name], fields[name] = room(*shape, dtype=dtype, value=value)
    fields["z"] += torch.rand(7, 131, generator=torch.Generator().manual_seed(0))
    lookup = torch.tensor([[-1, 130], [131, 0], [10**12, 5], [0, 130], [7, 7], [-1, -1], [131, 132]])
    finals = {"final_of": torch.zeros(7, dtype=torch.int64), "final_weights": torch.ones(1, 131)}
    finals |= {name: torch.ones(1, dtype=torch.float64) for name in ("final_rescale", "final_before")}
    z = fields.pop("z")
    read_only = {"lookup": lookup, "threshold": torch.full((7, 2), 1.5), "bias": torch.zeros(131), **finals}
    compiled.run(row_pass, z, scale=1.0, softcap=9.0, lookups=2, top_k=5, **read_only, **fields)
    for name, everything in whole.items():
        assert bool((everything[:128] == -7777).all()), name
        assert bool((everything[-128:] == -7777).all()), name
        assert not bool((everything[128:-128] == -7777).any()), name


@pytest.mark.parametrize("backend", ["cpu", "cpu-eager"])
def test_a_bias_that_is_no_number_is_not_hidden(backend) -> None:
    bias = torch.zeros(4099)
    bias[[0, 2000, 4098]] = NAN
    readout = random_case(torch.float32, bias=bias).read(backend)
    for name in ("logsumexp", "entropy", "kl"):
        assert bool(getattr(readout, name).isnan().all())


@pytest.mark.parametrize("tile", [1, 3, 7, 100])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("backend", ["cpu", "cpu-eager"])
def test_tiles_of_any_size_obey_the_rule_where_few_tokens_are_possible(monkeypatch, backend, tile, rows) -> None:
    bias = torch.where(torch.arange(101) % 7 < 6, -INF, 1.0)
    case = random_case(torch.float32, 6, 9, 101, bias=bias, top_k=32)
    monkeypatch.setattr(cpu, "TILE", tile)
    monkeypatch.setattr(cpu, "ROWS", rows)
    truth, readout = Truth(case), case.read(backend)
    for name in STATISTICS:
        assert_statistic(truth, backend, readout, name)
    assert_ranks(truth, backend, readout)
    assert_top(truth, backend, readout, 32)
