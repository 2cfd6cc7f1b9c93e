"""``LensRequest``: one call of ``lens`` after its arguments were checked. Every backend takes one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from xprobe_kernels.unembedding import Unembedding

MIB = 1 << 20


@dataclass(frozen=True, eq=False)
class LensRequest:
    """The arguments of ``lens`` as the backends receive them.

    ``lens`` has checked shapes, dtypes, devices and ranges. Backends do not check again.
    """

    hidden: Tensor  # [R, D]
    head: Unembedding
    lookup: Tensor  # [R, A] int64; -1: no token
    top_k: int = 0
    final_rows: Tensor | None = None  # [R] int64; None: no KL
    precision: str = "ieee"  # "ieee" or "tf32"
    workspace_bytes: int = 256 * MIB

    @property
    def rows(self) -> int:
        """R."""
        return self.hidden.shape[0]

    @property
    def lookups(self) -> int:
        """A."""
        return self.lookup.shape[1]

    def of_rows(self, part: slice | Tensor) -> LensRequest:
        """The same request for some of the rows, by slice or index. Without KL, which compares rows with each other."""
        whole = isinstance(part, slice) and part.indices(self.rows) == (0, self.rows, 1)
        if whole and self.final_rows is None:
            return self
        return replace(self, hidden=self.hidden[part], lookup=self.lookup[part], final_rows=None)
