"""What ``lens`` returns, regime by regime; the call itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.lens_cases import REGIMES, each_backend, each_dtype, each_regime, judge, random_case, read, whole_numbers
from support.lens_truth import (
    BACKENDS,
    INF,
    STATISTICS,
    Truth,
    assert_ranks,
    assert_statistic,
    assert_top,
    lens_here,
    same_bits,
    worst,
)
from xprobe_kernels import Unembedding, cpu

# -- the rule --------------------------------------------------------------------------------------------


@each_regime
@each_dtype
@each_backend
@pytest.mark.parametrize("statistic", STATISTICS)
def test_no_statistic_is_further_from_the_truth_than_plain_torch(backend, dtype, regime, statistic) -> None:
    assert_statistic(judge(regime, dtype), backend, read(backend, regime, dtype), statistic)


@each_regime
@each_dtype
@each_backend
def test_rank_is_that_of_logits_within_the_error_of_plain_torch(backend, dtype, regime) -> None:
    assert_ranks(judge(regime, dtype), backend, read(backend, regime, dtype))


@each_regime
@each_dtype
@each_backend
def test_top_k_are_the_largest_logits_in_order(backend, dtype, regime) -> None:
    truth = judge(regime, dtype)
    assert_top(truth, backend, read(backend, regime, dtype), min(truth.case.top_k, truth.case.head.vocab_size))


@each_regime
@each_dtype
@each_backend
def test_outputs_are_fp32_or_as_wide_as_the_rows(backend, dtype, regime) -> None:
    case, readout = judge(regime, dtype).case, read(backend, regime, dtype)
    wide = torch.promote_types(case.hidden.dtype, torch.float32)
    rows, lookups, k = *case.lookup.shape, min(case.top_k, case.head.vocab_size)
    shapes = {
        "logits": (rows, lookups),
        "logsumexp": (rows,),
        "entropy": (rows,),
        "kl": (rows,),
        "top_logits": (rows, k),
    }
    for name, shape in shapes.items():
        value = getattr(readout, name)
        assert (name, value.dtype, tuple(value.shape)) == (name, wide, shape)
    assert (readout.backend, readout.precision) == (backend, "ieee")


@pytest.mark.parametrize("regime", [name for name in REGIMES if "row" in name or "norm" in name or "cap" in name])
@pytest.mark.parametrize("backend", ["cpu", "cpu-eager"])
def test_rows_rounded_for_matrix_units_obey_the_rule(monkeypatch, backend, regime) -> None:
    """What a processor with bf16 matrix units does; one without makes the same products in fp32."""
    truth = judge(regime, torch.bfloat16)
    monkeypatch.setattr(cpu, "matrix_units", lambda: False)
    plain = truth.case.read(backend)
    monkeypatch.setattr(cpu, "matrix_units", lambda: True)
    before = torch.backends.mkldnn.matmul.fp32_precision
    readout = truth.case.read(backend)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    for name in STATISTICS:
        assert_statistic(truth, backend, readout, name)
    assert_ranks(truth, backend, readout)
    assert_top(truth, backend, readout, plain.top_ids.shape[1])
    if regime == "rms norm with gamma":
        assert not same_bits(readout, plain)


@pytest.mark.skipif(cpu.matrix_units(), reason="matrix units take bf16 rows rounded after the norm")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", ["rms norm with gamma", "everything at once", "scattered banned tokens"])
def test_half_precision_rows_are_read_as_if_they_were_fp32(backend, dtype, regime) -> None:
    case = judge(regime, dtype).case
    wide = {
        name: value.float()
        for name in ("weight", "gamma", "beta", "bias")
        if (value := getattr(case.head, name)) is not None
    }
    wider = replace(case, hidden=case.hidden.float(), head=replace(case.head, **wide))
    assert same_bits(case.read(backend), wider.read(backend))


@pytest.mark.parametrize("tile", [1, 3, 7, 100])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("regime", ["rms norm", "rising", "banned"])
def test_cpu_tiles_of_any_size_obey_the_rule(monkeypatch, tile, chunk, regime) -> None:
    bias = torch.where(torch.arange(101) % 3 < 2, -INF, 1.0) if regime == "banned" else None
    case = random_case(torch.float32, 6, 9, 101, bias=bias, top_k=32)
    if regime == "rising":
        case.head.weight[:, 0] = torch.linspace(-40, 40, 101)
    monkeypatch.setattr(cpu, "TILE", tile)
    monkeypatch.setattr(cpu, "ROWS", chunk)
    truth, readout = Truth(case), case.read("cpu")
    for name in STATISTICS:
        assert_statistic(truth, "cpu", readout, name)
    assert_ranks(truth, "cpu", readout)
    assert_top(truth, "cpu", readout, 32)


@each_backend
@each_dtype
@pytest.mark.parametrize("offset", [0.0, 100.0, -10000.0, 1000000.0])
def test_softmax_does_not_see_an_offset_common_to_all_logits(backend, dtype, offset) -> None:
    """Whole-number logits are exact wherever they lie, so nothing excuses a digit lost in entropy or divergence."""
    case = replace(whole_numbers(dtype, 19, 7, 4500), final_rows=torch.arange(19) % 3)
    bias = torch.full((4500,), offset) + torch.arange(4500) % 3
    case = replace(case, head=replace(case.head, bias=bias, scale=1.0))
    truth = Truth(replace(case, head=replace(case.head, bias=bias - offset)))
    readout = case.read(backend, top_k=0)
    for name in ("entropy", "kl"):
        found, known = getattr(readout, name), truth.values[name]
        assert float(worst(found, known)) <= truth.error[name] + truth.rounding(backend, known)


# -- divergence from the final layer ---------------------------------------------------------------------


@each_backend
@each_dtype
@each_regime
def test_divergence_is_never_negative_and_vanishes_in_the_final_row(backend, dtype, regime) -> None:
    truth, readout = judge(regime, dtype), read(backend, regime, dtype)
    assert readout.kl is not None
    itself = truth.case.final_rows == torch.arange(len(truth.case.final_rows))
    assert bool((readout.kl >= 0).all())
    assert float(readout.kl[itself].max()) <= truth.rounding(backend, truth.values["entropy"]) + truth.eps * float(
        truth.noise.max()
    )


@each_backend
def test_divergence_of_two_tokens_by_hand(backend) -> None:
    head = Unembedding(torch.eye(2), norm="none")
    odds = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    final_rows = torch.tensor([1, 1])
    readout = lens_here(odds, head, torch.tensor([0, 0]), final_rows=final_rows, backend=backend)
    assert readout.kl is not None
    assert readout.kl.tolist() == pytest.approx(
        [0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), 0.0], abs=1e-6
    )
    assert readout.entropy.tolist() == pytest.approx([-0.25 * math.log(0.25) - 0.75 * math.log(0.75), math.log(2)])
    assert readout.log_probability.flatten().tolist() == pytest.approx([math.log(0.25), math.log(0.5)])


@each_backend
@pytest.mark.parametrize("final_rows", [[0] * 12, list(range(12)), list(range(11, -1, -1)), [7, 0] * 6], ids=str)
def test_any_row_may_be_the_final_one(backend, final_rows) -> None:
    case = replace(random_case(torch.float32, 12, 33, 2500, softcap=8.0), final_rows=torch.tensor(final_rows))
    assert_statistic(Truth(case), backend, case.read(backend), "kl")


# -- the call --------------------------------------------------------------------------------------------


@each_backend
@each_dtype
@pytest.mark.parametrize("regime", ["everything at once", "1025 rows", "scattered banned tokens"])
def test_a_repeated_call_gives_the_same_bits_and_leaves_its_arguments_alone(backend, dtype, regime) -> None:
    first, case = read(backend, regime, dtype), judge(regime, dtype).case
    arguments = {"hidden": case.hidden, "lookup": case.lookup, "final_rows": case.final_rows, **vars(case.head)}
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    assert same_bits(first, case.read(backend))
    assert all(arguments[name].equal(value) for name, value in before.items())


@each_backend
@pytest.mark.parametrize("regime", ["everything at once", "1025 rows"])
def test_a_small_workspace_obeys_the_same_rule(backend, regime) -> None:
    truth = judge(regime, torch.float32)
    readout = truth.case.read(backend, workspace_bytes=1 << 20)
    for name in STATISTICS:
        assert_statistic(truth, backend, readout, name)
    assert_ranks(truth, backend, readout)
    assert_top(truth, backend, readout, truth.case.top_k)


@each_backend
def test_a_row_alone_reads_the_same_within_the_rule(backend) -> None:
    case = random_case(torch.float32, 9, 33, 4099, gamma=True)
    truth, together = Truth(case), case.read(backend)
    for row in range(9):
        alone = replace(
            case,
            hidden=case.hidden[row : row + 1],
            lookup=case.lookup[row : row + 1],
            final_rows=torch.zeros(1, dtype=torch.int64),
        ).read(backend)
        for name in ("logits", "logsumexp", "entropy"):
            distance = worst(getattr(alone, name)[0], getattr(together, name)[row].double())
            assert float(distance) <= 2 * truth.allowed(backend, name)


@each_backend
def test_layout_in_memory_does_not_matter(backend) -> None:
    case = random_case(torch.float32, 9, 33, 2500)
    strided = replace(
        case,
        hidden=case.hidden.T.contiguous().T,
        head=replace(case.head, weight=case.head.weight.T.contiguous().T),
        lookup=case.lookup.T.contiguous().T,
        final_rows=case.final_rows[:, None].expand(-1, 3)[:, 1],
    )
    truth, readout = Truth(case), strided.read(backend)
    for name in STATISTICS:
        assert_statistic(truth, backend, readout, name)
    assert_ranks(truth, backend, readout)
    assert_top(truth, backend, readout, 5)


def test_auto_takes_the_first_backend_and_the_result_says_so() -> None:
    case = random_case(torch.float32)
    assert case.read("auto").backend == BACKENDS[0]
    assert same_bits(case.read("auto"), case.read(BACKENDS[0]))
    assert case.read("auto", precision="tf32").precision == "tf32"


@each_backend
def test_log_probability_is_logit_minus_logsumexp(backend) -> None:
    readout = read(backend, "everything at once", torch.float32)
    assert readout.log_probability.equal(readout.logits - readout.logsumexp[:, None])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "default dtype fp64": lambda: default_dtype(torch.float64),
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
}


@each_backend
def test_the_caller_s_torch_settings_change_nothing(backend) -> None:
    case = random_case(torch.float32, 9, 64, 2500, norm="layer", gamma=True, beta=True, bias=True)
    quiet = case.read(backend)
    for name, surroundings in SURROUNDINGS.items():
        with surroundings():
            inside = case.read(backend)
        assert same_bits(inside, quiet), name


@each_backend
def test_a_low_matmul_precision_elsewhere_is_no_excuse(backend) -> None:
    """torch.set_float32_matmul_precision("medium") lets some processors multiply fp32 in bf16; "ieee" stays ieee."""
    truth = judge("17 rows of width 576", torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        readout = truth.case.read(backend)
    finally:
        torch.set_float32_matmul_precision(before)
    for name in STATISTICS:
        assert_statistic(truth, backend, readout, name)
    assert_ranks(truth, backend, readout)


# -- the head as numbers ---------------------------------------------------------------------------------


def test_equal_heads_have_equal_fingerprints() -> None:
    case = random_case(torch.bfloat16, vocabulary=50, norm="layer", gamma=True, beta=True, bias=True)
    copy = {name: getattr(case.head, name).clone() for name in ("weight", "gamma", "beta", "bias")}
    strided = {"weight": case.head.weight.T.contiguous().T}
    assert replace(case.head, **copy).fingerprint() == case.head.fingerprint()
    assert replace(case.head, **strided).fingerprint() == case.head.fingerprint()


@pytest.mark.parametrize("changed", ["weight", "gamma", "beta", "bias", "eps", "scale", "softcap", "norm", "dtype"])
def test_any_other_number_gives_another_fingerprint(changed) -> None:
    case = random_case(torch.float32, vocabulary=50, norm="layer", gamma=True, beta=True, bias=True)
    other: Any = {"eps": 1e-5, "scale": 2.0, "softcap": 30.0, "norm": "rms"}.get(changed)
    if changed == "dtype":
        changed, other = "weight", case.head.weight.double()
    if other is None:
        other = getattr(case.head, changed).clone()
        other.view(-1)[-1] += 1.0
    assert replace(case.head, **{changed: other}).fingerprint() != case.head.fingerprint()
