"""What ``lens`` must return, in fp64 arithmetic written here from the definitions, and how far off a backend may be.

The rule: a backend may be no further from the fp64 truth than plain torch in the rows' dtype, plus a small slack. Both
errors are the largest of the call. The slack is ``SLACK_ULPS`` units in the last place of the result, and one eps of
|h| |w| in each logit, because plain torch may by chance round the few logits of a short call almost correctly. For the
same reason plain torch may get a statistic right although its logits are off. So a statistic may be off by as much as
the errors of the logits can change it, to first order (``Truth.sensitivity``). Under a soft-cap the kernels take their
sums relative to the cap, so their slack is also ``CAP_ULPS`` units of it. ``reference`` has no slack: it must round the
truth once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from xprobe_kernels import Readout, Unembedding, available_backends, cpu, lens
from xprobe_kernels.precision import BOUNDED_CAP
from xprobe_kernels.readout import KERNELS

GPU = torch.cuda.is_available()
BACKENDS = [*available_backends("cpu"), *(KERNELS if GPU else ())]  # with a GPU, the kernels run on it only
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STATISTICS = ["logits", "logsumexp", "entropy", "kl"]
INF, NAN = math.inf, math.nan

SLACK_ULPS = 8  # fp32 results; in units of eps * max(1, |result|)
CAP_ULPS = 2  # of the soft-cap: the kernels' sums are relative to it
TIE_ULPS = 4  # logits closer than this many eps * |h| * |w| count as tied: the bound that the backends state


@dataclass(frozen=True, eq=False)
class Case:
    hidden: Tensor  # [R, D]
    head: Unembedding
    lookup: Tensor  # [R, A]
    final_rows: Tensor  # [R]
    top_k: int = 5

    def read(self, backend: str, **changes: Any) -> Readout:
        options = {"top_k": min(self.top_k, self.head.vocab_size), "final_rows": self.final_rows, "backend": backend}
        return lens_here(self.hidden, self.head, self.lookup, **options | changes)


def lens_here(hidden: Tensor, head: Unembedding, lookup: Tensor, *, backend: str, **options: Any) -> Readout:
    """``lens`` of CPU tensors with results on the CPU. The kernels run on the GPU if there is one."""
    if not (GPU and backend in KERNELS):
        return lens(hidden, head, lookup, backend=backend, **options)
    options = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    readout = lens(hidden.cuda(), on_gpu(head), lookup.cuda(), backend=backend, **options)
    return replace(readout, **{name: value.cpu() for name, value in vars(readout).items() if isinstance(value, Tensor)})


def on_gpu(head: Unembedding) -> Unembedding:
    return replace(head, **{name: value.cuda() for name, value in vars(head).items() if isinstance(value, Tensor)})


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
    """Logits [R, V] before the soft-cap as in a model of ``dtype``: the projection in it, the rest in at least fp32."""
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
    """The largest distance. It is infinite if one of the two is NaN, and 0 for equal infinities and empty tensors."""
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
        plain_raw = raw_logits(case.hidden, case.head, case.hidden.dtype)
        plain = capped(plain_raw, case.head)
        plain_values = statistics(plain, case.lookup, case.final_rows)
        self.error = {name: float(worst(plain_values[name], self.values[name])) for name in STATISTICS}
        self.eps = torch.finfo(torch.promote_types(case.hidden.dtype, torch.float32)).eps
        self.operands = normed(case.hidden.double(), case.head).norm(dim=-1)  # |h| of each row; times |w| below
        largest = float(case.head.weight.double().norm(dim=-1).max())
        chance = self.eps * self.operands * largest * abs(case.head.scale)
        #: how far the logits of each row [R] may be off, judged by plain torch, before and after the soft-cap
        self.raw_noise, self.noise = worst(plain_raw, self.raw, -1) + chance, worst(plain, self.z, -1) + chance
        self.gain = self.sensitivity(self.noise)
        #: the error of rounding the rows to bf16 after the norm, as on processors with bf16 matrix units
        narrow = case.hidden.dtype == case.head.weight.dtype == torch.bfloat16 and cpu.matrix_units()
        half = 0.5 * torch.finfo(torch.bfloat16).eps * self.operands * largest * abs(case.head.scale)
        self.rounded = half if narrow else torch.zeros_like(half)
        self.rounded_gain = self.sensitivity(self.rounded)

    def sensitivity(self, noise: Tensor) -> dict[str, float]:
        """How far each statistic is off, to first order, if every logit of a row is off by ``noise`` [R]."""
        log_p = self.z.log_softmax(-1)
        p, final = log_p.exp(), self.case.final_rows
        spread = torch.where(p > 0, p * (log_p + self.values["entropy"][:, None]).abs(), 0.0).sum(-1)
        ratio = (log_p[final] - log_p - self.values["kl"][:, None]).abs()
        of_final = torch.where(p[final] > 0, p[final] * ratio, 0.0).sum(-1)
        of_row = (p[final] - p).abs().sum(-1)
        return {
            "logits": float(noise.max()),
            "logsumexp": float(noise.max()),
            "entropy": float((noise * spread).max()),
            "kl": float((noise * of_row + noise[final] * of_final).max()),
        }

    def rounding(self, backend: str, truth: Tensor) -> float:
        """The error of rounding the result."""
        size = max(1.0, float(truth[truth.isfinite()].abs().max())) if bool(truth.isfinite().any()) else 1.0
        if backend == "reference":  # fp64 inside, rounded once
            return (1e-12 if self.eps < 1e-10 else 0.5 * self.eps + 1e-12) * size
        return (1e-12 if self.eps < 1e-10 else SLACK_ULPS * self.eps) * size

    def allowed(self, backend: str, name: str) -> float:
        """The largest error allowed by the rule. The fp64 reference may only round its result."""
        plain = 0.0 if backend == "reference" else max(self.error[name], self.gain[name])
        if backend.startswith("cpu"):  # plain torch rounds as much, but may be lucky with few tokens
            plain = max(plain, self.rounded_gain[name])
        cap = self.case.head.softcap
        if backend in KERNELS and name != "logits" and cap is not None and cap <= BOUNDED_CAP:
            plain += CAP_ULPS * self.eps * cap
        return plain + self.rounding(backend, self.values[name])

    def rank_bounds(self, backend: str) -> tuple[Tensor, Tensor]:
        """The lowest and highest rank [R, A] that errors before the soft-cap and the bound on ties can explain."""
        lookup = self.case.lookup.clamp(min=0)
        raw = self.raw.gather(1, lookup)
        if backend == "reference":
            noise, tie = 1e-12 * raw.abs().clamp(min=1), torch.zeros_like(raw)
        else:
            noise = 2 * (self.raw_noise[:, None] + self.rounding(backend, raw))
            sizes = self.operands[:, None] * self.case.head.weight.double()[lookup].norm(dim=-1)
            tie = TIE_ULPS * self.eps * sizes * abs(self.case.head.scale)

        def above(threshold: Tensor) -> Tensor:
            return (self.raw[:, None, :] > threshold[:, :, None]).sum(-1)

        itself = (raw > raw - noise).long()
        return 1 + above(raw + tie + noise), 1 + above(raw - noise) - itself


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
    assert bool((ids.sort(dim=-1).values.diff() > 0).all())
    ahead, behind = values[:, :-1], values[:, 1:]
    assert bool((ahead >= behind).all())
    # the order is that of the numbers which the backend computes, before the soft-cap and before fp64 becomes fp32
    shown = truth.case.head.softcap is None and (backend != "reference" or values.dtype == torch.float64)
    if shown:
        assert bool(((ahead > behind) | (ids[:, :-1] < ids[:, 1:])).all())
    rounding = truth.rounding(backend, truth.raw)
    noise = torch.full((len(ids), 1), rounding) if backend == "reference" else 2 * (truth.raw_noise[:, None] + rounding)
    assert bool((truth.raw.gather(1, ids) >= truth.raw.topk(k).values - noise).all())


def same_bits(left: Readout, right: Readout, rows: Tensor | slice = slice(None)) -> bool:
    pairs = [(getattr(left, field.name), getattr(right, field.name)) for field in fields(Readout)]
    return all(
        torch.equal(a[rows].nan_to_num(nan=-1.5), b[rows].nan_to_num(nan=-1.5))
        for a, b in pairs
        if isinstance(a, Tensor)
    )
