"""The fused lens for any number of rows: block by block, with KL and the k largest logits.

Many rows are read in blocks, where all of them at once would take more memory than ``MEMORY_SHARE``. For KL, the final
rows are read first and keep their softmax weights; then the other rows are compared with them (triton_fold.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from xprobe_kernels import divergence, triton_top
from xprobe_kernels.configs import Config
from xprobe_kernels.request import LensRequest
from xprobe_kernels.transfer import upload
from xprobe_kernels.triton_lens import configuration, device_limits, launch
from xprobe_kernels.triton_rows import Kept, dense, merge, operand_dtype, prepare, unchanged

MEMORY_SHARE = 1 / 600  # of the logits in fp32
SMALLEST_BLOCK = 1024  # rows: fewer would not keep a card busy


def readout(request: LensRequest, config: Config | None = None, splits: int | None = None) -> dict[str, Any]:
    """The fields of ``Readout``. Tuning passes ``config`` and ``splits``; without them the launch is chosen."""
    request = dense(request)
    config = config or configuration(request)
    if request.final_rows is None:
        return _cat(_blocks(request, range(request.rows), config, splits)) | {"kl": None}
    columns = triton.cdiv(request.head.vocab_size, config.block_n) * config.block_n
    most = max(1, min(request.workspace_bytes // 4, 2**31 - 1) // columns)
    parts, rows = [], []
    for group in divergence.groups(request.final_rows.cpu(), most):
        kept = Kept.empty(len(group.finals), request.head, config)
        fields, _ = _read(
            request.of_rows(_index(group.finals, request)), config.for_rows(len(group.finals)), splits, kept
        )
        kept.logsumexp.copy_(fields["logsumexp"])
        kept.entropy.copy_(fields["entropy"])
        fields["kl"] = torch.zeros_like(kept.entropy).where(kept.entropy.isfinite(), kept.entropy)
        final_of = upload(group.final_of, request.hidden.device)
        parts += _blocks(request, group.others, config, splits, kept, final_of)
        alone = _index(group.alone.nonzero()[:, 0], request)
        parts.append({name: None if value is None else value[alone] for name, value in fields.items()})
        rows += [group.others, group.finals[group.alone]]
    fields = _cat(parts)
    order = torch.cat(rows)
    if not torch.equal(order, torch.arange(len(order))):
        back = upload(order.argsort(), request.hidden.device)
        fields = {name: None if value is None else value[back] for name, value in fields.items()}
    return fields


def _blocks(
    request: LensRequest, rows: range | Tensor, config: Config, splits: int | None,
    kept: Kept | None = None, final_of: Tensor | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The fields of ``Readout`` for these rows, block by block."""
    block = max(1, rows_per_block(request, len(rows), config))
    parts = []
    for start in range(0, max(len(rows), 1), block):
        part = slice(start, min(start + block, len(rows)))
        index = part if isinstance(rows, range) else _index(rows[part], request)
        own = None if final_of is None else final_of[part]
        fields, cross = _read(request.of_rows(index), config, splits, kept, own)
        if kept is not None and own is not None:
            fields["kl"] = (cross - kept.entropy[own]).clamp(min=0)
        parts.append(fields)
    return parts


def _read(
    request: LensRequest, config: Config, splits: int | None, kept: Kept | None = None, final_of: Tensor | None = None
) -> tuple[dict[str, Any], Tensor]:
    """The fields of ``Readout`` for one block of rows, and their cross-entropy if they are compared with final rows."""
    prepared = prepare(request)
    partials = launch(request, prepared, config, splits, kept, final_of)
    if request.top_k and request.rows and not config.carries_top:
        top, top_ids = triton_top.largest(request, prepared, partials.maxima, config)
        partials = replace(partials, top=top, top_ids=top_ids)
    return merge(request, prepared, partials, compared=final_of is not None)


def _index(rows: Tensor, request: LensRequest) -> slice | Tensor:
    """Rows as a slice if they follow each other, else on the device. ``rows`` is in main memory."""
    if len(rows) and bool((rows.diff() == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return upload(rows, request.hidden.device)


def _cat(parts: list[dict[str, Any]]) -> dict[str, Any]:
    if len(parts) == 1:
        return parts[0]
    return {name: None if value is None else torch.cat([part[name] for part in parts])
            for name, value in parts[0].items()}  # fmt: skip


def rows_per_block(request: LensRequest, rows: int, config: Config) -> int:
    """How many rows are read at a time.

    All of them, if what a call needs beside its inputs and results takes at most ``MEMORY_SHARE`` of the logits' size;
    otherwise about as many as keep to it. Such a block occupies all processors once.
    """
    vocabulary, width = request.head.vocab_size, request.head.width
    each = 0 if unchanged(request) else width * operand_dtype(request.hidden, request.head).itemsize
    if request.top_k and not config.carries_top:
        tiles = triton.cdiv(vocabulary, config.block_n)
        each += 4 * tiles + 8 * request.top_k * min(request.top_k, tiles)
    allowed = int(rows * 4 * vocabulary * MEMORY_SHARE)
    block = max(allowed // max(each, 1), SMALLEST_BLOCK)
    if block >= rows:
        return rows
    slots = device_limits(request.hidden.device)[1] * config.resident
    row_tiles = max(block // config.block_m, 1)
    row_tiles = row_tiles // slots * slots if row_tiles >= slots else slots // triton.cdiv(slots, row_tiles)
    return row_tiles * config.block_m
