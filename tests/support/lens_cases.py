"""Regimes of rows and heads on which every lens backend is tested."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from xprobe_kernels import Readout, Unembedding

from support.lens_truth import BACKENDS, DTYPES, INF, Case, Truth


def random_case(
    dtype: torch.dtype,
    rows: int = 17,
    width: int = 33,
    vocabulary: int = 4099,
    *,
    lookups: int = 2,
    spread: float = 4.0,
    seed: int = 0,
    top_k: int = 5,
    **options: Any,
) -> Case:
    """Gaussian rows and vocabulary. Logits have standard deviation ``spread``; the last third of the rows is final."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    hidden, weight = 3 * normal(rows, width), normal(vocabulary, width) * (spread / math.sqrt(width))
    for name, size in (("gamma", width), ("beta", width), ("bias", vocabulary)):
        if options.get(name) is True:
            options[name] = (normal(size) * (0.2 if name == "gamma" else 1.0) + (name == "gamma")).to(dtype)
    lookup = torch.randint(0, vocabulary, (rows, lookups), generator=random)
    positions = max(1, rows // 3)
    final_rows = rows - 1 - torch.arange(rows) % positions
    return Case(hidden.to(dtype), Unembedding(weight.to(dtype), **options), lookup, final_rows, top_k)


def peaked(dtype: torch.dtype, lead: float) -> Case:
    """Every row is a row of the vocabulary. Its token leads by about ``lead`` and is looked up."""
    case = random_case(dtype, width=64)
    tokens = torch.arange(17) * 241
    factor = lead / float(case.head.weight.double()[tokens].norm(dim=-1).mean()) / 8
    weight = case.head.weight * factor
    lookup = torch.stack([tokens, case.lookup[:, 1]], 1)
    return replace(case, hidden=weight[tokens].clone(), head=replace(case.head, weight=weight), lookup=lookup)


def slope(dtype: torch.dtype) -> Case:
    """Logits rise along the vocabulary in even rows and fall in odd rows: the running maximum moves in each tile."""
    case = random_case(dtype)
    ramp = torch.linspace(-30, 30, 4099, dtype=torch.float64)
    weight, hidden = case.head.weight.clone(), case.hidden.clone()
    weight[:, 0] = ramp.to(dtype)
    hidden[:, 0] = torch.where(torch.arange(17) % 2 == 0, 1.0, -1.0).to(dtype)
    return replace(case, hidden=hidden, head=replace(case.head, weight=weight, norm="none"))


def equal_logits(dtype: torch.dtype) -> Case:
    case = random_case(dtype)
    return replace(case, head=replace(case.head, weight=case.head.weight[:1].repeat(4099, 1)))


def zero_rows(dtype: torch.dtype) -> Case:
    case = random_case(dtype, bias=True)
    return replace(case, hidden=torch.zeros_like(case.hidden))


def banned(dtype: torch.dtype, tokens: slice | list[int]) -> Case:
    """The given tokens have a bias of -inf. The first look-up of every row is one of them."""
    case = random_case(dtype, bias=True)
    bias, lookup = case.head.bias, case.lookup.clone()
    assert bias is not None
    bias[tokens] = -INF
    lookup[:, 0] = torch.arange(4099)[bias == -INF][torch.arange(17) % int((bias == -INF).sum())]
    return replace(case, lookup=lookup)


def far_from_zero(dtype: torch.dtype, offset: float) -> Case:
    """Every logit is near ``offset``, which changes the rounding but not the softmax."""
    return random_case(dtype, spread=1.0, bias=torch.full((4099,), offset))


def mixed(rows: torch.dtype, weights: torch.dtype) -> Case:
    case = random_case(weights, gamma=True)
    return replace(case, hidden=case.hidden.to(rows))


REGIMES: dict[str, Callable[[torch.dtype], Case]] = {
    "one of everything": lambda dtype: random_case(dtype, 1, 1, 1),
    "one token": lambda dtype: random_case(dtype, 5, 9, 1),
    "one dimension": lambda dtype: random_case(dtype, 7, 1, 300, norm="none"),
    "one row": lambda dtype: random_case(dtype, 1, 576, 2049),
    "one full tile": lambda dtype: random_case(dtype, 9, 17, 2048),
    "a tile and one token": lambda dtype: random_case(dtype, 9, 17, 2049),
    "17 rows of width 576": lambda dtype: random_case(dtype, 17, 576, 2051),
    "vocabulary of 50257": lambda dtype: random_case(dtype, 5, 17, 50257, top_k=32),
    "vocabulary of 151936": lambda dtype: random_case(dtype, 3, 8, 151936),
    "1025 rows": lambda dtype: random_case(dtype, 1025, 8, 301),
    "rms norm with gamma": lambda dtype: random_case(dtype, gamma=True),
    "rms norm with a large epsilon": lambda dtype: random_case(dtype, eps=10.0),
    "layer norm": lambda dtype: random_case(dtype, norm="layer", gamma=True, beta=True),
    "layer norm without parameters": lambda dtype: random_case(dtype, norm="layer"),
    "no norm": lambda dtype: random_case(dtype, norm="none", spread=1.0),
    "no norm with gamma and beta": lambda dtype: random_case(dtype, norm="none", gamma=True, beta=True, spread=1.0),
    "bias": lambda dtype: random_case(dtype, bias=True),
    "small scale": lambda dtype: random_case(dtype, scale=0.0625, spread=50.0, bias=True),
    "negative scale": lambda dtype: random_case(dtype, scale=-1.5, bias=True),
    "soft-cap": lambda dtype: random_case(dtype, softcap=30.0, spread=20.0),
    "soft-cap below most logits": lambda dtype: random_case(dtype, softcap=2.0),
    "everything at once": lambda dtype: random_case(
        dtype, norm="layer", gamma=True, beta=True, bias=True, scale=0.5, softcap=7.0, lookups=3, top_k=32
    ),
    "peaked rows": lambda dtype: peaked(dtype, 12.0),
    "rows with one possible token": lambda dtype: peaked(dtype, 300.0),
    "equal logits": equal_logits,
    "zero rows": zero_rows,
    "logits in the thousands": lambda dtype: random_case(dtype, spread=3000.0),
    "logits near 100": lambda dtype: far_from_zero(dtype, 100.0),
    "logits near -10000": lambda dtype: far_from_zero(dtype, -10000.0),
    "rising and falling logits": slope,
    "scattered banned tokens": lambda dtype: banned(dtype, slice(3, None, 7)),
    "first tile banned": lambda dtype: banned(dtype, slice(0, 2048)),
    "end of the vocabulary banned": lambda dtype: banned(dtype, slice(2000, None)),
    "every token but one banned": lambda dtype: banned(dtype, [t for t in range(4099) if t != 2500]),
    "fp32 rows, bf16 head": lambda _: mixed(torch.float32, torch.bfloat16),
    "bf16 rows, fp32 head": lambda _: mixed(torch.bfloat16, torch.float32),
}


@cache
def judge(regime: str, dtype: torch.dtype) -> Truth:
    return Truth(REGIMES[regime](dtype))


@cache
def read(backend: str, regime: str, dtype: torch.dtype) -> Readout:
    return judge(regime, dtype).case.read(backend)


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_tiled_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_regime = pytest.mark.parametrize("regime", REGIMES)


def whole_numbers(dtype: torch.dtype, rows: int, width: int, vocabulary: int, seed: int = 0) -> Case:
    """Small whole numbers: every logit is exact in every dtype and order of summation, and most logits tie."""
    random = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=random).to(dtype)

    lookup = torch.randint(0, vocabulary, (rows, 4), generator=random)
    head = Unembedding(whole(vocabulary, width), norm="none", bias=whole(vocabulary), scale=0.5)
    return Case(whole(rows, width), head, lookup, torch.arange(rows), top_k=32)
