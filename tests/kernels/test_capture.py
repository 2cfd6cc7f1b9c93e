"""``capture``: one row copied bit for bit, a longer span as its mean, nothing else touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from xprobe_kernels import capture

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SENTINEL = -12345.0

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def block(dtype: torch.dtype, batch: int = 3, length: int = 11, width: int = 17, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spans(*triples: tuple[int, int, int]) -> Tensor:
    return torch.tensor(triples, dtype=torch.int64).reshape(-1, 3)


def poisoned(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, width), torch.nan, dtype=dtype)


def captured(hidden: Tensor, triples: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    out = poisoned(len(triples), hidden.shape[2], dtype or hidden.dtype)
    assert capture(hidden, triples, out) is None
    return out


def bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


@each_dtype
def test_a_single_position_is_copied_bit_for_bit(dtype) -> None:
    hidden = block(dtype)
    hidden[1, 4, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0]).to(dtype)
    triples = spans((1, 4, 5), (0, 0, 1), (2, 10, 11), (1, 4, 5))
    expected = torch.stack([hidden[1, 4], hidden[0, 0], hidden[2, 10], hidden[1, 4]])
    assert bits(captured(hidden, triples)).equal(bits(expected))


@each_dtype
@pytest.mark.parametrize("into", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_single_position_takes_the_buffer_s_dtype(dtype, into) -> None:
    hidden = block(dtype)
    assert captured(hidden, spans((2, 7, 8)), into).equal(hidden[2, 7][None].to(into))


@each_dtype
@pytest.mark.parametrize("into", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_longer_span_is_its_mean_rounded_once(dtype, into) -> None:
    hidden = block(dtype)
    out = captured(hidden, spans((0, 2, 9), (1, 0, 11), (2, 9, 11)), into).double()
    truth = torch.stack([part.double().mean(0) for part in (hidden[0, 2:9], hidden[1], hidden[2, 9:11])])
    fp32_sum = 4 * torch.finfo(torch.float32).eps * hidden.double().abs().max()
    assert bool(((out - truth).abs() <= fp32_sum + torch.finfo(into).eps / 2 * truth.abs() * 1.01 + 1e-7).all())


def test_a_mean_of_whole_numbers_is_exact() -> None:
    hidden = torch.arange(24.0).reshape(1, 8, 3)
    assert captured(hidden, spans((0, 0, 8), (0, 2, 4), (0, 5, 8))).tolist() == [
        [10.5, 11.5, 12.5],
        [7.5, 8.5, 9.5],
        [18.0, 19.0, 20.0],
    ]


def test_a_mean_of_large_fp16_values_does_not_overflow() -> None:
    hidden = torch.full((1, 64, 4), 60000.0, dtype=torch.float16)
    assert captured(hidden, spans((0, 0, 64))).tolist() == [[60000.0] * 4]


def test_a_long_bf16_span_does_not_lose_its_tail() -> None:
    hidden = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    hidden[0, 2048:] = 3.0
    assert captured(hidden, spans((0, 0, 4096))).tolist() == [[2.0, 2.0]]


def test_values_outside_a_span_have_no_say_in_it() -> None:
    hidden = block(torch.float32)
    expected = captured(hidden, spans((1, 3, 6), (1, 5, 6)))
    hidden[1, :3] = torch.nan
    hidden[1, 6:] = torch.inf
    hidden[0] = torch.nan
    assert captured(hidden, spans((1, 3, 6), (1, 5, 6))).equal(expected)


def test_rows_beside_the_buffer_are_left_alone() -> None:
    hidden = block(torch.float32)
    wide = torch.full((9, 17 + 6), SENTINEL)
    triples = spans((0, 1, 2), (1, 2, 6), (2, 0, 1))
    capture(hidden, triples, wide[4:7, 3:-3])
    assert wide[4:7, 3:-3].equal(captured(hidden, triples))
    wide[4:7, 3:-3] = SENTINEL
    assert bool((wide == SENTINEL).all())


def test_hidden_and_spans_come_back_unchanged_and_nothing_is_shared() -> None:
    hidden, triples = block(torch.float32), spans((0, 1, 2), (1, 2, 6))
    before = hidden.clone(), triples.clone()
    out = captured(hidden, triples)
    assert hidden.equal(before[0])
    assert triples.equal(before[1])
    out += 1.0
    assert hidden.equal(before[0])
    kept = out.clone()
    hidden.zero_()
    assert out.equal(kept)


def test_no_span_is_no_work() -> None:
    assert captured(block(torch.float32), spans()).shape == (0, 17)


def test_layout_in_memory_does_not_matter() -> None:
    hidden = block(torch.float32)
    triples = spans((0, 1, 2), (1, 2, 6), (2, 10, 11))
    strided = hidden.transpose(0, 2).contiguous().transpose(0, 2)
    assert captured(strided, triples).allclose(captured(hidden, triples), rtol=0, atol=1e-6)
    assert captured(strided, triples)[::2].equal(captured(hidden, triples)[::2])
    assert captured(hidden, triples.T.contiguous().T).equal(captured(hidden, triples))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 4), length=st.integers(1, 20), width=st.integers(1, 9))
def test_every_span_is_the_mean_of_its_positions(data, batch, length, width) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    hidden = block(dtype, batch, length, width, seed=data.draw(st.integers(0, 1000)))
    starts = data.draw(st.lists(st.tuples(st.integers(0, batch - 1), st.integers(0, length - 1)), max_size=12))
    triples = spans(*[(row, start, data.draw(st.integers(start + 1, length))) for row, start in starts])
    out = captured(hidden, triples)
    assert bool(out.isfinite().all())
    for found, (row, start, stop) in zip(out, triples.tolist(), strict=True):
        truth = hidden[row, start:stop].double().mean(0)
        allowed = (
            4 * torch.finfo(torch.float32).eps * hidden.double().abs().max() + torch.finfo(dtype).eps * truth.abs()
        )
        assert found.equal(hidden[row, start]) if stop - start == 1 else bool(((found - truth).abs() <= allowed).all())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(order=st.permutations(range(6)))
def test_spans_do_not_know_of_each_other(order) -> None:
    hidden = block(torch.float32)
    triples = spans((0, 0, 1), (0, 0, 11), (1, 3, 4), (1, 3, 7), (2, 10, 11), (2, 9, 11))
    assert captured(hidden, triples[list(order)]).equal(captured(hidden, triples)[list(order)])


HIDDEN = torch.zeros(2, 5, 4)
ONE = spans((0, 0, 1))


REFUSALS: list[tuple[Callable[[], object], tuple[str, ...]]] = [
    (lambda: capture([[[1.0]]], ONE, torch.zeros(1, 4)), ("hidden", "[B, T, D]", "list")),
    (lambda: capture(torch.zeros(5, 4), ONE, torch.zeros(1, 4)), ("hidden", "[B, T, D]", "[5, 4]")),
    (lambda: capture(HIDDEN.long(), ONE, torch.zeros(1, 4)), ("hidden", "floating", "torch.int64")),
    (lambda: capture(HIDDEN, [(0, 0, 1)], torch.zeros(1, 4)), ("spans", "[S, 3]", "list")),
    (lambda: capture(HIDDEN, ONE[0], torch.zeros(1, 4)), ("spans", "[S, 3]", "[3]")),
    (lambda: capture(HIDDEN, ONE[:, :2], torch.zeros(1, 4)), ("spans", "[S, 3]", "[1, 2]")),
    (lambda: capture(HIDDEN, ONE.int(), torch.zeros(1, 4)), ("spans", "int64", "torch.int32")),
    (lambda: capture(HIDDEN, ONE, [[0.0] * 4]), ("out", "[1, 4]", "list")),
    (lambda: capture(HIDDEN, ONE, torch.zeros(2, 4)), ("out", "[1, 4]", "[2, 4]")),
    (lambda: capture(HIDDEN, ONE, torch.zeros(1, 3)), ("out", "[1, 4]", "[1, 3]")),
    (lambda: capture(HIDDEN, ONE, torch.zeros(4)), ("out", "[1, 4]", "[4]")),
    (lambda: capture(HIDDEN, ONE, torch.zeros(1, 4, dtype=torch.int64)), ("out", "floating", "torch.int64")),
    (lambda: capture(HIDDEN, ONE, torch.zeros(1, 4, device="meta")), ("out", "meta", "cpu")),
]


@pytest.mark.parametrize(("call", "parts"), REFUSALS, ids=[" ".join(parts) for _, parts in REFUSALS])
def test_capture_refuses(call, parts) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the parts are the match)
        call()
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize(
    "wrong", [(2, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 5, 6), (0, 4, 6), (0, 2, 2), (0, 3, 2), (1, 0, 0)]
)
def test_a_span_outside_the_block_is_named_and_nothing_is_written(wrong) -> None:
    out = poisoned(3, 4, torch.float32)
    with pytest.raises(ValueError, match=r"spans\[1\]") as error:
        capture(HIDDEN, spans((0, 0, 1), wrong, (1, 0, 5)), out)
    assert str(list(wrong)) in str(error.value)
    assert "[2, 5]" in str(error.value)
    assert bool(out.isnan().all())
