"""Attention over a packed tree. It replaces the model's own attention during a pass.

On a GPU, one kernel computes it (``xprobe_kernels.attention``). Elsewhere, and for shapes that the kernel does not
support, the library's attention computes it segment by segment: every segment on itself, then on each segment above it,
merged exactly.

Softmax attention over a set of keys can be computed from parts of the set. Each part gives an output and the logarithm
of its normaliser. The result is the average of the outputs, weighted by the normalisers. So all tokens below a shared
segment attend to it in one product, without a mask and without copies of its keys, and the model runs over the packed
sequence as over any other. (FlashAttention's tiles and cascade inference use the same identity:
https://flashinfer.ai/2024/02/02/cascade-inference.html)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from xprobe_kernels.attention import Blocks, Reach, serves, tree_attention
from xprobe_kernels.transfer import upload

from xprobe.capture.tree import Segment, Tree

NAME = "xprobe_tree"
SCORES_BYTES = 64 << 20  # most bytes of attention scores in memory, where no fused attention can be used
PADDING = 1.25  # a batch of segments has at most this many times the tokens of its segments
_IGNORED = {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "cache_position"}


class PackedAttention(Protocol):
    """Computes the attention of one pass in place of the model's own."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule, sinks: Tensor | None) -> Tensor:
        """Attention of the queries [1, H, N, d] of N tokens -> [1, N, H, d]. ``key``, ``value`` are of these tokens.

        ``sinks`` [H] are logits that only add to the denominator.
        """


_ACTIVE: ContextVar[PackedAttention | None] = ContextVar("xprobe_tree", default=None)


class NotShareable(Exception):
    """The model's attention needs something that packed attention does not have."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Segments of similar length, for one call of attention on themselves.

    ``indices`` [B, T] are tokens of the packed sequence, one row per segment, padded with the segment's last token.
    ``real`` [n] are the indices into B * T that are no padding, and ``targets`` [n] their tokens.
    """

    indices: Tensor
    real: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """A tree prepared for one device. What only one type of attention needs is made at its first use.

    ``kernel``: whether the kernel (``xprobe_kernels.attention``) may be used, or only the library's attention.
    ``kept``: a list that gets the keys and values [1, G, N, d] of each attention layer, for generation.
    """

    tree: Tree
    device: torch.device
    kernel: bool = True
    calls: list[bool] = field(default_factory=list)  # one entry for each attention layer that used this layout
    kept: list[tuple[Tensor, Tensor]] | None = None
    _copies: dict[torch.device, Layout] = field(default_factory=dict)
    _reaches: dict[Blocks, Reach] = field(default_factory=dict)

    @cached_property
    def positions(self) -> Tensor:
        """Positions of the tokens in their own prompts [N], int64."""
        return upload(torch.tensor(self.tree.positions), self.device)

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """All segments, in batches of similar length."""
        return tuple(_batch(group, self.device) for group in _similar(self.tree.segments))

    @cached_property
    def shared(self) -> tuple[tuple[Segment, int], ...]:
        """Segments with tokens below them, each with the largest position of these tokens."""
        below = ((s, self.tree.positions[s.stop : s.end]) for s in self.tree.segments)
        return tuple((segment, max(positions)) for segment, positions in below if positions)

    def reach(self, blocks: Blocks) -> Reach:
        """The tree in the form that the kernel takes."""
        if blocks not in self._reaches:
            self._reaches[blocks] = Reach.from_tree(*ends_below(self.tree), blocks, self.device)
        return self._reaches[blocks]

    def on(self, device: torch.device) -> Layout:
        """The layout on the device of a block. Blocks may lie on several devices."""
        if device == self.device:
            return self
        return self._copies.setdefault(device, Layout(self.tree, device, self.kernel))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule, sinks: Tensor | None) -> Tensor:
        """Attention of all tokens of the tree; see ``PackedAttention``."""
        self.calls.append(True)
        if self.kept is not None:
            self.kept.append((key, value))
        layout = self.on(query.device)
        if layout.kernel and serves(query[0], key[0], value[0]):
            reach = layout.reach(Blocks.choose(query.dtype.itemsize, max(query.shape[-1], value.shape[-1])))
            output = tree_attention(
                query[0],
                key[0],
                value[0],
                reach,
                scale=rule.scale,
                window=rule.window,
                softcap=rule.softcap,
                sinks=sinks,
            )
            return output[None]
        wide = torch.promote_types(query.dtype, torch.float32)
        out, norms = within_segments(layout.batches, query, key, value, rule)
        for segment, deepest in layout.shared:
            own, below = slice(segment.start, segment.stop), slice(segment.stop, segment.end)
            q, k, v = query[:, :, below], key[:, :, own], value[:, :, own]
            if rule.plain(deepest - segment.depth):
                part, norm = fused(q, k, v, rule.scale, causal=False)
            else:
                part, norm = rule.explicit(q, k, v, layout.positions[below], layout.positions[own])
            weight = torch.sigmoid(norms[:, below] - norm[0])
            out[:, below] = torch.lerp(part[0].to(wide), out[:, below], weight[..., None])
            norms[:, below] = torch.logaddexp(norms[:, below], norm[0].to(wide))
        if sinks is not None:
            out *= torch.sigmoid(norms - sinks.to(wide)[:, None])[..., None]
        return out.to(query.dtype).transpose(0, 1)[None].contiguous()


def ends_below(tree: Tree) -> tuple[NDArray, NDArray]:
    """For each token of a tree, the end of the tokens that continue it; and the tokens' positions: [N], [N].

    Examples
    --------
    >>> from xprobe.capture.tree import make_tree
    >>> [part.tolist() for part in ends_below(make_tree([(5, 6, 7, 8), (5, 6, 7, 9)], node_cost=1))]
    [[5, 5, 5, 4, 5], [0, 1, 2, 3, 3]]
    """
    return np.repeat([s.end for s in tree.segments], [s.length for s in tree.segments]), np.array(tree.positions)


def within_segments(
    batches: Sequence[Batch], query: Tensor, key: Tensor, value: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Attention [H, N, d] of tokens on their own segments, and the log of its denominator [H, N], in fp32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    heads, tokens, width = query.shape[1], query.shape[2], value.shape[-1]
    out = torch.empty(heads, tokens, width, dtype=wide, device=query.device)
    norms = torch.empty(heads, tokens, dtype=wide, device=query.device)
    for batch in batches:
        q, k, v = (t[0][:, batch.indices].transpose(0, 1) for t in (query, key, value))
        longest = batch.indices.shape[1]
        if rule.plain(longest - 1):
            part, norm = fused(q, k, v, rule.scale, causal=True)
        else:
            positions = torch.arange(longest, device=query.device)
            part, norm = rule.explicit(q, k, v, positions, positions)
        out[:, batch.targets] = part.transpose(0, 1).flatten(1, 2)[:, batch.real].to(wide)
        norms[:, batch.targets] = norm.transpose(0, 1).flatten(1, 2)[:, batch.real].to(wide)
    return out, norms


@contextmanager
def packed_attention(model: Any, attention: PackedAttention) -> Iterator[None]:
    """Makes the model's attention layers compute ``attention``. The exit undoes it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    configs = {id(c): c for c in (model.config, model.base_model.config, model.config.get_text_config(decoder=True))}
    before = [(config, config._attn_implementation) for config in configs.values()]
    token = _ACTIVE.set(attention)
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        _ACTIVE.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention [1, H, N, d] -> [1, N, H, d], with the signature of transformers' attention functions.

    Raises
    ------
    NotShareable
        An argument asks for something that this function does not support: a mask, a bias, a batch.
    """
    active = _ACTIVE.get()
    unknown = [k for k, v in others.items() if k not in _IGNORED and isinstance(v, Tensor)]
    if active is None or attention_mask is not None or unknown or query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise NotShareable(f"attention with {', '.join(unknown) or 'a mask, a batch or a cache'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = Rule(scale, sliding_window or None, softcap or None)
    return active.attend(query, key, value, rule, s_aux), None


@dataclass(frozen=True)
class Rule:
    """How scores are computed from queries and keys."""

    scale: float
    window: int | None
    softcap: float | None

    def plain(self, distance: int) -> bool:
        """Whether tokens up to ``distance`` apart need neither soft-cap nor window."""
        return self.softcap is None and (self.window is None or distance < self.window)

    def explicit(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of each query on the keys at its position or before, and the log of its denominator.

        ``mask`` [queries, keys], where given, says which keys a query may reach at all.
        """
        wide = torch.promote_types(query.dtype, torch.float32)
        key, value = (_all_heads(t, query.shape[1]) for t in (key, value))
        outs, norms = [], []
        step = max(1, SCORES_BYTES // (query.shape[0] * query.shape[1] * key.shape[2] * wide.itemsize))
        for start in range(0, query.shape[2], step):
            some = slice(start, start + step)
            scores = (query[:, :, some] @ key.transpose(2, 3)).to(wide) * self.scale
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            distance = query_positions[some, None] - key_positions
            allowed = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
            if mask is not None:
                allowed = allowed & mask[some]
            scores = scores.masked_fill(~allowed, -torch.inf)
            norm = scores.logsumexp(-1)  # -inf for a query that reaches no key: its weights are then 0
            weights = (scores - norm.nan_to_num(neginf=0.0)[..., None]).exp()
            outs.append(weights.to(value.dtype) @ value)
            norms.append(norm)
        return torch.cat(outs, 2), torch.cat(norms, 2)


def fused(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Torch's fused attention and the log of its denominator, which torch's public function does not return."""
    width = value.shape[-1]
    if width < query.shape[-1]:  # latent attention: values are narrower than keys
        value = F.pad(value, (0, query.shape[-1] - width))
    if query.device.type == "cpu":
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
        return results[0][..., :width], results[1]
    key, value = (_all_heads(t, query.shape[1]) for t in (key, value))
    if query.dtype.itemsize == 2 and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0:
        results = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
        return results[0][..., :width], results[1]
    results = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )
    return results[0][..., :width], results[1][:, :, : query.shape[2]]  # its rows are padded to a multiple of 32


def _all_heads(shared: Tensor, heads: int) -> Tensor:
    """Keys or values [B, G, T, d] repeated for the H query heads that use them."""
    groups = heads // shared.shape[1]
    return shared if groups == 1 else shared.repeat_interleave(groups, dim=1)


def _similar(segments: tuple[Segment, ...]) -> list[list[Segment]]:
    """Segments in batches of similar length."""
    batches: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (-s.length, s.start)):
        batch = batches[-1] if batches else []
        own = sum(s.length for s in batch) + segment.length
        if batch and batch[0].length * (len(batch) + 1) <= PADDING * own:
            batch.append(segment)
        else:
            batches.append([segment])
    return batches


def _batch(segments: list[Segment], device: torch.device) -> Batch:
    longest = segments[0].length
    offsets = torch.arange(longest)
    starts = torch.tensor([s.start for s in segments])[:, None]
    lengths = torch.tensor([s.length for s in segments])[:, None]
    indices = starts + torch.minimum(offsets, lengths - 1)
    real = (offsets < lengths).flatten().nonzero()[:, 0]
    return Batch(*(upload(part, device) for part in (indices, real, indices.flatten()[real])))
