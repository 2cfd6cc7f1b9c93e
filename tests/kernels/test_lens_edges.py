"""Rows and look-ups that are not there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.lens_cases import each_backend, each_dtype, random_case
from support.lens_truth import INF, NAN, STATISTICS, lens_here, same_bits
from xprobe_kernels import Unembedding


@each_backend
@each_dtype
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_a_broken_row_reads_nan_and_touches_no_other(backend, dtype, value, norm) -> None:
    case = replace(random_case(dtype, 9, 17, 2500, norm=norm, gamma=True, beta=True), final_rows=torch.full((9,), 8))
    hidden = case.hidden.clone()
    hidden[3, 5] = value
    broken, whole = replace(case, hidden=hidden).read(backend), case.read(backend)
    assert same_bits(broken, whole, torch.arange(9) != 3)
    for name in (*STATISTICS, "top_logits", "log_probability"):
        assert bool(getattr(broken, name)[3].isnan().all())
    assert broken.rank[3].tolist() == [0, 0]
    assert broken.top_ids is not None
    assert broken.top_ids[3].tolist() == [-1] * 5


@each_backend
def test_a_broken_final_row_costs_its_positions_the_divergence_alone(backend) -> None:
    case = replace(random_case(torch.float32, 6, 9, 300), final_rows=torch.tensor([4, 5, 4, 5, 4, 5]))
    hidden = case.hidden.clone()
    hidden[4] = NAN
    broken, whole = replace(case, hidden=hidden).read(backend), case.read(backend)
    assert broken.kl is not None
    assert whole.kl is not None
    assert broken.kl.isnan().tolist() == [True, False] * 3
    assert broken.kl[1::2].equal(whole.kl[1::2])
    assert same_bits(replace(broken, kl=None), replace(whole, kl=None), torch.arange(6) != 4)


@each_backend
def test_rows_may_all_be_broken(backend) -> None:
    case = random_case(torch.float32, 4, 9, 300)
    readout = replace(case, hidden=torch.full_like(case.hidden, NAN)).read(backend)
    assert all(bool(getattr(readout, name).isnan().all()) for name in STATISTICS)
    assert not bool(readout.rank.any())


@each_backend
@each_dtype
def test_a_look_up_of_minus_one_reads_nan_and_touches_no_other(backend, dtype) -> None:
    case = random_case(dtype, 9, 17, 2500, lookups=3)
    lookup = case.lookup.clone()
    lookup[::2, 1] = -1
    lookup[4] = -1
    gone = lookup == -1
    readout, whole = replace(case, lookup=lookup).read(backend), case.read(backend)
    assert bool(readout.logits[gone].isnan().all())
    assert bool(readout.log_probability[gone].isnan().all())
    assert bool((readout.rank[gone] == 0).all())
    assert readout.logits[~gone].equal(whole.logits[~gone])
    assert readout.rank[~gone].equal(whole.rank[~gone])
    assert same_bits(replace(readout, logits=whole.logits, rank=whole.rank), whole)


@each_backend
def test_look_ups_of_one_row_do_not_know_of_each_other(backend) -> None:
    case = random_case(torch.float32, 9, 17, 2500, lookups=4)
    together = case.read(backend)
    for a in range(4):
        for alone in (replace(case, lookup=case.lookup[:, a]), replace(case, lookup=case.lookup[:, a : a + 1])):
            readout = alone.read(backend)
            assert readout.logits.equal(together.logits[:, a : a + 1])
            assert readout.rank.equal(together.rank[:, a : a + 1])


@each_backend
def test_one_token_may_be_looked_up_twice(backend) -> None:
    case = random_case(torch.float32, 9, 17, 2500, lookups=1)
    readout = replace(case, lookup=case.lookup.expand(-1, 2)).read(backend)
    assert readout.logits[:, 0].equal(readout.logits[:, 1])
    assert readout.rank[:, 0].equal(readout.rank[:, 1])


@each_backend
def test_no_look_up_at_all_still_reads_the_row(backend) -> None:
    case = random_case(torch.float32, 9, 17, 2500)
    readout = replace(case, lookup=torch.zeros(9, 0, dtype=torch.int64)).read(backend)
    assert (readout.logits.shape, readout.rank.shape) == ((9, 0), (9, 0))
    assert readout.entropy.equal(case.read(backend).entropy)


@each_backend
@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 2)])
def test_no_rows_give_empty_outputs(backend, top_k, with_kl, shape) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    head = Unembedding(torch.ones(20, 8))
    lookup = torch.zeros(shape, dtype=torch.int64)
    readout = lens_here(
        torch.zeros(0, 8), head, lookup, top_k=top_k, final_rows=none if with_kl else None, backend=backend
    )
    assert readout.logits.shape == readout.rank.shape == (0, lookup[:, None].shape[-1] if lookup.ndim == 1 else 2)
    assert readout.logsumexp.shape == readout.entropy.shape == (0,)
    assert (readout.kl is not None) == with_kl
    assert (None if readout.top_ids is None else readout.top_ids.shape) == ((0, 3) if top_k else None)
