"""Random packed trees, and attention over them token by token, for tests of the attention kernels."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from xprobe_kernels.readout import interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + ([] if interpreted() else [torch.bfloat16])


@dataclass
class Packed:
    """A random tree: for every token the end of what continues it, its position, and the token before it."""

    until: np.ndarray
    positions: np.ndarray
    parents: list[int]

    def line(self, token: int) -> list[int]:
        """The token and all that it continues."""
        found = [token]
        while self.parents[found[-1]] >= 0:
            found.append(self.parents[found[-1]])
        return found[::-1]


def grown(tokens: int, seed: int) -> Packed:
    """Chains of random length, each continuing some token of the chain being written, depth first."""
    draw = random.Random(seed)
    parents: list[int] = []
    line: list[int] = []  # of the token written last
    while len(parents) < tokens:
        del line[draw.randrange(len(line) + 1) :]
        for _ in range(min(draw.choice([1, 3, 20, 60]), tokens - len(parents))):
            parents.append(line[-1] if line else -1)
            line.append(len(parents) - 1)
    until, positions = np.arange(1, tokens + 1), np.zeros(tokens, dtype=int)
    for token in reversed(range(tokens)):
        if parents[token] >= 0:
            until[parents[token]] = max(until[parents[token]], until[token])
    for token in range(tokens):
        positions[token] = positions[parents[token]] + 1 if parents[token] >= 0 else 0
    return Packed(until, positions, parents)


def alone(tree: Packed, query: Tensor, key: Tensor, value: Tensor, scale, window, softcap, sinks) -> Tensor:
    """Every token on its own line, in fp64."""
    query, key, value = (t.double().cpu() for t in (query, key, value))
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    rows = []
    for token in range(query.shape[1]):
        line = tree.line(token)[-(window or 10**9) :]
        scores = torch.einsum("hd,hjd->hj", query[:, token], key[:, line]) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().cpu()[:, None]], 1)
        rows.append(torch.einsum("hj,hje->he", scores.softmax(-1)[:, : len(line)], value[:, line]))
    return torch.stack(rows)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def chains(*lengths: int) -> Packed:
    """Sequences with nothing in common, one behind another."""
    starts = np.cumsum([0, *lengths[:-1]])
    positions = np.concatenate([np.arange(length) for length in lengths])
    until = np.repeat(starts + lengths, lengths)
    return Packed(until, positions, [at - 1 if positions[at] else -1 for at in range(len(until))])
