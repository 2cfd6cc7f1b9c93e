"""Compares other projects' fused linear cross entropy with the lens, at their task: ``xprobe bench --rivals``.

The task is the log-sum-exp and the target's logit of each row, without gradients. The rows are normed beforehand in the
model's dtype, and every variant takes the same rows. Most rivals return only the difference of the two numbers, the
loss; the lens also counts ranks and entropies.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xprobe_kernels.bench.accuracy import SAMPLE, SLACK, TIMES_NAIVE, largest
from xprobe_kernels.bench.baselines import BACKEND, NAIVE, PRODUCT, Task, Variant, chunk, product
from xprobe_kernels.bench.lens_speed import (
    LARGE,
    OK,
    describe,
    inputs_failed,
    make_tasks,
    measure_variants,
    median,
    usable_memory,
)
from xprobe_kernels.bench.measure import clock
from xprobe_kernels.bench.metrics import figures
from xprobe_kernels.bench.shapes import Work
from xprobe_kernels.readout import Readout, lens
from xprobe_kernels.reference import logits as exact_logits

RIVAL = "rival"
TORCH, BARE = "torch linear + cross_entropy", "bare product"
DEVICE_TYPES = ("cuda",)  # where the rivals' kernels run
BYTES_PER_LOGIT = 10  # of torch: in the model's dtype, in fp32, and their log-softmax


@dataclass(frozen=True, eq=False)
class TargetReading:
    """The result of a variant for the target of each row. A loss is a negative log-probability."""

    log_probability: Tensor  # [R]
    logit: Tensor | None = None  # [R]
    logsumexp: Tensor | None = None  # [R]

    def rows(self, index: Tensor) -> TargetReading:
        logit, logsumexp = (None if value is None else value[index] for value in (self.logit, self.logsumexp))
        return TargetReading(self.log_probability[index], logit, logsumexp)


@dataclass(frozen=True)
class Rival:
    """Another project's kernel.

    ``call(module, rows, weight, target, softcap)`` runs the forward pass of ``module``, which package ``package``
    installs.
    """

    name: str
    package: str
    module: str
    call: Callable[[Any, Tensor, Tensor, Tensor, float | None], Any]
    read: Callable[[Any], TargetReading]
    has_softcap: bool = True

    def skip_reason(self, work: Work, device: torch.device) -> str | None:
        """Why it cannot be measured here, or None."""
        if device.type not in DEVICE_TYPES:
            return f"runs only on a GPU, and this is a {device.type.upper()}"
        if work.head.softcap and not self.has_softcap:
            return f"has no soft-cap, and {work.head.title} has one"
        try:
            import_module(self.module)
        except ImportError as error:
            if error.name is not None and self.module.split(".")[0] == error.name.split(".")[0]:
                return f"{self.package} is not installed: pip install {self.package}"
            return f"{self.package} cannot be imported: {error}"
        except Exception as error:
            return f"{self.package} cannot be imported: {type(error).__name__}: {error}"
        return None

    def variant(self, work: Work, device: torch.device) -> Variant:
        reason = self.skip_reason(work, device)

        def call(task: Task) -> Any:
            return self.call(import_module(self.module), task.hidden, task.head.weight, task.lookup, task.head.softcap)

        return Variant(self.name, RIVAL, call, self.read, skip_reason=reason)

    @property
    def version(self) -> str | None:
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def _liger(module: Any, rows: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    return module.liger_fused_linear_cross_entropy(rows, weight, target, reduction="none", softcap=softcap)


def _cut_cross_entropy(module: Any, rows: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    return module.linear_cross_entropy(rows, weight, target, softcap=softcap, reduction="none")


def _quack(module: Any, rows: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Any:
    # the call that its loss makes without gradients; its public function returns only the sum or mean over rows
    return module.lse_target_epi(rows, weight.mT, store_d=False, target=target, tuned=False)


def _read_loss(loss: Tensor) -> TargetReading:
    return TargetReading(-loss.float())


def _read_quack(result: Any) -> TargetReading:
    logsumexp, logit = result["lse"].reshape(-1), result["target_logit"].reshape(-1)
    return TargetReading(logit - logsumexp, logit, logsumexp)


RIVALS = (
    Rival("liger", "liger-kernel", "liger_kernel.transformers.functional", _liger, _read_loss),
    Rival("cut-cross-entropy", "cut-cross-entropy", "cut_cross_entropy", _cut_cross_entropy, _read_loss),
    Rival("quack", "quack-kernels", "quack.epilogue.library", _quack, _read_quack, has_softcap=False),
)


def normed_task(task: Task) -> Task:
    """The same rows after the norm, in the model's dtype, with a head that has none."""
    head = task.head.without_norm()
    return replace(task, hidden=task.normed, head=head, head32=head)


def torch_losses(rows_at_once: int | None) -> Callable[[Task], Tensor]:
    """The loss [R] as most training code computes it: logits in the model's dtype, cross entropy in fp32."""

    def call(task: Task) -> Tensor:
        parts = zip(
            task.hidden.split(rows_at_once or len(task.hidden)),
            task.lookup.split(rows_at_once or len(task.hidden)),
            strict=True,
        )
        losses = [
            F.cross_entropy(task.head.cap(F.linear(rows, task.head.weight)).float(), target, reduction="none")
            for rows, target in parts
        ]
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    return call


def target_lens(backend: str) -> Callable[[Task], Readout]:
    """The lens with one look-up per row and no top k."""
    return lambda task: lens(task.hidden, task.head, task.lookup, top_k=0, backend=backend, check=False)


def _read_lens(readout: Readout) -> TargetReading:
    logit = readout.logits[:, 0]
    return TargetReading(logit - readout.logsumexp, logit, readout.logsumexp)


def variants(
    work: Work, device: torch.device, dtype: torch.dtype, backends: list[str], free_bytes: float
) -> list[Variant]:
    """torch, the bare product, the lens and the rivals. A call may use ``free_bytes`` of memory."""
    rows = chunk(work.rows, BYTES_PER_LOGIT * work.vocabulary, free_bytes)
    product_rows = chunk(work.rows, work.vocabulary * dtype.itemsize, free_bytes)
    listed = [Variant(TORCH, NAIVE, torch_losses(rows), _read_loss, rows)]
    listed.append(Variant(BARE, PRODUCT, product(product_rows, fp32=False), None, product_rows))
    listed += [Variant(f"lens {name}", BACKEND, target_lens(name), _read_lens) for name in backends]
    return listed + [rival.variant(work, device) for rival in RIVALS]


@dataclass(frozen=True, eq=False)
class TargetTruth:
    """The fp64 target numbers of a sample of rows, and error bounds from torch in the model's dtype."""

    index: Tensor  # [S] the sample's rows
    exact: dict[str, Tensor]  # [S] each, named as the fields of TargetReading
    bounds: dict[str, float]

    def errors(self, reading: TargetReading) -> dict[str, float]:
        """Largest absolute error over the sample of everything that the reading has, in nats or logits."""
        return {
            name: largest(value.double() - self.exact[name])
            for name, value in vars(reading).items()
            if value is not None
        }

    def judge(self, reading: TargetReading) -> tuple[dict[str, float], str | None]:
        """The errors of a reading of all rows, and which are above their bounds, or None."""
        errors = self.errors(reading.rows(self.index))
        wrong = [
            f"{name} off by {error:.3g}, bound {self.bounds[name]:.3g}"
            for name, error in errors.items()
            if not error <= self.bounds[name]
        ]
        return errors, "; ".join(wrong) or None


def target_truth(task: Task, sample: int = SAMPLE) -> TargetTruth:
    """The truth for evenly spaced rows. A bound is twice the error of torch in the model's dtype plus a small slack."""
    index = torch.linspace(0, len(task.hidden) - 1, min(sample, len(task.hidden)), device=task.hidden.device)
    index = index.round().long()
    rows, target = task.hidden[index], task.lookup[index][:, None]

    def reading(logits: Tensor) -> TargetReading:
        logit, logsumexp = logits.gather(1, target)[:, 0], logits.logsumexp(-1)
        return TargetReading(logit - logsumexp, logit, logsumexp)

    exact = vars(reading(exact_logits(rows, task.head)))
    plain = reading(task.head.cap(F.linear(rows, task.head.weight)).float())
    unbounded = TargetTruth(index, exact, {})
    bounds = {name: TIMES_NAIVE * error + SLACK for name, error in unbounded.errors(plain).items()}
    return replace(unbounded, bounds=bounds)


def compare(
    work: Work,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backends: list[str],
    rounds: int | None,
    seconds: float,
    quick: bool = False,
) -> dict[str, Any]:
    """Figures of every variant on ``work``, measured in turn. A rival that is missing is listed as skipped."""
    timer = clock(device)
    report = describe(work, dtype)
    try:
        tasks = [normed_task(task) for task in make_tasks(work, device, dtype)]
        judge = target_truth(tasks[0])
    except (RuntimeError, MemoryError) as error:  # torch's out-of-memory error is a RuntimeError
        return report | {"message": inputs_failed(error)}
    gc.collect()  # the fp32 copies of the weight
    listed = variants(work, device, dtype, backends, usable_memory(timer))
    large = LARGE["quick" if quick else device.type]
    samples, entries = measure_variants(listed, tasks, judge, large, timer, dtype, rounds=rounds, seconds=seconds)
    plain, bare = median(samples[TORCH]), median(samples[BARE])
    ceilings = large.ceilings(samples, work, bare)
    versions = {rival.name: rival.version for rival in RIVALS}
    for entry in entries:
        entry["version"] = versions.get(entry["name"])
        if entry["status"] == OK:
            speed = figures(work, dtype.itemsize, entry["seconds"], naive=plain, product=bare, ceilings=ceilings)
            entry |= {"times_torch": speed.pop("times_naive"), **speed}
    report |= {"variants": entries, "copies_of_inputs": len(tasks)}
    report |= {"bounds": judge.bounds, "sampled_rows": len(judge.index)}
    report["ceilings"] = None if ceilings is None else vars(ceilings)
    del tasks, judge, listed
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return report
