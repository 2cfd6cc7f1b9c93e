"""What ``lens`` returns, against fp64 arithmetic written here from the definitions.

The rule: a backend may be no further from fp64 truth than plain torch in the rows' dtype is, plus a small slack. Both
errors are the worst over the call. The slack is ``SLACK_ULPS`` units in the last place of the result and one eps of
|h| |w| in each logit, because plain torch may round the few logits of a short call almost correctly by chance. For the
same reason it may get a statistic right though its logits are off: a statistic may be off by as much as those errors
can move it, to first order (``Truth.sensitivity``). ``reference`` gets none of this: it must round the truth, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from xprobe_kernels import Readout, Unembedding, available_backends, cpu, lens

BACKENDS = available_backends("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STATISTICS = ["logits", "logsumexp", "entropy", "kl"]
INF, NAN = math.inf, math.nan

SLACK_ULPS = 8  # fp32 results; in units of eps * max(1, |result|)
TIE_ULPS = 4  # logits closer than this many eps * |h| * |w| count as tied: the bound that the backends state


# ---- fp64 truth and plain torch, both by the definitions -------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    hidden: Tensor  # [R, D]
    head: Unembedding
    lookup: Tensor  # [R, A]
    final_rows: Tensor  # [R]
    top_k: int = 5

    def read(self, backend: str, **changes: Any) -> Readout:
        options = {"top_k": min(self.top_k, self.head.vocab_size), "final_rows": self.final_rows, "backend": backend}
        return lens(self.hidden, self.head, self.lookup, **(options | changes))


def normed(hidden: Tensor, head: Unembedding) -> Tensor:
    """The final norm of rows [R, D], in their dtype."""
    if head.norm == "layer":
        hidden = functional.layer_norm(hidden, hidden.shape[-1:], eps=head.eps)
    if head.norm == "rms":
        hidden = functional.rms_norm(hidden, hidden.shape[-1:], eps=head.eps)
    if head.gamma is not None:
        hidden = hidden * head.gamma.to(hidden.dtype)
    if head.beta is not None:
        hidden = hidden + head.beta.to(hidden.dtype)
    return hidden


def capped(raw: Tensor, head: Unembedding) -> Tensor:
    return raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)


def raw_logits(hidden: Tensor, head: Unembedding, dtype: torch.dtype) -> Tensor:
    """Logits [R, V] before the soft-cap as a model in ``dtype`` has them: projection in it, the rest at least fp32."""
    work = torch.promote_types(dtype, torch.float32)
    raw = (normed(hidden.to(work), head).to(dtype) @ head.weight.to(dtype).T).to(work)
    return head.scale * (raw if head.bias is None else raw + head.bias.to(work))


def statistics(z: Tensor, lookup: Tensor, final_rows: Tensor) -> dict[str, Tensor]:
    """The floating-point fields of ``Readout`` from all logits [R, V], in their dtype."""
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    kl = torch.where(p[final_rows] > 0, p[final_rows] * (log_p[final_rows] - log_p), 0.0).sum(-1)
    return {"logits": z.gather(1, lookup.clamp(min=0)), "logsumexp": z.logsumexp(-1), "entropy": entropy, "kl": kl}


def worst(found: Tensor, truth: Tensor, dim: int | None = None) -> Tensor:
    """Largest distance, infinite where one of the two is no number; equal infinities and empty tensors are at 0."""
    if not found.numel():
        return torch.zeros(found.shape[:-1] if dim == -1 else (), dtype=torch.float64)
    distance = (found.double() - truth).abs()
    distance = torch.where(found.double() == truth, 0.0, distance).nan_to_num(nan=INF)
    return distance.amax() if dim is None else distance.amax(dim)


class Truth:
    """fp64 truth of a case, and how far a backend may be from it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.raw = raw_logits(case.hidden, case.head, torch.float64)
        self.z = capped(self.raw, case.head)
        self.values = statistics(self.z, case.lookup, case.final_rows)
        plain = capped(raw_logits(case.hidden, case.head, case.hidden.dtype), case.head)
        plain_values = statistics(plain, case.lookup, case.final_rows)
        self.error = {name: float(worst(plain_values[name], self.values[name])) for name in STATISTICS}
        self.eps = torch.finfo(torch.promote_types(case.hidden.dtype, torch.float32)).eps
        self.operands = normed(case.hidden.double(), case.head).norm(dim=-1)  # |h| of each row; times |w| below
        largest = float(case.head.weight.double().norm(dim=-1).max())
        #: by how much each row's logits [R] may be off, as far as plain torch shows
        self.noise = worst(plain, self.z, -1) + self.eps * self.operands * largest * abs(case.head.scale)
        self.gain = self.sensitivity()

    def sensitivity(self) -> dict[str, float]:
        """By how much each statistic may be off, to first order, if every logit is off by ``noise``."""
        log_p = self.z.log_softmax(-1)
        p, final = log_p.exp(), self.case.final_rows
        spread = torch.where(p > 0, p * (log_p + self.values["entropy"][:, None]).abs(), 0.0).sum(-1)
        ratio = (log_p[final] - log_p - self.values["kl"][:, None]).abs()
        of_final = torch.where(p[final] > 0, p[final] * ratio, 0.0).sum(-1)
        of_row = (p[final] - p).abs().sum(-1)
        return {
            "logits": float(self.noise.max()),
            "logsumexp": float(self.noise.max()),
            "entropy": float((self.noise * spread).max()),
            "kl": float((self.noise * of_row + self.noise[final] * of_final).max()),
        }

    def rounding(self, backend: str, truth: Tensor) -> float:
        """What rounding the result alone may cost."""
        size = max(1.0, float(truth[truth.isfinite()].abs().max())) if bool(truth.isfinite().any()) else 1.0
        if backend == "reference":  # fp64 inside, rounded once
            return (1e-12 if self.eps < 1e-10 else 0.5 * self.eps + 1e-12) * size
        return (1e-12 if self.eps < 1e-10 else SLACK_ULPS * self.eps) * size

    def allowed(self, backend: str, name: str) -> float:
        """The rule; the fp64 reference may be off by the rounding of its result alone."""
        plain = 0.0 if backend == "reference" else max(self.error[name], self.gain[name])
        return plain + self.rounding(backend, self.values[name])

    def rank_bounds(self, backend: str) -> tuple[Tensor, Tensor]:
        """Lowest and highest rank [R, A] that such errors and the stated bound on ties can explain."""
        lookup = self.case.lookup.clamp(min=0)
        raw, z = self.raw.gather(1, lookup), self.z.gather(1, lookup)
        if backend == "reference":
            noise, tie = 1e-12 * z.abs().clamp(min=1), torch.zeros_like(raw)
        else:
            noise = 2 * (self.noise[:, None] + self.rounding(backend, z))
            sizes = self.operands[:, None] * self.case.head.weight.double()[lookup].norm(dim=-1)
            tie = TIE_ULPS * self.eps * sizes * abs(self.case.head.scale)

        def above(threshold: Tensor) -> Tensor:
            return (self.z[:, None, :] > threshold[:, :, None]).sum(-1)

        itself = (z > z - noise).long()
        return 1 + above(capped(raw + tie, self.case.head) + noise), 1 + above(z - noise) - itself


def assert_statistic(truth: Truth, backend: str, readout: Readout, name: str) -> None:
    keep = truth.case.lookup >= 0 if name == "logits" else slice(None)
    found, known = getattr(readout, name)[keep], truth.values[name][keep]
    if known.numel():
        assert float(worst(found, known)) <= truth.allowed(backend, name)


def assert_ranks(truth: Truth, backend: str, readout: Readout) -> None:
    low, high = truth.rank_bounds(backend)
    known = truth.case.lookup >= 0
    assert readout.rank.dtype == torch.int64
    assert bool(((low <= readout.rank) & (readout.rank <= high))[known].all())


def assert_top(truth: Truth, backend: str, readout: Readout, k: int) -> None:
    ids, values = readout.top_ids, readout.top_logits
    assert ids is not None
    assert values is not None
    assert ids.dtype == torch.int64
    allowed = truth.allowed(backend, "logits") + truth.rounding(backend, truth.z)
    assert float(worst(values, truth.z.topk(k).values)) <= allowed
    assert float(worst(values, truth.z.gather(1, ids))) <= allowed
    ahead, behind = values[:, :-1], values[:, 1:]
    in_order = ids[:, :-1] < ids[:, 1:]
    if backend == "reference" and values.dtype != torch.float64:
        in_order[:] = True  # it orders by fp64 logits, which may differ where their fp32 copies are equal
        assert bool((ids.sort(dim=-1).values.diff() > 0).all())
    assert bool(((ahead > behind) | ((ahead == behind) & in_order)).all())


def same_bits(left: Readout, right: Readout, rows: Tensor | slice = slice(None)) -> bool:
    pairs = [(getattr(left, field.name), getattr(right, field.name)) for field in fields(Readout)]
    return all(
        torch.equal(a[rows].nan_to_num(nan=-1.5), b[rows].nan_to_num(nan=-1.5))
        for a, b in pairs
        if isinstance(a, Tensor)
    )


# ---- regimes ---------------------------------------------------------------------------------------------------------


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
    """Gaussian rows and vocabulary, logits of standard deviation ``spread``; the last third are final rows."""
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
    """Every row is a vocabulary row, whose logit leads by about ``lead``; that token is looked up."""
    case = random_case(dtype, width=64)
    tokens = torch.arange(17) * 241
    factor = lead / float(case.head.weight.double()[tokens].norm(dim=-1).mean()) / 8
    weight = case.head.weight * factor
    lookup = torch.stack([tokens, case.lookup[:, 1]], 1)
    return replace(case, hidden=weight[tokens].clone(), head=replace(case.head, weight=weight), lookup=lookup)


def slope(dtype: torch.dtype) -> Case:
    """Logits rise along the vocabulary in even rows and fall in odd ones: the running maximum moves in every tile."""
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
    """Tokens whose bias is -inf; the first look-up of every row is one of them."""
    case = random_case(dtype, bias=True)
    bias, lookup = case.head.bias, case.lookup.clone()
    assert bias is not None
    bias[tokens] = -INF
    lookup[:, 0] = torch.arange(4099)[bias == -INF][torch.arange(17) % int((bias == -INF).sum())]
    return replace(case, lookup=lookup)


def far_from_zero(dtype: torch.dtype, offset: float) -> Case:
    """Every logit is near ``offset``: softmax does not see it, rounding does."""
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
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_regime = pytest.mark.parametrize("regime", REGIMES)


# ---- the rule --------------------------------------------------------------------------------------------------------


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
    truth, readout = Truth(replace(case, head=replace(case.head, bias=bias - offset))), case.read(backend)
    for name in ("entropy", "kl"):
        found, known = getattr(readout, name), truth.values[name]
        assert float(worst(found, known)) <= truth.error[name] + truth.rounding(backend, known)


# ---- ties ------------------------------------------------------------------------------------------------------------


def whole_numbers(dtype: torch.dtype, rows: int, width: int, vocabulary: int, seed: int = 0) -> Case:
    """Small whole numbers: every logit is exact in every dtype and in any order of summation, and most of them tie."""
    random = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=random).to(dtype)

    lookup = torch.randint(0, vocabulary, (rows, 4), generator=random)
    head = Unembedding(whole(vocabulary, width), norm="none", bias=whole(vocabulary), scale=0.5)
    return Case(whole(rows, width), head, lookup, torch.arange(rows), top_k=32)


@each_backend
@each_dtype
@pytest.mark.parametrize("vocabulary", [1, 32, 100, 2049, 4500])
def test_exact_ties_rank_together_and_list_the_lowest_id_first(backend, dtype, vocabulary) -> None:
    case = whole_numbers(dtype, 19, 7, vocabulary)
    z = raw_logits(case.hidden, case.head, torch.float64)
    readout, k = case.read(backend), min(32, vocabulary)
    top = z.sort(dim=-1, descending=True, stable=True)
    assert readout.logits.double().equal(z.gather(1, case.lookup))
    assert readout.rank.equal(1 + (z[:, None, :] > z.gather(1, case.lookup)[:, :, None]).sum(-1))
    assert readout.top_ids is not None
    assert readout.top_ids.equal(top.indices[:, :k])
    assert readout.top_logits is not None
    assert readout.top_logits.double().equal(top.values[:, :k])


def duplicated(dtype: torch.dtype, width: int, vocabulary: int, rows: int, **options: Any) -> tuple[Case, Tensor]:
    """A vocabulary of 11 distinct rows, each there many times, and the ranks [R, A] that leave duplicates tied."""
    case = random_case(dtype, rows, width, 11, lookups=1, spread=1.0, **options)
    random = torch.Generator().manual_seed(1)
    copy_of = torch.randint(0, 11, (vocabulary,), generator=random)
    lookup = torch.randint(0, vocabulary, (rows, 8), generator=random)
    z = raw_logits(case.hidden, case.head, torch.float64)[:, copy_of]
    ranks = 1 + (z[:, None, :] > z.gather(1, lookup)[:, :, None]).sum(-1)
    bias = None if case.head.bias is None else case.head.bias[copy_of]
    return replace(case, head=replace(case.head, weight=case.head.weight[copy_of], bias=bias), lookup=lookup), ranks


@each_backend
@each_dtype
@pytest.mark.parametrize("width", [1, 17, 64, 576])
@pytest.mark.parametrize("rows", [1, 33])
def test_duplicates_of_a_token_never_rank_above_it(backend, dtype, width, rows) -> None:
    case, ranks = duplicated(dtype, width, 2500, rows, norm="rms" if width > 1 else "none")
    assert case.read(backend, top_k=0, final_rows=None).rank.equal(ranks)


@each_backend
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 0.5},
        {"softcap": 30.0},
        {"scale": -3.0},
        {"scale": 0.01},
        {"norm": "layer", "gamma": True, "beta": True},
    ],
    ids=str,
)
def test_duplicates_tie_under_every_option(backend, options) -> None:
    case, ranks = duplicated(torch.float32, 64, 2500, 33, **options)
    assert case.read(backend, top_k=0, final_rows=None).rank.equal(ranks)


@each_backend
@pytest.mark.parametrize("offset", [-3.0, 100.0, 1000.0])
def test_duplicates_tie_when_the_bias_dwarfs_the_projection(backend, offset) -> None:
    case, ranks = duplicated(torch.float32, 64, 2500, 500, bias=torch.full((11,), offset))
    z = raw_logits(case.hidden, case.head, torch.float64)
    rounding = (
        2 * TIE_ULPS * torch.finfo(torch.float32).eps * (abs(offset) + 10)
    )  # of the sum: distinct logits this close may tie
    least = 1 + (z[:, None, :] > z.gather(1, case.lookup)[:, :, None] + rounding).sum(-1)
    rank = case.read(backend, top_k=0, final_rows=None).rank
    assert bool(((least <= rank) & (rank <= ranks)).all())


@each_backend
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, 1e6])
def test_no_token_ranks_behind_itself(backend, offset) -> None:
    case = random_case(torch.float32, 500, 64, 50, spread=30.0, bias=torch.full((50,), offset))
    best = raw_logits(case.hidden, case.head, torch.float64).argmax(-1)
    assert bool((replace(case, lookup=best).read(backend).rank == 1).all())


@each_backend
@each_dtype
def test_equal_logits_rank_first_and_spread_evenly(backend, dtype) -> None:
    readout = read(backend, "equal logits", dtype)
    assert bool((readout.rank == 1).all())
    assert readout.entropy.tolist() == pytest.approx([math.log(4099)] * 17, rel=1e-6)


@each_backend
def test_minus_zero_ties_with_zero(backend) -> None:
    weight = torch.tensor([-1.0, -0.0, 0.0, -0.0, -2.0] + [-3.0] * 35)[:, None]
    case = Case(
        torch.ones(1, 1), Unembedding(weight, norm="none"), torch.tensor([[1, 2]]), torch.zeros(1, dtype=torch.int64)
    )
    readout = case.read(backend)
    assert readout.top_ids is not None
    assert readout.top_ids.tolist() == [[1, 2, 3, 0, 4]]
    assert readout.rank.tolist() == [[1, 1]]


@each_backend
def test_the_soft_cap_does_not_widen_ties(backend) -> None:
    """Logits 0.02 apart are no tie for rows of this size, however close together the soft-cap puts them."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.zeros(1, 64)
    hidden[0, 0] = 24.0
    weight = torch.randn(2000, 64, generator=random) * 4
    weight[:, 0] = torch.linspace(100, 140, 2000) / 24
    lookup = torch.arange(0, 2000, 50)[None]
    readout = lens(hidden, Unembedding(weight, norm="none", softcap=30.0), lookup, backend=backend)
    assert readout.rank.equal(2000 - lookup)


# ---- top-k -----------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("vocabulary", [32, 33, 150, 2050])
def test_a_shorter_list_is_the_beginning_of_a_longer_one(backend, vocabulary) -> None:
    case = random_case(torch.float32, 5, 9, vocabulary)
    longest = case.read(backend, top_k=32)
    assert longest.top_ids is not None
    assert longest.top_logits is not None
    for k in range(1, 33):
        readout = case.read(backend, top_k=k)
        assert readout.top_ids is not None
        assert readout.top_logits is not None
        assert readout.top_ids.equal(longest.top_ids[:, :k])
        assert readout.top_logits.equal(longest.top_logits[:, :k])


@each_backend
def test_asking_for_more_leaves_the_rest_as_it_was(backend) -> None:
    case = random_case(torch.float32)
    full, bare = case.read(backend), case.read(backend, top_k=0, final_rows=None)
    assert (bare.top_ids, bare.top_logits, bare.kl) == (None, None, None)
    assert same_bits(replace(full, top_ids=None, top_logits=None, kl=None), bare)


@each_backend
@pytest.mark.parametrize("vocabulary", [2047, 2048, 2049, 4097, 6151])
def test_the_last_token_is_found(backend, vocabulary) -> None:
    case = random_case(torch.float32, 5, 9, vocabulary, norm="none")
    hidden, weight = case.hidden.clone(), case.head.weight.clone()
    hidden[:, 0] = 1.0
    weight[-1] = 0.0
    weight[-1, 0] = 200.0
    last = replace(case, hidden=hidden, head=replace(case.head, weight=weight), lookup=torch.full((5,), vocabulary - 1))
    readout = last.read(backend, top_k=1)
    assert readout.top_ids is not None
    assert readout.top_ids.tolist() == [[vocabulary - 1]] * 5
    assert readout.rank.tolist() == [[1]] * 5
    assert readout.logsumexp.tolist() == pytest.approx([200.0] * 5)


@each_backend
def test_banned_tokens_come_last_lowest_id_first(backend) -> None:
    bias = torch.full((40,), -INF)
    bias[[30, 7, 22]] = torch.tensor([1.0, 2.0, 3.0])
    head = Unembedding(torch.zeros(40, 4), norm="none", bias=bias)
    readout = lens(torch.zeros(1, 4), head, torch.tensor([[22, 30, 0, 39]]), top_k=8, backend=backend)
    assert readout.top_ids is not None
    assert readout.top_ids.tolist() == [[22, 7, 30, 0, 1, 2, 3, 4]]
    assert readout.rank.tolist() == [[1, 3, 4, 4]]


@each_backend
def test_a_banned_token_has_no_probability_and_ranks_behind_every_possible_one(backend) -> None:
    readout = read(backend, "scattered banned tokens", torch.float32)
    bias = judge("scattered banned tokens", torch.float32).case.head.bias
    assert bias is not None
    assert bool((readout.logits[:, 0] == -INF).all())
    assert bool((readout.log_probability[:, 0] == -INF).all())
    assert bool((readout.rank[:, 0] == 1 + bias.isfinite().sum()).all())


# ---- rows and look-ups that are not there ----------------------------------------------------------------------------


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
    readout = lens(torch.zeros(0, 8), head, lookup, top_k=top_k, final_rows=none if with_kl else None, backend=backend)
    assert readout.logits.shape == readout.rank.shape == (0, lookup[:, None].shape[-1] if lookup.ndim == 1 else 2)
    assert readout.logsumexp.shape == readout.entropy.shape == (0,)
    assert (readout.kl is not None) == with_kl
    assert (None if readout.top_ids is None else readout.top_ids.shape) == ((0, 3) if top_k else None)


# ---- divergence from the final layer ---------------------------------------------------------------------------------


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
    readout = lens(odds, head, torch.tensor([0, 0]), final_rows=final_rows, backend=backend)
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


# ---- the call --------------------------------------------------------------------------------------------------------


@each_backend
@each_dtype
@pytest.mark.parametrize("regime", ["everything at once", "1025 rows", "scattered banned tokens"])
def test_a_repeated_call_gives_the_same_bits(backend, dtype, regime) -> None:
    assert same_bits(read(backend, regime, dtype), judge(regime, dtype).case.read(backend))


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


@each_backend
@each_dtype
def test_arguments_come_back_unchanged(backend, dtype) -> None:
    case = judge("everything at once", dtype).case
    head = {name: getattr(case.head, name) for name in ("weight", "gamma", "beta", "bias")}
    before = {name: value.clone() for name, value in head.items()}
    hidden, lookup, final_rows = case.hidden.clone(), case.lookup.clone(), case.final_rows.clone()
    case.read(backend)
    assert all(value.equal(before[name]) for name, value in head.items())
    assert case.hidden.equal(hidden)
    assert case.lookup.equal(lookup)
    assert case.final_rows.equal(final_rows)


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
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_the_caller_s_torch_settings_change_nothing(backend, surroundings) -> None:
    case = random_case(torch.float32, 17, 64, 4099, norm="layer", gamma=True, beta=True, bias=True)
    quiet = case.read(backend)
    with SURROUNDINGS[surroundings]():
        inside = case.read(backend)
    assert same_bits(inside, quiet)


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


# ---- properties over shapes and regimes ------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    vocabulary = draw(st.one_of(st.integers(1, 40), st.sampled_from([257, 2047, 2048, 2049, 4097])))
    lookups, seed = draw(st.integers(0, 3)), draw(st.integers(0, 2**20))
    dtype = draw(st.sampled_from(DTYPES))
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


modest = settings(max_examples=60, deadline=None, derandomize=True)


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


# ---- the head as numbers ---------------------------------------------------------------------------------------------


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
