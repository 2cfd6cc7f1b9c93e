"""How far a result is from an fp64 lens on a sample of rows, and whether it is accurate enough to be timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xprobe_kernels.bench.baselines import Reading, Task, naive_logits, naive_rows
from xprobe_kernels.reference import logits as exact_logits

SAMPLE = 16
TIMES_NAIVE = 2.0  # bound on an error, as a multiple of the error of the naive lens in the model's dtype
SLACK = 5e-5  # nats added to this bound: fp32 sums over a vocabulary in another order


@dataclass(frozen=True, eq=False)
class Truth:
    """The fp64 lens of a sample of rows, and error bounds derived from the naive lens in the model's dtype."""

    index: Tensor  # [S] the sample's rows
    logits: Tensor  # [S, V] after the soft-cap
    final: Tensor | None  # [S, V] log-probabilities of each row's final layer
    lookup: Tensor  # [S]
    bounds: dict[str, float]

    def errors(self, reading: Reading) -> dict[str, float]:
        """Largest absolute errors over the sample (nats or logits), and shares of ranks and top ids that agree."""
        z, log_p = self.logits, self.logits.log_softmax(-1)
        wanted = z.gather(1, self.lookup[:, None])[:, 0]
        got = {name: value.double() for name, value in vars(reading).items() if value is not None}
        best = z.topk(reading.top_ids.shape[1], -1)
        chosen = z.gather(1, reading.top_ids.clamp(0, z.shape[1] - 1))
        distinct = all(len(set(row)) == len(row) for row in reading.top_ids.tolist())
        rank = 1 + (z > wanted[:, None]).sum(-1)
        errors = {
            "logit": largest(got["logit"] - wanted),
            "log_probability": largest(got["logit"] - got["logsumexp"] - log_p.gather(1, self.lookup[:, None])[:, 0]),
            "entropy": largest(got["entropy"] + (log_p.exp() * log_p).sum(-1)),
            "top_logit": largest(best.values - chosen) if distinct else float("inf"),
            "rank_agreement": float((reading.rank == rank).double().mean()),
            "top_agreement": float((reading.top_ids == best.indices).double().mean()),
        }
        if self.final is not None:
            kl = (self.final.exp() * (self.final - log_p)).sum(-1)
            errors["kl"] = largest(got["kl"] - kl) if "kl" in got else float("inf")
        return errors

    def judge(self, reading: Reading) -> tuple[dict[str, float], str | None]:
        """The errors of a reading of all rows, and a description of what is wrong with it, or None.

        An error above its bound is wrong. So is a rank that is not possible with errors within the bounds.
        """
        reading = reading.rows(self.index)
        errors = self.errors(reading)
        wrong = [
            f"{name} off by {errors[name]:.3g}, bound {bound:.3g}"
            for name, bound in self.bounds.items()
            if not errors[name] <= bound
        ]
        margin = 2 * self.bounds["logit"]
        wanted = self.logits.gather(1, self.lookup[:, None])
        least = 1 + (self.logits > wanted + margin).sum(-1)
        most = (self.logits >= wanted - margin).sum(-1)
        outside = (reading.rank < least) | (reading.rank > most)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            wrong.append(f"rank {int(reading.rank[row])} where {int(least[row])} to {int(most[row])} is possible")
        return errors, "; ".join(wrong) or None


def truth(task: Task, sample: int = SAMPLE) -> Truth:
    """The truth for evenly spaced rows. A bound is twice the naive error in the model's dtype plus a small slack."""
    rows = len(task.hidden)
    index = torch.linspace(0, rows - 1, min(sample, rows), device=task.hidden.device).round().long()
    logits = exact_logits(task.hidden[index], task.head)
    final = log_final = None
    if task.final_rows is not None:
        final_hidden = task.hidden[task.final_rows[index]]
        final = exact_logits(final_hidden, task.head).log_softmax(-1)
        log_final = naive_logits(final_hidden, task.head).log_softmax(-1, dtype=torch.float32)
    lookup = task.lookup[index]
    unbounded = Truth(index, logits, final, lookup, {})
    logit, logsumexp, rank, entropy, top, *kl = naive_rows(task.hidden[index], task.head, lookup, log_final)
    errors = unbounded.errors(Reading(logit, logsumexp, rank, entropy, top, kl[0] if kl else None))
    measured = [name for name in errors if not name.endswith("agreement")]
    bounds = {name: TIMES_NAIVE * errors[name] + SLACK for name in measured}
    bounds["top_logit"] += 2 * bounds["logit"]
    return Truth(index, logits, final, lookup, bounds)


def largest(difference: Tensor) -> float:
    """Largest absolute value; NaN counts as infinite."""
    return float(torch.where(difference.isnan(), torch.inf, difference.abs()).max())
