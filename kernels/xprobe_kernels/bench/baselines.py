"""The variants that the benchmark compares: the lens backends and their rivals, with the same inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xprobe_kernels.bench.shapes import Work
from xprobe_kernels.readout import Readout, lens
from xprobe_kernels.unembedding import Unembedding

TOP_K = 5
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
NAIVE, PRODUCT, COMPILED, BACKEND = "naive", "product", "compiled", "backend"
RANDOM_ROWS = 4096
SPREAD = 3.0  # standard deviation of the logits of a row
STRONGEST = 6.0  # standard deviations by which a row's looked-up token may stand out
CAPPED_SPREAD = 12.0  # the same for a head with a soft-cap, so that the cap has an effect


@dataclass(frozen=True, eq=False)
class Task:
    """The inputs of every variant."""

    hidden: Tensor  # [R, D] in the model's dtype
    head: Unembedding  # weight in the model's dtype
    head32: Unembedding  # the same numbers in fp32, copied beforehand: the copy's time and memory are not measured
    lookup: Tensor  # [R]
    normed: Tensor  # [R, D] in the model's dtype, for the bare product
    normed32: Tensor  # [R, D] fp32
    final_rows: Tensor | None  # [R]; None without KL

    def clone(self) -> Task:
        """The same inputs in other memory."""
        same = self.head32 is self.head
        head = _like(self.head, self.head.weight.clone())
        head32 = head if same else _like(self.head32, self.head32.weight.clone())
        final_rows = None if self.final_rows is None else self.final_rows.clone()
        return Task(
            self.hidden.clone(), head, head32, self.lookup.clone(), self.normed.clone(), self.normed32, final_rows
        )


@dataclass(frozen=True, eq=False)
class Reading:
    """The result of a variant: the fields of ``Readout`` for one look-up per row."""

    logit: Tensor  # [R]
    logsumexp: Tensor  # [R]
    rank: Tensor  # [R]
    entropy: Tensor  # [R]
    top_ids: Tensor  # [R, k]
    kl: Tensor | None  # [R]

    def rows(self, index: Tensor) -> Reading:
        return Reading(*(None if value is None else value[index] for value in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Variant:
    """One implementation. ``read`` turns the result of ``call`` into what is checked; None for a bare product."""

    name: str
    kind: str
    call: Callable[[Task], Any]
    read: Callable[[Any], Any] | None = None
    rows_at_once: int | None = None  # None: all
    skip_reason: str | None = None  # None: measured


def make(work: Work, device: torch.device, dtype: torch.dtype, *, kl: bool = False) -> Task:
    """Makes the inputs. Each row has a random share of its looked-up token, so ranks go from 1 to thousands."""
    random = torch.Generator(device=device).manual_seed(0)
    width, vocabulary, rows = work.head.width, work.vocabulary, work.rows
    spread = CAPPED_SPREAD if work.head.softcap else SPREAD
    weight = torch.empty(vocabulary, width, dtype=dtype, device=device)
    block = torch.randn(min(RANDOM_ROWS, vocabulary), width, generator=random, device=device)
    block = (block * (spread / width**0.5)).to(dtype)
    for number, start in enumerate(range(0, vocabulary, len(block))):  # shifted copies: fast to make
        part = weight[start : start + len(block)]
        part.copy_(block.roll(7 * number, 1)[: len(part)])
    gamma = 1 + 0.1 * torch.randn(width, generator=random, device=device)
    lookup = torch.randint(0, vocabulary, (rows,), generator=random, device=device)
    hidden = torch.randn(rows, width, generator=random, device=device)
    strength = torch.rand(rows, 1, generator=random, device=device) * (STRONGEST / spread)
    hidden = (hidden + strength * weight[lookup].float()).to(dtype)
    head = Unembedding(weight, gamma=gamma, softcap=work.head.softcap)
    head32 = head if dtype == torch.float32 else _like(head, weight.float())
    normed32 = head.normalize(hidden.float())
    final_rows = None
    if kl:
        final_rows = rows - work.positions + torch.arange(rows, device=device) % work.positions
    return Task(hidden, head, head32, lookup, normed32.to(dtype), normed32, final_rows)


def _like(head: Unembedding, weight: Tensor) -> Unembedding:
    return Unembedding(weight, gamma=head.gamma, softcap=head.softcap)


def naive_logits(hidden: Tensor, head: Unembedding) -> Tensor:
    """All logits [R, V] in the weight's dtype with the norm in fp32, as in model code."""
    normed = head.normalize(hidden.float()).to(head.weight.dtype)
    return head.cap(head.bias_and_scale(normed @ head.weight.T))


def naive_rows(hidden: Tensor, head: Unembedding, lookup: Tensor, log_final: Tensor | None) -> tuple[Tensor, ...]:
    """The lens as most code computes it: all logits first, then fp32 statistics, each in one or more passes."""
    logits = naive_logits(hidden, head)
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    wanted = logits.gather(1, lookup[:, None])
    logsumexp = wanted[:, 0].float() - log_p.gather(1, lookup[:, None])[:, 0]
    rank = 1 + (logits > wanted).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    top = logits.topk(TOP_K, -1).indices
    out = (wanted[:, 0].float(), logsumexp, rank, entropy, top)
    if log_final is None:
        return out
    return (*out, (log_final.exp() * (log_final - log_p)).sum(-1).clamp(min=0))


def naive(
    rows_at_once: int | None, *, fp32: bool, rows_function: Callable[..., tuple[Tensor, ...]] = naive_rows
) -> Callable[[Task], Reading]:
    """The naive lens of a task, ``rows_at_once`` rows at a time (None: all)."""

    def call(task: Task) -> Reading:
        head, rows = task.head32 if fp32 else task.head, len(task.hidden)
        step = rows_at_once or rows
        log_last, first = None, 0
        if task.final_rows is not None:
            first = int(task.final_rows.min())
            log_last = naive_logits(task.hidden[first:], head).log_softmax(-1, dtype=torch.float32)
        parts = []
        for start in range(0, rows, step):
            part = slice(start, start + step)
            log_final = None
            if log_last is not None and task.final_rows is not None:
                log_final = log_last[task.final_rows[part] - first]
            parts.append(rows_function(task.hidden[part], head, task.lookup[part], log_final))
        columns = parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))
        logit, logsumexp, rank, entropy, top, *kl = columns
        return Reading(logit, logsumexp, rank, entropy, top, kl[0] if kl else None)

    return call


def product(rows_at_once: int | None, *, fp32: bool) -> Callable[[Task], Tensor]:
    """The matrix product alone, by the library: a lower bound on the time of any exact lens."""

    def call(task: Task) -> Tensor:
        normed, weight = (task.normed32, task.head32.weight) if fp32 else (task.normed, task.head.weight)
        for start in range(0, len(normed), rows_at_once or len(normed)):
            out = normed[start : start + (rows_at_once or len(normed))] @ weight.T
        return out

    return call


def backend(name: str) -> Callable[[Task], Readout]:
    def call(task: Task) -> Readout:
        # as in a run, where the ids were checked before: the check would wait for the device
        return lens(
            task.hidden, task.head, task.lookup, top_k=TOP_K, final_rows=task.final_rows, backend=name, check=False
        )

    return call


def read_lens(readout: Readout) -> Reading:
    if readout.top_ids is None:
        raise ValueError("the backend returned no top-k although top_k was set")
    return Reading(
        readout.logits[:, 0], readout.logsumexp, readout.rank[:, 0], readout.entropy, readout.top_ids, readout.kl
    )


def chunk(rows: int, bytes_per_row: float, free_bytes: float) -> int | None:
    """How many rows fit at a time; None if all fit. Equal chunks if possible: compiled code then sees one shape."""
    most = int(free_bytes // bytes_per_row)
    if rows <= most:
        return None
    most = max(most, 1)
    even = [size for size in range(most, most // 2, -1) if rows % size == 0]
    return even[0] if even else most


def variants(
    work: Work, dtype: torch.dtype, backends: list[str], free_bytes: float, *, kl: bool, device: str
) -> list[Variant]:
    """All variants, naive fp32 first. A call may use ``free_bytes`` of memory."""
    short = DTYPES[str(dtype).removeprefix("torch.")]
    logits = 4 * work.vocabulary  # bytes of a row of fp32 logits; five such rows exist at once, seven with KL
    reserved = logits * work.positions if kl else 0
    rows = chunk(work.rows, (7 if kl else 5) * logits, free_bytes - reserved)
    product_rows = chunk(work.rows, work.vocabulary * dtype.itemsize, free_bytes)
    product32_rows = chunk(work.rows, logits, free_bytes)
    compiled = torch.compile(naive_rows, dynamic=False)

    def same(reading: Reading) -> Reading:
        return reading

    listed = [Variant("naive fp32", NAIVE, naive(rows, fp32=True), same, rows)]
    if dtype != torch.float32:
        listed.append(Variant(f"naive {short}", NAIVE, naive(rows, fp32=False), same, rows))
    listed.append(
        Variant(f"compiled naive {short}", COMPILED, naive(rows, fp32=False, rows_function=compiled), same, rows)
    )
    if device == "cpu" and dtype != torch.float32:
        listed.append(Variant("bare product fp32", PRODUCT, product(product32_rows, fp32=True), None, product32_rows))
    listed.append(Variant(f"bare product {short}", PRODUCT, product(product_rows, fp32=False), None, product_rows))
    return listed + [Variant(f"lens {name}", BACKEND, backend(name), read_lens) for name in backends]
