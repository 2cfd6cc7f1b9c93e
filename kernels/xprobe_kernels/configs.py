"""Launch configurations of the fused lens, fixed per architecture and dtype: a cold start is predictable.

No autotuning at import. ``benchmarks/tune.py`` measures candidates on a card and says what belongs here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Architecture:
    """What bounds a configuration. Sizes in bytes."""

    name: str
    shared: int  # per program
    level2: int  # cache that all programs share
    descriptors: bool  # has a copy engine that Triton's tensor descriptors use


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
    """One way to launch the lens kernel."""

    block_m: int  # rows per program
    block_n: int  # vocabulary entries per tile
    block_k: int  # of the width, per step of the product
    warps: int
    stages: int  # software pipelining depth
    resident: int = 1  # programs that share a multiprocessor
    halves: int = 1  # 2: the tile is folded in two halves of its columns
    descriptors: bool = False  # loads through tensor descriptors (TMA on Hopper and later)
    flat: bool = False  # one loop over tiles and steps: the pipeline of loads runs on across tiles

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the pipelined operands."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * itemsize

    def accumulators(self, warp: int = 32) -> int:
        """Registers per thread that the tile of logits takes."""
        return self.block_m * self.block_n // (self.warps * warp)

    def fits(self, architecture: Architecture, itemsize: int) -> bool:
        """Whether shared memory and registers suffice on ``architecture``."""
        warp = 64 if architecture.name.startswith("gfx") else 32
        threads = self.resident * self.warps * warp
        return (
            self.resident * self.shared_bytes(itemsize) <= architecture.shared
            and self.accumulators(warp) <= 128
            and threads * (self.accumulators(warp) + 40) <= 65536 * (2 if warp == 64 else 1)
            and (architecture.descriptors or not self.descriptors)
        )

    def for_rows(self, rows: int) -> Config:
        """Fewer rows per program when there are no more."""
        block = self.block_m
        while block > 16 and block // 2 >= rows:
            block //= 2
        return self if block == self.block_m else replace(self, block_m=block, warps=min(self.warps, 4))


# (architecture, bytes per operand) -> (many rows, few rows). 4: fp32, which at "ieee" runs without matrix units.
MANY, FEW = 0, 1
CONFIGS: dict[tuple[str, int], tuple[Config, Config]] = {
    ("sm_80", 2): (Config(128, 64, 64, 8, 3), Config(64, 64, 64, 4, 4)),
    # reasoned, not measured: smaller tiles ask more of the second-level cache than it gives (docs/kernels.md)
    ("sm_90", 2): (
        Config(256, 128, 64, 8, 3, halves=2, descriptors=True),
        Config(128, 256, 64, 8, 4, halves=2, descriptors=True),
    ),
    ("sm_100", 2): (Config(128, 128, 64, 8, 4, halves=2), Config(128, 64, 128, 8, 3)),
    ("gfx942", 2): (Config(128, 64, 64, 8, 2), Config(64, 64, 64, 4, 2)),
    ("sm_80", 4): (Config(64, 64, 32, 8, 3), Config(32, 64, 32, 4, 3)),
    ("sm_90", 4): (Config(64, 64, 32, 8, 3), Config(32, 64, 32, 4, 3)),
    ("sm_100", 4): (Config(64, 64, 32, 8, 3), Config(32, 64, 32, 4, 3)),
    ("gfx942", 4): (Config(64, 64, 32, 8, 2), Config(32, 64, 32, 8, 2)),
    ("interpreter", 2): (Config(32, 512, 64, 4, 1), Config(32, 512, 64, 4, 1)),
    ("interpreter", 4): (Config(32, 512, 64, 4, 1), Config(32, 512, 64, 4, 1)),
}
SAFE = Config(32, 64, 32, 4, 2)  # fits everywhere
PLAIN = Config(64, 64, 32, 4, 2)  # for rows that tensor descriptors cannot describe; spills nowhere
FEW_ROWS = 256  # up to here the pass is bounded by reading the weights


def choose(architecture: str, dtype: torch.dtype, rows: int) -> Config:
    """The configuration for ``rows`` rows in ``dtype``: the architecture's own, else the newest older one that fits."""
    limits, itemsize = limits_of(architecture), dtype.itemsize
    for name in _older(architecture):
        if (name, itemsize) in CONFIGS:
            config = CONFIGS[name, itemsize][FEW if rows <= FEW_ROWS else MANY].for_rows(rows)
            if config.fits(limits, itemsize):
                return config
    return SAFE.for_rows(rows)


def limits_of(architecture: str) -> Architecture:
    """What bounds a configuration there; an unknown architecture has the limits of the newest older one of its kind."""
    return next((ARCHITECTURES[name] for name in _older(architecture)), SMALLEST)


def _older(architecture: str) -> list[str]:
    """Known architectures of the same kind, none newer, the newest first."""
    found = re.fullmatch(r"(sm_|gfx)([0-9a-f]+)", architecture)
    if not found:
        return [architecture] if architecture in ARCHITECTURES else []
    kind, base = found.group(1), 10 if found.group(1) == "sm_" else 16
    known = [name for name in ARCHITECTURES if name.startswith(kind)]
    ages = {name: int(name.removeprefix(kind), base) for name in known}
    own = int(found.group(2), base)
    return sorted((name for name in known if ages[name] <= own), key=lambda name: -ages[name])


@cache
def choose_splits(row_tiles: int, tiles: int, slots: int, row_tile_bytes: int = 0, level2: int = 0) -> int:
    """Into how many parts to split the ``tiles`` of the vocabulary: parts x ``row_tiles`` programs run on ``slots``.

    Least idle time first (programs of the last wave, tiles of the last part), then the fewest parts: each part writes
    sums of its own. ``level2``: rows of the programs that run at once take at most half of that cache.
    """
    if row_tiles <= 0 or tiles <= 0:
        return 1
    least = 1
    if level2:
        least = min(-(-2 * slots * row_tile_bytes // level2), slots)
    most = max(1, min(tiles, 4 * slots))
    best, best_cost = 1, float("inf")
    for wanted in range(min(least, most), most + 1):
        each = -(-tiles // wanted)
        parts = -(-tiles // each)
        waves = -(-row_tiles * parts // slots)
        cost = waves * (each + 0.5)  # half a tile's time to start a program and store what it found
        if cost < best_cost * 0.995:
            best, best_cost = parts, cost
    return best


def candidates(architecture: str, itemsize: int) -> list[Config]:
    """What is worth measuring on ``architecture``: every combination that fits, the plain ones first."""
    limits = limits_of(architecture)
    shapes = [  # block_m, block_n, warps, resident, halves
        (128, 128, 8, 1, 1), (128, 128, 4, 1, 1), (128, 256, 8, 1, 1), (128, 256, 8, 1, 2), (256, 128, 8, 1, 1),
        (256, 128, 8, 1, 2), (64, 256, 4, 1, 1), (64, 256, 8, 1, 1), (64, 128, 4, 2, 1), (128, 64, 4, 2, 1),
        (128, 64, 8, 1, 1), (64, 64, 4, 2, 1),
    ]  # fmt: skip
    ways = [{}, {"flat": True}]
    if limits.descriptors:
        ways = [{"descriptors": True}, {"descriptors": True, "flat": True}, *ways]
    found = []
    for way in ways:
        for m, n, warps, resident, halves in shapes:
            for block_k, stages in ((64, 4), (64, 3), (32, 4), (128, 3), (128, 2)):
                config = Config(m, n, block_k, warps, stages, resident, halves, **way)
                if config.fits(limits, itemsize):
                    found.append(config)
    return found
