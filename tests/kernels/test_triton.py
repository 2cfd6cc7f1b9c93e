"""What only the Triton kernels have: tiles, splits and their merge, addresses, buffers, launch configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lens_cases import random_case
from support.lens_truth import Case
from support.triton_launches import DEVICE, SMALL, assert_right, launched, moved
from xprobe_kernels import Unembedding, capture, lens

pytest.importorskip("triton")

from xprobe_kernels import configs, triton_lens, triton_rows
from xprobe_kernels.configs import ARCHITECTURES, CONFIGS, choose, choose_splits
from xprobe_kernels.request import LensRequest

each_kernel = pytest.mark.parametrize("backend", ["triton", "workspace"])


# -- tiles and parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 60, 70])  # the last ones are more than there are tiles
def test_any_number_of_parts_merges_to_the_same_readout(splits) -> None:
    case = random_case(torch.float32, 19, 33, 700, bias=True, lookups=3, top_k=7)
    assert_right(case, launched(case, SMALL, splits))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, parts=2),
        replace(SMALL, parts=4, carries_top=True),
        replace(SMALL, block_m=64, block_n=128, block_k=64),
        replace(SMALL, descriptors=True),
        replace(SMALL, descriptors=True, parts=2, block_n=128),
        replace(SMALL, flat=True),
        replace(SMALL, flat=True, descriptors=True, parts=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [16, 40, 64])
def test_any_way_to_launch_reads_the_same(config, width) -> None:
    case = random_case(torch.float16, 37, width, 333, gamma=True, bias=True, softcap=20.0, top_k=5)
    assert_right(case, launched(case, config, 2))


@st.composite
def kernel_cases(draw: st.DrawFn) -> tuple[Case, int]:
    rows, width = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    vocabulary = draw(st.integers(1, 400))
    bias = None
    if draw(st.booleans()):
        random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        bias = torch.randn(vocabulary, generator=random)
        banned = torch.rand(vocabulary, generator=random) < draw(st.sampled_from([0.0, 0.5, 0.95]))
        banned[int(torch.randint(0, vocabulary, (), generator=random))] = False
        bias[banned] = -torch.inf
    case = random_case(
        draw(st.sampled_from([torch.float32, torch.float16])),
        rows,
        width,
        vocabulary,
        lookups=draw(st.sampled_from([1, 3])),
        spread=draw(st.sampled_from([0.5, 4.0, 60.0])),
        seed=draw(st.integers(0, 99)),
        norm=draw(st.sampled_from(["rms", "layer", "none"])),
        gamma=draw(st.sampled_from([None, True])),
        bias=bias,
        softcap=draw(st.sampled_from([None, 10.0])),
        top_k=min(4, vocabulary),
    )
    return case, draw(st.integers(1, 9))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(drawn=kernel_cases())
def test_the_rule_holds_for_any_shape_option_and_number_of_parts(drawn) -> None:
    case, splits = drawn
    assert_right(case, launched(case, SMALL, splits))


def test_the_token_itself_never_counts_though_its_own_logit_exceeds_the_threshold() -> None:
    case = moved(random_case(torch.float32, 19, 33, 700, lookups=3))
    request = LensRequest(case.hidden, case.head, case.lookup)
    prepared = triton_rows.prepare(request)
    lowered = replace(prepared, thresholds=prepared.thresholds - 1.5)
    partials = triton_lens.launch(request, lowered, SMALL, 3)
    z = case.head.normalize(case.hidden) @ case.head.weight.T
    others = torch.arange(700, device=DEVICE) != case.lookup[:, :, None]
    expected = ((z[:, None, :] > lowered.thresholds[:, :, None]) & others).sum(-1)
    assert partials.above.sum(0).tolist() == expected.tolist()


@each_kernel
def test_a_finite_row_that_overflows_in_its_operands_dtype_reads_nan(backend) -> None:
    case = moved(random_case(torch.float16, 3, 16, 50))
    loud = replace(case.head, gamma=torch.full((16,), 6e4, device=DEVICE, dtype=torch.float32))
    readout = lens(case.hidden, loud, case.lookup, top_k=3, backend=backend)
    assert readout.top_ids is not None
    assert bool(readout.logsumexp.isnan().all())
    assert bool((readout.rank == 0).all() and (readout.top_ids == -1).all())


def test_rows_that_need_no_norm_are_not_copied() -> None:
    case = moved(random_case(torch.float32, 5, 16, 50, norm="none"))
    assert triton_rows.prepare(LensRequest(case.hidden, case.head, case.lookup)).normed is case.hidden
    hidden = case.hidden.clone()
    hidden[2, 3] = torch.nan
    there = replace(case, hidden=hidden, final_rows=torch.arange(5, device=DEVICE))
    broken, whole = launched(there, SMALL, 2), launched(replace(there, hidden=case.hidden), SMALL, 2)
    assert broken.logsumexp.isnan().tolist() == [False, False, True, False, False]
    for name in ("logits", "logsumexp", "rank", "entropy", "top_ids", "kl"):
        assert getattr(broken, name)[[0, 1, 3, 4]].equal(getattr(whole, name)[[0, 1, 3, 4]])


# -- memory ----------------------------------------------------------------------------------------------


@each_kernel
def test_weights_beyond_two_billion_numbers_are_found(backend) -> None:
    """A weight whose rows lie 2^29 numbers apart: token 6 begins past 2^31. Memory never written takes no memory."""
    apart, width = 1 << 29, 24
    try:
        space = torch.empty(6 * apart + width, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no address space of 6 GiB here: {error}")
    weight = space.as_strided((7, width), (apart, 1))
    numbers = torch.randn(7, width, generator=torch.Generator().manual_seed(0)).half()
    weight.copy_(numbers)
    hidden = torch.randn(5, width, generator=torch.Generator().manual_seed(1)).half()
    lookup = torch.arange(5)[:, None] + 2
    expected = lens(hidden, Unembedding(numbers), lookup, top_k=7, backend="cpu")
    found = lens(hidden.to(DEVICE), Unembedding(weight), lookup.to(DEVICE), top_k=7, backend=backend)
    assert found.top_ids is not None
    assert expected.top_ids is not None
    assert found.top_ids.cpu().equal(expected.top_ids)
    assert found.rank.cpu().equal(expected.rank)
    assert float((found.logits.cpu() - expected.logits).abs().max()) < 1e-2


@pytest.mark.parametrize("carries_top", [False, True])
def test_partial_results_are_all_written_and_nothing_past_them(monkeypatch, carries_top) -> None:
    """Buffers start poisoned and lie between sentinels."""
    made: list[torch.Tensor] = []

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        poison = torch.nan if dtype.is_floating_point else -77
        flat = torch.full((64 + int(torch.Size(shape).numel()) + 64,), poison, dtype=dtype, device=DEVICE)
        flat[:64] = flat[-64:] = -5
        made.append(flat)
        return flat[64:-64].view(shape)

    def empty(splits: int, request: LensRequest, top_k: int, tiles: int = 0) -> triton_rows.Partials:
        kept, counts = (splits, request.rows, top_k), (splits, request.rows, request.lookups)
        return triton_rows.Partials(
            poisoned((splits, 5, request.rows), torch.float32),
            poisoned(counts, torch.int32),
            poisoned(kept, torch.float32),
            poisoned(kept, torch.int32),
            poisoned((request.rows, tiles), torch.float32),
        )

    monkeypatch.setattr(triton_rows.Partials, "empty", staticmethod(empty))
    case = random_case(torch.float32, 19, 33, 700, lookups=3, top_k=5)
    assert_right(case, launched(case, replace(SMALL, carries_top=carries_top), 3))
    assert len(made) == 2 * 5  # for the final rows and for the other ones
    for flat in made:
        assert bool((flat[:64] == -5).all() & (flat[-64:] == -5).all())
        inner = flat[64:-64]
        assert not bool(inner.isnan().any() if inner.is_floating_point() else (inner == -77).any())


def test_rows_of_a_call_do_not_depend_on_their_company() -> None:
    """The same bits for the same launch, whichever tile of rows a row falls in."""
    case = random_case(torch.float32, 40, 33, 700, lookups=1)
    whole = launched(case, SMALL, 3)
    tail = replace(case, hidden=case.hidden[16:], lookup=case.lookup[16:], final_rows=torch.arange(24))
    assert launched(tail, SMALL, 3).logsumexp.equal(whole.logsumexp[16:])


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "own_copy"), [("triton", 0), ("workspace", 16896 * 1024 * 2)])
@pytest.mark.parametrize("workspace_bytes", [16 << 20, 256 << 20])
def test_on_a_gpu_a_call_stays_within_the_workspace(backend, own_copy, workspace_bytes) -> None:
    """Beside its results and the partial sums of all splits; "workspace" also copies the normed rows."""
    rows, width, vocabulary = 16896, 1024, 128256
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16)
    lookup = torch.randint(0, vocabulary, (rows,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head = Unembedding(weight, norm="rms")
    lens(hidden, head, lookup, top_k=5, backend=backend, workspace_bytes=workspace_bytes)
    assert torch.cuda.max_memory_allocated() - before - own_copy < workspace_bytes + (24 << 20)


# -- launch choices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "interpreter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 17, 99, 257, 16896])
def test_every_architecture_gets_a_launch_that_fits(name, dtype, rows) -> None:
    config = choose(name, dtype, rows)
    assert config.fits(ARCHITECTURES[name], dtype.itemsize)
    assert config.block_m < 2 * max(rows, 16)


def test_an_unknown_architecture_takes_that_of_the_nearest_older_one() -> None:
    assert choose("sm_103", torch.bfloat16, 16896) == choose("sm_100", torch.bfloat16, 16896)
    assert choose("sm_121", torch.bfloat16, 16896) == choose(
        "sm_80", torch.bfloat16, 16896
    )  # sm_100's need more memory
    assert choose("gfx950", torch.bfloat16, 99) == choose("gfx942", torch.bfloat16, 99)
    assert choose("sm_70", torch.bfloat16, 16896) == choose("nonsense", torch.bfloat16, 16896) == configs.SAFE
    assert configs.SAFE.fits(configs.SMALLEST, 4)


def test_listed_launches_and_candidates_fit_their_architecture() -> None:
    for (name, itemsize), pair in CONFIGS.items():
        assert all(config.fits(ARCHITECTURES[name], itemsize) for config in pair)
    for name in ("sm_80", "sm_90", "gfx942"):
        found = configs.candidates(name, 2)
        assert len(found) == len(set(found)) > 5
        assert all(config.fits(ARCHITECTURES[name], 2) for config in found)
    assert any(config.descriptors for config in configs.candidates("sm_90", 2))
    assert not any(config.descriptors for config in configs.candidates("sm_80", 2))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(row_tiles=st.integers(1, 400), tiles=st.integers(1, 3000), slots=st.integers(1, 300))
def test_parts_cover_the_vocabulary_and_leave_little_idle(row_tiles, tiles, slots) -> None:
    parts = choose_splits(row_tiles, tiles, slots)
    each = -(-tiles // parts)
    assert 1 <= parts <= tiles
    assert (parts - 1) * each < tiles <= parts * each  # no part is empty
    waves = -(-row_tiles * parts // slots)
    plain = -(-row_tiles // slots) * tiles
    assert waves * each <= plain  # never worse than one part


def test_few_rows_are_spread_over_the_whole_card() -> None:
    assert choose_splits(1, 2004, 132) >= 100
    assert choose_splits(1, 3, 132) <= 3


def test_many_wide_rows_leave_room_in_the_cache() -> None:
    alone = choose_splits(132, 1002, 132)
    shared = choose_splits(132, 1002, 132, row_tile_bytes=1 << 20, level2=50 << 20)
    assert shared >= 6
    assert alone < shared


# -- refusals --------------------------------------------------------------------------------------------


@each_kernel
def test_a_dtype_that_the_kernels_do_not_take_is_named(backend) -> None:
    case = moved(random_case(torch.float64))
    with pytest.raises(ValueError, match=rf"{backend}.*takes torch.float32.*got torch.float64"):
        lens(case.hidden, case.head, case.lookup, backend=backend)
    assert lens(case.hidden, case.head, case.lookup).backend == "cpu"


def test_the_precision_asked_for_is_in_the_result() -> None:
    case = random_case(torch.float32, 5, 16, 100)
    assert case.read("triton", precision="tf32").precision == "tf32"


# -- capture ---------------------------------------------------------------------------------------------

SPANS = torch.tensor([[0, 0, 1], [2, 3, 9], [1, 8, 9], [2, 0, 9], [0, 5, 7]])


@pytest.mark.parametrize("width", [1, 17, 1024, 1500])
@pytest.mark.parametrize("into", [torch.float16, torch.float32])
def test_the_capture_kernel_copies_and_pools_as_torch_does(width, into) -> None:
    hidden = torch.randn(3, 9, width, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    space = torch.full((7, width + 3), -5.0, dtype=into, device=DEVICE)
    expected = torch.empty(5, width, dtype=into, device=DEVICE)
    capture(hidden, SPANS, space[1:6, :width], backend="triton")
    capture(hidden, SPANS, expected, backend="torch")
    found = space[1:6, :width]
    assert found[[0, 2]].equal(expected[[0, 2]])
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(into).eps, atol=1e-7)
    space[1:6, :width] = -5.0
    assert bool((space == -5.0).all())


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_captured_and_normed_rows_read_as_the_lens_reads_raw_ones(norm) -> None:
    case = moved(random_case(torch.float32, 5, 40, 300, norm=norm, gamma=True, beta=True))
    block = torch.zeros(3, 9, 40, device=DEVICE)
    for (batch, start, stop), row in zip(SPANS.tolist(), case.hidden, strict=True):
        if batch == 2 and start == 0:
            continue
        block[batch, start:stop] = row
    spans = SPANS[[0, 1, 2, 4]]
    raw, normed = torch.empty(2, 4, 40, device=DEVICE).unbind(0)
    capture(block, spans, raw, backend="triton")
    capture(block, spans, normed, case.head, backend="triton")
    lookup = case.lookup[:4]
    want = lens(raw, case.head, lookup)
    got = lens(normed, case.head.without_norm(), lookup)
    torch.testing.assert_close(got.log_probability, want.log_probability, rtol=1e-5, atol=1e-5)


def test_strided_hidden_states_and_a_dtype_of_its_own_are_captured() -> None:
    hidden = torch.randn(9, 3, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE).transpose(0, 1)
    out = torch.empty(5, 20, dtype=torch.float16, device=DEVICE)
    capture(hidden, SPANS, out, backend="triton")
    assert out[0].equal(hidden[0, 0].half())
    torch.testing.assert_close(out[1].float(), hidden[2, 3:9].mean(0), rtol=1e-3, atol=1e-3)


def test_the_kernel_says_when_it_cannot_capture() -> None:
    with pytest.raises(ValueError, match="backend 'triton' needs"):
        capture(torch.zeros(3, 9, 4).double(), SPANS, torch.zeros(5, 4).double(), backend="triton")
    with pytest.raises(ValueError, match="backend must be"):
        capture(torch.zeros(3, 9, 4), SPANS, torch.zeros(5, 4), backend="cuda")
    with pytest.raises(ValueError, match="head has width 7"):
        capture(torch.zeros(3, 9, 4), SPANS, torch.zeros(5, 4), Unembedding(torch.zeros(2, 7)))
