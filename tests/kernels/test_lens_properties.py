"""Properties of the lens over shapes and options."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lens_cases import each_backend, random_case
from support.lens_truth import (
    DTYPES,
    GPU,
    INF,
    NAN,
    STATISTICS,
    Case,
    Truth,
    assert_ranks,
    assert_statistic,
    assert_top,
    same_bits,
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    vocabulary = draw(st.one_of(st.integers(1, 40), st.sampled_from([257, 2047, 2048, 2049, 4097])))
    lookups, seed = draw(st.integers(0, 3)), draw(st.integers(0, 2**20))
    dtype = draw(st.sampled_from([dtype for dtype in DTYPES if not (GPU and dtype == torch.float64)]))  # no kernel's
    bans = draw(st.sampled_from([None, 0.0, 0.3, 0.95]))
    random = torch.Generator().manual_seed(seed)
    bias = None
    if bans is not None:
        bias = torch.randn(vocabulary, generator=random)
        possible = int(torch.randint(0, vocabulary, (), generator=random))
        bias[(torch.rand(vocabulary, generator=random) < bans) & (torch.arange(vocabulary) != possible)] = -INF
    case = random_case(
        dtype,
        rows,
        width,
        vocabulary,
        lookups=lookups,
        spread=draw(st.sampled_from([0.0, 0.5, 4.0, 60.0])),
        seed=seed,
        norm=draw(st.sampled_from(["rms", "layer", "none"])),
        gamma=draw(st.sampled_from([None, True])),
        beta=draw(st.sampled_from([None, True])),
        bias=bias,
        scale=draw(st.sampled_from([1.0, 0.0625, 3.0] + ([] if bans else [-1.0]))),
        softcap=draw(st.sampled_from([None, 5.0, 30.0])),
        top_k=draw(st.integers(1, min(32, vocabulary))),
    )
    lookup = torch.where(torch.rand(case.lookup.shape, generator=random) < 0.2, -1, case.lookup)
    return replace(case, lookup=lookup, final_rows=torch.randint(0, rows, (rows,), generator=random))


# on a GPU every example is compiled anew
modest = settings(max_examples=10 if GPU else 60, deadline=None, derandomize=True)


@each_backend
@modest
@given(case=cases())
def test_the_rule_holds_for_any_shape_and_option(backend, case) -> None:
    truth, readout = Truth(case), case.read(backend)
    for name in STATISTICS:
        assert_statistic(truth, backend, readout, name)
    assert_ranks(truth, backend, readout)
    assert_top(truth, backend, readout, case.top_k)


@each_backend
@modest
@given(case=cases())
def test_outputs_stay_in_range(backend, case) -> None:
    readout, vocabulary = case.read(backend), case.head.vocab_size
    known = case.lookup >= 0
    rounding = 1e-5 * (1 + readout.logsumexp.abs())
    assert bool((readout.entropy >= 0).all())
    assert bool((readout.entropy <= math.log(vocabulary) + rounding).all())
    assert bool(((readout.rank >= 1) & (readout.rank <= vocabulary))[known].all())
    assert bool((readout.log_probability <= rounding[:, None])[known].all())
    assert readout.top_logits is not None
    assert bool((readout.top_logits[:, 0] <= readout.logsumexp + rounding).all())
    assert bool((readout.top_logits[:, 0] + math.log(vocabulary) >= readout.logsumexp - rounding).all())


@each_backend
@modest
@given(case=cases())
def test_the_jth_of_the_top_tokens_ranks_no_lower_than_j(backend, case) -> None:
    top_ids = case.read(backend).top_ids
    assert top_ids is not None
    rank = replace(case, lookup=top_ids).read(backend).rank
    assert bool((rank <= torch.arange(1, 1 + top_ids.shape[1])).all())


@each_backend
@modest
@given(case=cases(), seed=st.integers(0, 1000))
def test_the_order_of_the_vocabulary_is_only_a_matter_of_names(backend, case, seed) -> None:
    order = torch.randperm(case.head.vocab_size, generator=torch.Generator().manual_seed(seed))
    name_of = order.argsort()
    bias = None if case.head.bias is None else case.head.bias[order]
    lookup = torch.where(case.lookup >= 0, name_of[case.lookup], -1)
    renamed = replace(case, head=replace(case.head, weight=case.head.weight[order], bias=bias), lookup=lookup)
    truth, readout = Truth(case), renamed.read(backend)
    for name in STATISTICS:
        assert_statistic(truth, backend, readout, name)
    assert_ranks(truth, backend, readout)


@each_backend
@modest
@given(case=cases(), row=st.integers(0, 8), value=st.sampled_from([NAN, INF, -INF]))
def test_a_broken_row_never_spreads(backend, case, row, value) -> None:
    rows = case.hidden.shape[0]
    own = replace(case, final_rows=torch.arange(rows))
    hidden = case.hidden.clone()
    hidden[row % rows, 0] = value
    assert same_bits(replace(own, hidden=hidden).read(backend), own.read(backend), torch.arange(rows) != row % rows)
