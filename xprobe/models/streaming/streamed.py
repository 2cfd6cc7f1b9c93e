"""Runs a model that is larger than memory layer by layer: every block is read once for all passes together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xprobe.errors import ModelError
from xprobe.models import loading, sources
from xprobe.models.anatomy import (
    Anatomy,
    block_lists,
    changed_sample_ids,
    check_causal,
    check_finite,
    input_device,
    inspect,
    sample_ids,
    single_block_list,
)
from xprobe.models.block_io import compute_logits, hidden_input
from xprobe.models.checkpoint import Checkpoint
from xprobe.models.gguf import saved_warnings
from xprobe.models.messages import quiet
from xprobe.models.passes import Pass
from xprobe.models.placement import Placement, build_empty
from xprobe.models.streaming.spill import HiddenStore
from xprobe.models.streaming.stand_ins import OUTPUT_FORMS, BlockRunner, replaced_forwards

SPILL_BYTES = 2 << 30
ROWS_AT_ONCE = 64  # of own_logits
PROBES = 2  # passes that a sweep adds in front of its own


@dataclass(frozen=True, eq=False)
class StreamedModel:
    """A causal decoder whose blocks are on the meta device and everything else is real.

    Attributes
    ----------
    model : transformers model in evaluation mode
    anatomy : Anatomy
        As of a model in memory; its head is real, its blocks hold no numbers outside a sweep.
    checkpoint : Checkpoint
        ``checkpoint.bytes_read`` counts what was read.
    nbytes : int
        Bytes of the stored tensors that the model uses: what opening and one sweep read together.
    """

    model: Any
    anatomy: Anatomy
    checkpoint: Checkpoint
    nbytes: int
    placement: Placement
    block_runner: BlockRunner

    def load(self, block: int) -> None:
        """Reads a block's weights."""
        self.placement.load_block(self.anatomy.names["blocks"], block)

    def free(self, block: int) -> None:
        """Gives a block's memory back."""
        self.placement.free_block(self.anatomy.names["blocks"], block)


@dataclass(frozen=True)
class SweepReport:
    """What a sweep took. ``waited`` is the part of ``loading`` that computing did not hide (all in seconds)."""

    bytes_read: int
    spilled_bytes: int
    seconds: float
    loading: float
    waited: float

    @property
    def overlap(self) -> float:
        """Share of the loading time during which blocks were computing: 1 if weights were never waited for."""
        return 1 - self.waited / self.loading if self.loading else 1.0


def open_streamed(
    name: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    *,
    trust_remote_code: bool = False,
    warnings: list[str] | None = None,
) -> StreamedModel:
    """Opens a checkpoint for block-by-block runs; reads what lies outside the blocks.

    Parameters
    ----------
    name : str or Path
        Local folder, or id on the Hugging Face hub, whose files are then fetched (or found in its cache).
    dtype : str or torch.dtype
        Weights are converted to it as they are read; ``auto``: float32 on the CPU, else as the configuration says.
    device : str
        ``cpu``, ``cuda``, ...; ``auto``: the first accelerator that torch sees.
    warnings : list of str, optional
        Gets the warnings of transformers that may concern weights.

    Raises
    ------
    ModelError
        Weights that cannot be read tensor by tensor or are quantised, or blocks that cannot be run one at a time.
    """
    device = loading.pick_device(device)
    source = sources.resolve(str(name))
    folder = sources.local_folder(source)
    if warnings is not None:
        warnings += saved_warnings(folder)
    config = loading.load_config(source, trust_remote_code, warnings)
    checkpoint = Checkpoint(folder)
    with quiet(warnings):
        chosen = _pick_dtype(dtype, config, checkpoint, device)
        model = build_empty(config, chosen, device, trust_remote_code=trust_remote_code, warnings=warnings)
        loading.use_plain_experts(model)
        candidates = block_lists(model)
        placement = Placement(model, checkpoint, candidates, chosen, device, config)
        placement.load_outside()
    ids = sample_ids(model)
    blocks_name, blocks = _running(model, candidates, ids)
    block_runner = BlockRunner(model, blocks, ids)
    with block_runner.with_last_output(_noise):
        anatomy = inspect(model)
    return StreamedModel(model, anatomy, checkpoint, placement.nbytes(blocks_name), placement, block_runner)


def sweep(
    streamed: StreamedModel,
    passes: Sequence[Pass],
    *,
    spill_bytes: int = SPILL_BYTES,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SweepReport:
    """Runs all passes through block 1, then all through block 2, and so on; every block is read once.

    At most two blocks are in memory: the one that computes, and the next one, which a thread reads meanwhile. (Where a
    family's files hold experts one by one, stacking those of one projection takes room for them once more.) Each call
    of the decoder is inside ``active()`` of its pass, and so is ``receive``. Two short passes of the sweep's own, run
    first, check that the model does not look at later tokens and gives finite numbers.

    Parameters
    ----------
    passes : sequence of Pass
        ``receive`` gets states [B, T, D] of layers 0..L in order, each pass's layer after all passes' layer before.
    spill_bytes : int
        Memory, on the model's device, for hidden states between two blocks; the rest go to a file in ``folder``.
    progress : callable (done, total), optional
        Called after every block of every pass.

    Raises
    ------
    ModelError
        The model looks at later tokens or gives NaN or infinity; weights or hidden states cannot be read or written.
    """
    ids = sample_ids(streamed.model)
    probe = _Probe(streamed.model)
    work = [*probe.passes(ids), *passes]
    n_blocks = len(streamed.anatomy.blocks)
    store = HiddenStore(spill_bytes, folder)
    start, before = time.perf_counter(), streamed.checkpoint.bytes_read
    clock = _Clock()
    try:
        with _blocks_in_turn(streamed, clock) as turns:
            for block in turns:
                for key, item in enumerate(work):
                    _advance(streamed, block, key, item, store)
                    if progress is not None and key >= PROBES:
                        progress(block * len(passes) + key + 1 - PROBES, n_blocks * len(passes))
                    if block == n_blocks - 1:
                        store.drop(key)
    finally:
        spilled = store.spilled
        store.close()
    read = streamed.checkpoint.bytes_read - before
    return SweepReport(read, spilled, time.perf_counter() - start, clock.loading, clock.waited)


def own_logits(streamed: StreamedModel, last_hidden: Tensor) -> Tensor:
    """The model's own logits [N, V] for rows [N, D] of its last layer: its norm, head, scale and soft-cap.

    The model itself is run with its blocks left out, the last of which hands on the given rows.
    """
    model, device = streamed.model, input_device(streamed.model)
    at_once = min(ROWS_AT_ONCE, loading.window(model.config) or ROWS_AT_ONCE)
    parts: list[Tensor] = []
    for rows in last_hidden.split(at_once):
        given = rows.to(device)[None]
        with torch.inference_mode(), streamed.block_runner.with_last_output(lambda hidden, given=given: given):  # type: ignore[misc]
            ids = torch.zeros(1, rows.shape[0], dtype=torch.int64, device=device)
            parts.append(compute_logits(model, ids)[0])
    return torch.cat(parts)


def _advance(streamed: StreamedModel, block: int, key: int, item: Pass, store: HiddenStore) -> None:
    """One pass through one block; what leaves it is kept for the next."""
    device = input_device(streamed.model)
    inputs = {name: value.to(device) for name, value in item.inputs.items()}
    hidden = store.get(key) if block else None
    with torch.inference_mode(), item.active():
        entered, left = streamed.block_runner.run_block(block, inputs, hidden)
        if block == 0:
            item.receive(0, entered)
        item.receive(block + 1, left)
    if left.shape != entered.shape:
        raise ModelError(
            f"block {block} of {type(streamed.model).__name__} turns {list(entered.shape)} into {list(left.shape)}"
        )
    if block + 1 < len(streamed.anatomy.blocks):
        store.put(key, left)


class _Probe:
    """Two short passes that differ in their second half: what they give must be finite, and equal in the first half."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._last: dict[int, Tensor] = {}

    def passes(self, ids: Tensor) -> list[Pass]:
        def plain(layer: int, hidden: Tensor) -> None:
            check_finite(self.model, hidden, f"at layer {layer}")
            self._last[layer] = hidden.clone()

        def changed(layer: int, hidden: Tensor) -> None:
            check_causal(self.model, self._last.pop(layer), hidden)

        return [Pass({"input_ids": ids}, plain), Pass({"input_ids": changed_sample_ids(ids)}, changed)]


@dataclass
class _Clock:
    loading: float = 0.0
    waited: float = 0.0


@contextmanager
def _blocks_in_turn(streamed: StreamedModel, clock: _Clock) -> Iterator[Iterator[int]]:
    """Iterates over blocks; the current one is in memory, the next one is on its way, all others hold no numbers."""
    count = len(streamed.anatomy.blocks)
    # copies to the device are queued behind the work of the block that they replace: on the same stream, so in order
    stream = torch.cuda.current_stream() if input_device(streamed.model).type == "cuda" else None

    def load(block: int) -> None:
        start = time.perf_counter()
        with torch.cuda.stream(stream):
            streamed.load(block)
        clock.loading += time.perf_counter() - start

    def turns(pool: ThreadPoolExecutor) -> Iterator[int]:
        coming: Future[None] = pool.submit(load, 0)
        for block in range(count):
            start = time.perf_counter()
            coming.result()
            clock.waited += time.perf_counter() - start
            if block + 1 < count:
                coming = pool.submit(load, block + 1)
            yield block
            streamed.free(block)

    with ThreadPoolExecutor(1, thread_name_prefix="xprobe-weights") as pool:
        try:
            yield turns(pool)
        finally:
            pool.shutdown(wait=True)
            for block in range(count):
                streamed.free(block)


def _running(model: Any, candidates: dict[str, nn.ModuleList], ids: Tensor) -> tuple[str, nn.ModuleList]:
    """The candidate list that a forward pass runs, all their blocks being left out."""
    ran: set[str] = set()

    def noting(name: str, form: Any) -> Any:
        def stand(at: int, args: tuple, kwargs: dict, own: Any) -> Any:
            ran.add(name)
            return form(hidden_input(args, kwargs))

        return stand

    for form in OUTPUT_FORMS:
        with ExitStack() as stack, torch.inference_mode(), suppress(Exception):  # Drive tells what is wrong
            for name, blocks in candidates.items():
                stack.enter_context(replaced_forwards(blocks, noting(name, form)))
            model(input_ids=ids, use_cache=False)
    name = single_block_list(model, ran)
    return name, candidates[name]


def _noise(hidden: Tensor) -> Tensor:
    """A state unlike any other in the model, so that what takes it next is the final norm and nothing else."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(hidden.shape, generator=generator).to(hidden.device, hidden.dtype)


def _pick_dtype(dtype: str | torch.dtype, config: Any, checkpoint: Checkpoint, device: str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return getattr(torch, dtype)
    if device == "cpu":
        return torch.float32
    stored = next((tensor.dtype for tensor in checkpoint.values() if tensor.dtype.is_floating_point), torch.float32)
    return getattr(config, "dtype", None) or stored
