"""Launch configurations of the fused lens, fixed per architecture and dtype, so that a cold start is predictable.

Nothing is tuned at import or at the first call. ``benchmarks/tune.py`` measures candidates on a GPU and prints the
lines for this file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch


@dataclass(frozen=True)
class Architecture:
    """The limits of an architecture that a configuration must respect. Sizes in bytes."""

    name: str
    shared: int  # per program
    level2: int  # cache that all programs share
    descriptors: bool  # has a copy engine (TMA) for Triton's tensor descriptors


ARCHITECTURES = {
    "sm_80": Architecture("sm_80", 163 << 10, 40 << 20, False),
    "sm_86": Architecture("sm_86", 99 << 10, 6 << 20, False),
    "sm_89": Architecture("sm_89", 99 << 10, 72 << 20, False),
    "sm_90": Architecture("sm_90", 227 << 10, 50 << 20, True),
    "sm_100": Architecture("sm_100", 227 << 10, 126 << 20, True),
    "sm_120": Architecture("sm_120", 99 << 10, 96 << 20, True),
    "gfx942": Architecture("gfx942", 64 << 10, 4 << 20, False),
    "interpreter": Architecture("interpreter", 1 << 30, 1 << 30, False),
}
SMALLEST = Architecture("unknown", 48 << 10, 4 << 20, False)


@dataclass(frozen=True)
class Config:
    """Launch options of the lens kernel."""

    block_m: int  # rows per program
    block_n: int  # vocabulary entries per tile
    block_k: int  # columns of the width per step of the product
    warps: int
    stages: int  # software pipelining depth
    resident: int = 1  # programs that share a multiprocessor
    parts: int = 1  # 2 or 4: a tile is read in halves or quarters of its columns, with fewer registers
    descriptors: bool = False  # loads through tensor descriptors (TMA on Hopper and later)
    flat: bool = False  # one loop over tiles and steps, so that loads are pipelined across tiles
    carries_top: bool = False  # carries the k largest logits along; otherwise triton_top.py finds them afterwards

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the pipelined operands."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * itemsize

    def accumulators(self, warp: int = 32) -> int:
        """Registers per thread for the tile of logits."""
        return self.block_m * self.block_n // (self.warps * warp)

    def fits(self, architecture: Architecture, itemsize: int) -> bool:
        """Whether shared memory and registers of ``architecture`` are sufficient."""
        warp = 64 if architecture.name.startswith("gfx") else 32
        threads = self.resident * self.warps * warp
        return (
            self.resident * self.shared_bytes(itemsize) <= architecture.shared
            and self.accumulators(warp) <= 128
            and threads * (self.accumulators(warp) + 40) <= 65536 * (2 if warp == 64 else 1)
            and (architecture.descriptors or not self.descriptors)
        )

    def for_rows(self, rows: int) -> Config:
        """The configuration with smaller row tiles if there are only ``rows`` rows."""
        block = self.block_m
        while block > 16 and block // 2 >= rows:
            block //= 2
        return self if block == self.block_m else replace(self, block_m=block, warps=min(self.warps, 4))

    @lru_cache(1024)  # noqa: B019 - configurations are few, and equal ones share an entry
    def for_work(self, *, capped: bool, compared: bool) -> Config:
        """The configuration for work with a soft-cap (``capped``) or KL (``compared``): smaller parts."""
        if self.accumulators() <= 64:
            return self
        return replace(self, parts=max(self.parts, 4 if compared else 2 if capped else 1))


# (architecture, bytes per operand) -> (many rows, few rows). fp32 at "ieee" runs without matrix units.
MANY, FEW = 0, 1
CONFIGS: dict[tuple[str, int], tuple[Config, Config]] = {
    ("sm_80", 2): (Config(128, 64, 64, 8, 3), Config(64, 64, 64, 4, 4)),
    # many rows: the fastest on an H200 (docs/kernels.md). Smaller tiles need more bandwidth than its caches have
    ("sm_90", 2): (
        Config(128, 256, 64, 8, 3, parts=2, descriptors=True),
        Config(128, 256, 64, 8, 4, parts=2, descriptors=True),
    ),
    ("sm_100", 2): (Config(128, 128, 64, 8, 4, parts=2), Config(128, 64, 128, 8, 3)),
    ("gfx942", 2): (Config(128, 64, 64, 8, 2), Config(64, 64, 64, 4, 2)),
    ("sm_80", 4): (Config(64, 64, 32, 8, 3), Config(32, 64, 32, 4, 3)),
    ("sm_90", 4): (Config(64, 64, 32, 8, 3), Config(32, 64, 32, 4, 3)),
    ("sm_100", 4): (Config(64, 64, 32, 8, 3), Config(32, 64, 32, 4, 3)),
    ("gfx942", 4): (Config(64, 64, 32, 8, 2), Config(32, 64, 32, 8, 2)),
    ("interpreter", 2): (Config(32, 512, 64, 4, 1), Config(32, 512, 64, 4, 1)),
    ("interpreter", 4): (Config(32, 512, 64, 4, 1), Config(32, 512, 64, 4, 1)),
}
SAFE = Config(32, 64, 32, 4, 2)  # fits everywhere
PLAIN = Config(64, 64, 32, 4, 2)  # for rows that tensor descriptors cannot describe; spills on no architecture
MAX_BLOCK_ROWS = 64  # rows of a program that computes a tile again (triton_top.py)
FEW_ROWS = 256  # up to this many rows the pass is bound by reading the weights


@lru_cache(1024)
def choose(architecture: str, dtype: torch.dtype, rows: int) -> Config:
    """The configuration for ``rows`` rows in ``dtype``.

    An architecture without an entry takes the entry of the newest older architecture that fits.
    """
    limits, itemsize = limits_of(architecture), dtype.itemsize
    for name in _older(architecture):
        if (name, itemsize) in CONFIGS:
            few = rows <= FEW_ROWS
            config = replace(CONFIGS[name, itemsize][FEW if few else MANY].for_rows(rows), carries_top=few)
            if config.fits(limits, itemsize):
                return config
    return SAFE.for_rows(rows)


@cache
def limits_of(architecture: str) -> Architecture:
    """The limits of an architecture. An unknown one has the limits of the newest older one of its kind."""
    return next((ARCHITECTURES[name] for name in _older(architecture)), SMALLEST)


def _older(architecture: str) -> list[str]:
    """Known architectures of the same kind that are not newer, newest first."""
    match = re.fullmatch(r"(sm_|gfx)([0-9a-f]+)", architecture)
    if not match:
        return [architecture] if architecture in ARCHITECTURES else []
    kind, base = match.group(1), 10 if match.group(1) == "sm_" else 16
    known = [name for name in ARCHITECTURES if name.startswith(kind)]
    ages = {name: int(name.removeprefix(kind), base) for name in known}
    own = int(match.group(2), base)
    return sorted((name for name in known if ages[name] <= own), key=lambda name: -ages[name])


@cache
def choose_splits(row_tiles: int, tiles: int, slots: int, row_tile_bytes: int = 0, level2: int = 0) -> int:
    """The number of splits of the vocabulary, which has ``tiles`` tiles. ``slots`` programs run at a time.

    The number with the least idle time is chosen. If several are equal, it is the smallest, because each split writes
    partial results.
    Time is idle in slots that the last wave of programs leaves empty, and in a last split with fewer tiles.
    ``level2`` is the size of the second-level cache in bytes: rows of running programs fill at most half of it.
    """
    if row_tiles <= 0 or tiles <= 0:
        return 1
    fewest = 1
    if level2:
        fewest = min(-(-2 * slots * row_tile_bytes // level2), slots)
    most = max(1, min(tiles, 4 * slots))
    best, best_cost = 1, float("inf")
    for wanted in range(min(fewest, most), most + 1):
        each = -(-tiles // wanted)
        parts = -(-tiles // each)
        waves = -(-row_tiles * parts // slots)
        cost = waves * (each + 0.5)  # starting a program and storing its results takes as long as half a tile
        if cost < best_cost * 0.995:
            best, best_cost = parts, cost
    return best


def candidates(architecture: str, itemsize: int) -> list[Config]:
    """All configurations worth measuring on ``architecture``: the combinations that fit."""
    limits = limits_of(architecture)
    shapes = [  # block_m, block_n, warps, resident, parts
        (128, 128, 8, 1, 1), (128, 128, 4, 1, 1), (128, 256, 8, 1, 1), (128, 256, 8, 1, 2), (256, 128, 8, 1, 1),
        (256, 128, 8, 1, 2), (64, 256, 4, 1, 1), (64, 256, 8, 1, 1), (64, 128, 4, 2, 1), (128, 64, 4, 2, 1),
        (128, 64, 8, 1, 1), (64, 64, 4, 2, 1),
    ]  # fmt: skip
    options = [{}, {"flat": True}]
    if limits.descriptors:
        options = [{"descriptors": True}, {"descriptors": True, "flat": True}, *options]
    configs = []
    for loading in options:
        for m, n, warps, resident, parts in shapes:
            for block_k, stages in ((64, 4), (64, 3), (32, 4), (128, 3), (128, 2)):
                config = Config(m, n, block_k, warps, stages, resident, parts, **loading)
                if config.fits(limits, itemsize):
                    configs.append(config)
    return configs
