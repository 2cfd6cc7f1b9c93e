"""Computes figures from seconds: ratios first, then rates."""

from __future__ import annotations

from dataclasses import dataclass

from xprobe_kernels.bench.shapes import Work


@dataclass(frozen=True)
class Ceilings:
    """The highest rates that this machine reached in the same rounds."""

    bytes_per_second: float  # of a large copy, bytes read plus bytes written
    operations_per_second: float  # of the faster of a large square product and the bare product of the shape

    def floor(self, work: Work, itemsize: int) -> tuple[float, float]:
        """The least seconds that arithmetic and memory traffic need."""
        return work.operations / self.operations_per_second, work.least_bytes(itemsize) / self.bytes_per_second


def figures(
    work: Work, itemsize: int, seconds: float, *, naive: float | None, product: float | None, ceilings: Ceilings | None
) -> dict[str, float | None]:
    """Ratios and rates for a time. ``naive`` and ``product``: seconds of the naive fp32 lens and the bare product."""
    return {
        "times_naive": naive / seconds if naive else None,
        "share_of_product": product / seconds if product else None,
        "times_floor": seconds / max(ceilings.floor(work, itemsize)) if ceilings else None,
        "seconds": seconds,
        "operations_per_second": work.operations / seconds,
        "bytes_per_second": work.least_bytes(itemsize) / seconds,
    }
