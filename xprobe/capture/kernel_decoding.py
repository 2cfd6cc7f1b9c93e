"""Attention of new tokens on a GPU: one kernel computes it, on the keys of the tree and on those of new tokens.

``tree_decoding`` does the same with the library's attention, in parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from xprobe_kernels.attention import continued_attention
from xprobe_kernels.continuation import Continuation
from xprobe_kernels.reach import Blocks
from xprobe_kernels.transfer import upload

from xprobe.capture.tree import Tree
from xprobe.capture.tree_attention import NotShareable, Rule, ends_below


class KernelDecoding:
    """Attention of the next tokens of P prompts; a ``PackedAttention``. The parameters are those of ``Decoding``.

    Each layer has room for the keys and values of all new tokens [G, P * most, d], prompt by prompt.
    """

    def __init__(self, tree: Tree, kept: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int], most: int) -> None:
        self._kept, self._lengths, self._most = kept, lengths, most
        self._until, self._tree_positions = ends_below(tree)
        ends = [tree.index(prompt, length - 1) for prompt, length in enumerate(lengths)]
        self._order = sorted(range(len(ends)), key=ends.__getitem__)  # neighbours in the tree are neighbours in a block
        self._rank = {prompt: rank for rank, prompt in enumerate(self._order)}
        self._ends = [ends[prompt] for prompt in self._order]
        self._generated: list[tuple[Tensor, Tensor]] = []
        self._live: list[int] = []
        self._placed: dict[tuple[torch.device, Blocks], tuple[Continuation, Tensor]] = {}
        self._positions = torch.empty(0)
        self._step = self._layer = -1

    def start_step(self, live: Sequence[int], device: torch.device) -> Tensor:
        """Begins a pass over the next token of the prompts ``live``. Returns the tokens' positions [n] on ``device``.

        A prompt that was left out once has no further tokens.
        """
        self._step, self._layer = self._step + 1, -1
        if list(live) == self._live:
            self._positions.add_(1)
            for continuation, slots in self._placed.values():
                continuation.advance()
                slots.add_(1)
        else:
            self._live = list(live)
            self._placed = {}
            self._positions = upload(torch.tensor([self._lengths[prompt] + self._step for prompt in live]), device)
        return self._positions

    def _on(self, device: torch.device, blocks: Blocks) -> tuple[Continuation, Tensor]:
        """What each new token attends to, and where its keys and values go [n]."""
        if (device, blocks) not in self._placed:
            slots = [self._rank[prompt] * self._most + self._step for prompt in self._live]
            self._placed[device, blocks] = (
                Continuation.from_tree(
                    self._until, self._tree_positions, self._ends, [self._most] * len(self._ends), slots, blocks, device
                ),
                upload(torch.tensor(slots), device),
            )
        return self._placed[device, blocks]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule, sinks: Tensor | None) -> Tensor:
        """Attention of the new tokens [1, H, n, d] -> [1, n, H, d]; see ``PackedAttention``."""
        self._layer += 1
        if self._layer >= len(self._kept) or query.shape[2] != len(self._live):
            raise NotShareable("another number of attention layers or tokens than in the pass before")
        blocks = Blocks.choose(query.dtype.itemsize, max(query.shape[-1], value.shape[-1]))
        continuation, slots = self._on(query.device, blocks)
        if self._layer == len(self._generated):
            room = len(self._ends) * self._most
            self._generated.append(tuple(t.new_zeros(t.shape[1], room, t.shape[3]) for t in (key, value)))  # type: ignore[arg-type]
        own = self._generated[self._layer]
        for store, new in zip(own, (key, value), strict=True):
            store.index_copy_(1, slots, new[0])
        keys, values = self._kept[self._layer]
        found = continued_attention(
            query[0], (keys[0], values[0]), own, continuation, scale=rule.scale, window=rule.window,
            softcap=rule.softcap, sinks=sinks,
        )  # fmt: skip
        return found[None]
