"""Which tokens of a packed tree attend to which, prepared for the attention kernel.

Sequences with a common prefix are packed so that every shared token appears once, before the tokens that continue it
(depth first). Token i then attends to token j exactly if ``j <= i < until[j]``. ``until[j]`` is the end of the tokens
that continue j. The same rule decides which blocks of keys a block of queries has to visit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xprobe_kernels.transfer import upload


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of the attention kernel; ``warps`` and ``stages`` are Triton's launch options."""

    queries: int
    keys: int
    warps: int
    stages: int

    @staticmethod
    def choose(itemsize: int, width: int) -> Blocks:
        """Blocks for heads of ``width`` numbers of ``itemsize`` bytes; they use less than 99 KiB of shared memory."""
        if itemsize == 4:
            return Blocks(32, 32, 4, 2) if width <= 64 else Blocks(16, 16, 4, 2)  # larger blocks spill on sm_90
        return Blocks(64, 64, 4, 3 if width <= 64 else 2) if width <= 128 else Blocks(64, 32, 4, 2)


@dataclass(frozen=True, eq=False)
class Reach:
    """Which tokens of a packed tree of N tokens attend to which, on one device and for one choice of blocks.

    Attributes
    ----------
    until, positions : Tensor [N], int32
        For each token: the end of the tokens that continue it, and its position in its own sequence.
    bounds : Tensor [Q, 3], int32
        For each block of queries, three indices into ``visits``: its first entry, its first entry that needs a mask,
        and its end.
    visits : Tensor, int32
        The blocks of keys that each block of queries visits. Blocks that all of its queries see come first.
    blocks : Blocks
        The tile sizes that ``bounds`` and ``visits`` refer to.

    Examples
    --------
    Two sequences, 5 6 7 and 5 6 8, share their first two tokens. Packed depth first they are 5 6 7 8:

    >>> import numpy as np, torch
    >>> from xprobe_kernels.reach import Blocks, Reach
    >>> until, positions = np.array([4, 4, 3, 4]), np.array([0, 1, 2, 2])
    >>> reach = Reach.from_tree(until, positions, Blocks(16, 16, warps=4, stages=1), torch.device("cpu"))
    >>> [[j for j in range(i + 1) if i < until[j]] for i in range(4)]  # token 3 does not see token 2
    [[0], [0, 1], [0, 1, 2], [0, 1, 3]]
    >>> reach.bounds.tolist(), reach.visits.tolist()  # one block of queries visits one block of keys, with a mask
    ([[0, 0, 1]], [0])
    """

    until: Tensor
    positions: Tensor
    bounds: Tensor
    visits: Tensor
    blocks: Blocks

    @classmethod
    def from_tree(cls, until: NDArray, positions: NDArray, blocks: Blocks, device: torch.device) -> Reach:
        """Builds it from ``until`` and ``positions`` [N] in main memory. The host does not wait for the device.

        Raises
        ------
        ValueError
            There are no tokens, or some ``until[i]`` is not between i + 1 and N.
        """
        until, positions = (np.ascontiguousarray(values, dtype=np.int32) for values in (until, positions))
        count = len(until)
        if positions.shape != until.shape or not count or (until <= np.arange(count)).any() or until.max() > count:
            raise ValueError(f"until and positions must hold N numbers each, until[i] from i + 1 to N; N is {count}")
        bounds, visits = _visits(until, blocks)
        parts = (until, positions, bounds.ravel(), visits)
        # one upload; each part starts at a multiple of 16 bytes, because Triton compiles anew for another alignment
        starts = np.cumsum([0, *(-(-len(part) // 4) * 4 for part in parts)])
        together = np.zeros(starts[-1], dtype=np.int32)
        for start, part in zip(starts, parts, strict=False):
            together[start : start + len(part)] = part
        uploaded = upload(torch.from_numpy(together), device)
        tensors = [uploaded[start : start + len(part)] for start, part in zip(starts, parts, strict=False)]
        return cls(tensors[0], tensors[1], tensors[2].view(-1, 3), tensors[3], blocks)


def _visits(until: NDArray, blocks: Blocks) -> tuple[NDArray, NDArray]:
    """``bounds`` and ``visits`` of ``Reach``."""
    count = len(until)
    q_first = np.arange(0, count, blocks.queries)
    q_last = np.minimum(q_first + blocks.queries, count) - 1
    k_first = np.arange(0, count, blocks.keys)
    k_last = np.minimum(k_first + blocks.keys, count) - 1
    farthest, nearest = (reduce.reduceat(until, k_first) for reduce in (np.maximum, np.minimum))
    seen = (k_first <= q_last[:, None]) & (farthest > q_first[:, None])
    whole = (k_last <= q_first[:, None]) & (nearest > q_last[:, None]) & (k_last - k_first + 1 == blocks.keys)
    order = np.argsort(np.where(whole, 0, np.where(seen, 1, 2)), axis=1, kind="stable").astype(np.int32)
    ends = seen.sum(1).cumsum()
    starts = ends - seen.sum(1)
    kept = np.arange(len(k_first)) < seen.sum(1)[:, None]
    return np.stack([starts, starts + whole.sum(1), ends], 1).astype(np.int32), order[kept]
