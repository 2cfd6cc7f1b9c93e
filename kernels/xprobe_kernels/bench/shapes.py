"""The shapes to measure: heads of real models and the rows that they read, reduced on small machines."""

from __future__ import annotations

from dataclasses import dataclass

MANY, FEW = "many", "few"
REGIMES = (MANY, FEW)
FEW_POSITIONS = 3
VOCABULARY_STEP = 64  # a reduced vocabulary is a multiple of this


@dataclass(frozen=True)
class Head:
    """Width D and vocabulary V of a model's unembedding, and its number of layers."""

    name: str
    title: str
    layers: int
    width: int
    vocabulary: int
    softcap: float | None = None
    positions: int = 512  # captured positions in the regime "many"


HEADS = {
    head.name: head
    for head in (
        Head("smollm2-135m", "SmolLM2-135M", 30, 576, 49152, positions=64),
        Head("llama-3-8b", "Llama-3-8B", 32, 4096, 128256),
        Head("qwen2.5-7b", "Qwen2.5-7B", 28, 3584, 152064),
        Head("gemma-2-9b", "Gemma-2-9B", 42, 3584, 256000, softcap=30.0),
        Head("llama-3-70b", "Llama-3-70B", 80, 8192, 128256),
    )
}
SMALL = ("smollm2-135m", "llama-3-8b")  # the default on a CPU


@dataclass(frozen=True)
class Limits:
    """How much of a shape a machine measures. Operations are those of one matrix product, 2 R V D."""

    whole: float = float("inf")  # a shape with at most this many operations is measured at full size
    scaled: float = float("inf")  # a larger shape is reduced to this many operations
    few: float = float("inf")  # the same two limits for few rows
    weight: float = float("inf")  # limit on V * D


GPU = Limits()
CPU = Limits(whole=120e9, scaled=40e9, few=12e9)
QUICK = Limits(whole=1e9, scaled=1e9, few=0.1e9, weight=8e6)


@dataclass(frozen=True)
class Work:
    """R = blocks * positions rows of width D, V vocabulary entries. The rows of the last block are the final rows."""

    head: Head
    regime: str
    blocks: int
    positions: int
    vocabulary: int

    @property
    def name(self) -> str:
        return f"{self.head.name}/{self.regime}"

    @property
    def rows(self) -> int:
        return self.blocks * self.positions

    @property
    def full_rows(self) -> int:
        return (self.head.layers + 1) * (self.head.positions if self.regime == MANY else FEW_POSITIONS)

    @property
    def operations(self) -> int:
        """Operations of one matrix product, 2 R V D."""
        return 2 * self.rows * self.vocabulary * self.head.width

    def least_bytes(self, itemsize: int) -> int:
        """Bytes that any method must read: the weight and the rows once, (V + R) * D numbers."""
        return (self.vocabulary + self.rows) * self.head.width * itemsize

    @property
    def cut(self) -> str | None:
        """A description of what was reduced, or None."""
        cuts = []
        if self.rows < self.full_rows:
            cuts.append(f"{self.rows} of {self.full_rows} rows")
        if self.vocabulary < self.head.vocabulary:
            cuts.append(f"{self.vocabulary} of {self.head.vocabulary} vocabulary entries")
        return ", ".join(cuts) or None

    def __str__(self) -> str:
        rows, cut = f"R = {self.blocks} x {self.positions}", self.cut
        shape = f"{self.head.title}, {self.regime} rows: {rows}, D = {self.head.width}, V = {self.vocabulary}"
        return f"{shape} (CUT to fit this machine or --quick: {cut})" if cut else f"{shape} (full size)"


def work(head: Head, regime: str, limits: Limits, free_bytes: float = float("inf"), itemsize: int = 2) -> Work:
    """The work of a head in a regime. The vocabulary is cut to fit the memory, and the rows to fit the operations
    allowed.

    Half of ``free_bytes`` is for the weight and its fp32 copy, the other half for everything else.
    """
    entries = min(limits.weight, free_bytes / 2 / (itemsize + 4)) / head.width
    vocabulary = head.vocabulary
    if entries < vocabulary:
        vocabulary = max(int(entries) // VOCABULARY_STEP, 1) * VOCABULARY_STEP
    positions = head.positions if regime == MANY else FEW_POSITIONS
    blocks, per_row = head.layers + 1, 2 * vocabulary * head.width
    operations = blocks * positions * per_row
    whole = operations <= (limits.whole if regime == MANY else limits.few)
    if not whole:
        allowed = limits.scaled if regime == MANY else limits.few
        rows = max(int(allowed // per_row), 1)
        positions = max(rows // blocks, 1)
        blocks = min(blocks, rows)
    return Work(head, regime, blocks, positions, vocabulary)
