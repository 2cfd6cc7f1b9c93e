"""The backend "triton": the fused lens for any number of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from xprobe_kernels import divergence, triton_top
from xprobe_kernels.configs import Config
from xprobe_kernels.request import LensRequest
from xprobe_kernels.triton_lens import configuration, device_limits, launch
from xprobe_kernels.triton_rows import FinalSoftmax, dense, merge, needs_no_copy, operand_dtype, prepare
from xprobe_kernels.triton_support import cdiv

SMALLEST_BLOCK = 1024  # rows: fewer would not keep a GPU busy


def readout(request: LensRequest, config: Config | None = None, splits: int | None = None) -> dict[str, Any]:
    """The fields of ``Readout``. Tuning passes ``config`` and ``splits``. By default they are chosen."""
    request = dense(request)
    return divergence.readout(request, FusedPass(config or configuration(request), splits))


@dataclass(frozen=True)
class FusedPass:
    """The fused kernel with one launch configuration."""

    config: Config
    splits: int | None

    @property
    def tile(self) -> int:
        """Columns that the kernel reads at a time."""
        return self.config.block_n

    @property
    def parts(self) -> int:
        """Number of parts into which a tile is divided."""
        return self.config.parts

    def rows_per_block(self, request: LensRequest, rows: int) -> int:
        """All rows, if what they need beside inputs and results takes at most ``workspace_bytes``.

        Otherwise about as many rows as stay within it, rounded so that a block fills all processors a whole number of
        times. Each block reads the whole weight, so few large ones are fast.
        """
        config = self.config
        vocabulary, width = request.head.vocab_size, request.head.width
        each = 0 if needs_no_copy(request) else width * operand_dtype(request.hidden, request.head).itemsize
        if request.top_k and not config.carries_top:
            tiles = cdiv(vocabulary, config.block_n)
            each += 4 * tiles + 8 * (request.top_k + 2) * min(request.top_k, tiles)
        block = max(request.workspace_bytes // max(each, 1), SMALLEST_BLOCK)
        if block >= rows:
            return rows
        slots = device_limits(request.hidden.device)[1] * config.resident
        row_tiles = max(block // config.block_m, 1)
        row_tiles = row_tiles // slots * slots if row_tiles >= slots else slots // cdiv(slots, row_tiles)
        return row_tiles * config.block_m

    def read(
        self, request: LensRequest, kept: FinalSoftmax | None, final_of: Tensor | None
    ) -> tuple[dict[str, Any], Tensor]:
        """One block of rows, from the norm to the merge."""
        prepared = prepare(request)
        partials = launch(request, prepared, self.config.for_rows(request.rows), self.splits, kept, final_of)
        if request.top_k and request.rows and not self.config.carries_top:
            top, top_ids = triton_top.largest(request, prepared, partials.maxima, self.config)
            partials = replace(partials, top=top, top_ids=top_ids)
        return merge(request, prepared, partials, compared=final_of is not None)
