"""Runs a model larger than memory block by block: each block is read once for all passes."""

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
ROWS_AT_ONCE = 64  # rows in one forward pass of own_logits
CHECK_PASSES = 2  # passes that a sweep runs before those of the caller, to check the model


@dataclass(frozen=True, eq=False)
class StreamedModel:
    """A causal decoder whose blocks are on the meta device. All other weights are in memory.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode.
    anatomy : Anatomy
        Its blocks have no weights outside a sweep.
    checkpoint : Checkpoint
        ``checkpoint.bytes_read`` counts the bytes read so far.
    nbytes : int
        Bytes of the stored tensors that the model uses. ``open_streamed`` and one sweep read them once.
    placement : Placement
        Loads the weights.
    block_runner : BlockRunner
        Runs a block.
    """

    model: Any
    anatomy: Anatomy
    checkpoint: Checkpoint
    nbytes: int
    placement: Placement
    block_runner: BlockRunner

    def load(self, block: int) -> None:
        """Reads the weights of a block."""
        self.placement.load_block(self.anatomy.names["blocks"], block)

    def free(self, block: int) -> None:
        """Frees the memory of a block."""
        self.placement.free_block(self.anatomy.names["blocks"], block)


@dataclass(frozen=True)
class SweepReport:
    """Bytes and seconds of a sweep.

    Attributes
    ----------
    bytes_read : int
        Bytes read from the checkpoint.
    spilled_bytes : int
        Bytes of the hidden states in the temporary file.
    seconds : float
        Time of the sweep.
    loading : float
        Seconds in which weights were read.
    waited : float
        Seconds of ``loading`` in which no block computed.

    Examples
    --------
    >>> SweepReport(bytes_read=100, spilled_bytes=0, seconds=3.0, loading=2.0, waited=0.5).overlap
    0.75
    """

    bytes_read: int
    spilled_bytes: int
    seconds: float
    loading: float
    waited: float

    @property
    def overlap(self) -> float:
        """Share of the loading time in which a block computed: 1 if no block waited for its weights."""
        return 1 - self.waited / self.loading if self.loading else 1.0


def open_streamed(
    name: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    *,
    trust_remote_code: bool = False,
    warnings: list[str] | None = None,
) -> StreamedModel:
    """Opens a checkpoint for block-by-block runs and reads the weights outside the blocks.

    Parameters
    ----------
    name : str or Path
        Local folder, GGUF file, alias, or id on the Hugging Face hub.
    dtype : str or torch.dtype
        Weights are converted to it when they are read. ``auto`` is float32 on the CPU, and the dtype of the
        configuration on other devices.
    device : str
        ``cpu``, ``cuda``, ... ``auto`` is a CUDA GPU if torch has one, else the CPU.
    trust_remote_code : bool
        Whether the model may run code of its own.
    warnings : list of str, optional
        The function appends the warnings of transformers that may concern weights.

    Returns
    -------
    StreamedModel

    Raises
    ------
    ModelError
        The weights are not in safetensors format or are quantised, or the blocks cannot run one at a time.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes)).save_pretrained(folder)
    ...     streamed = open_streamed(folder, device="cpu")
    >>> streamed.anatomy.n_layers, streamed.anatomy.blocks[0].mlp.up_proj.weight.device
    (3, device(type='meta'))
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
    blocks_name, blocks = _block_list_that_runs(model, candidates, ids)
    block_runner = BlockRunner(model, blocks, ids)
    with block_runner.with_last_output(_random_state):
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
    """Runs all passes through block 1, then all passes through block 2, and so on. Each block is read once.

    At most two blocks are in memory: one that computes, and the next one, which a thread reads. (If the files store
    experts separately, stacking the experts of one projection needs memory for a second copy of them.) Every call of
    the decoder and of ``receive`` is inside the context ``active()`` of its pass. The sweep first runs two short passes
    of its own. They check that the model does not look at later tokens and gives finite values.

    Parameters
    ----------
    streamed : StreamedModel
    passes : sequence of Pass
        ``receive`` gets the states [B, T, D] of layers 0..L in order. All passes get layer l before any gets layer l+1.
    spill_bytes : int
        Bytes of the device's memory for hidden states between two blocks. The rest is in a temporary file.
    folder : Path, optional
        Folder of that file; the system's temporary folder if None.
    progress : callable (done, total), optional
        Called after every block of every pass.

    Returns
    -------
    SweepReport

    Raises
    ------
    ModelError
        The model looks at later tokens or gives NaN or infinity, or weights or hidden states cannot be read or written.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> layers = []
    >>> item = Pass({"input_ids": torch.tensor([[5, 6, 7]])}, lambda layer, hidden: layers.append(layer))
    >>> with tempfile.TemporaryDirectory() as path:
    ...     AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes)).save_pretrained(path)
    ...     streamed = open_streamed(path, device="cpu")
    ...     report = sweep(streamed, [item])
    >>> layers
    [0, 1, 2]
    >>> streamed.checkpoint.bytes_read == streamed.nbytes
    True
    """
    ids = sample_ids(streamed.model)
    work = [*_Checks(streamed.model).passes(ids), *passes]
    n_blocks = len(streamed.anatomy.blocks)
    store = HiddenStore(spill_bytes, folder)
    start, before = time.perf_counter(), streamed.checkpoint.bytes_read
    clock = _Clock()
    try:
        with _blocks_in_turn(streamed, clock) as turns:
            for block in turns:
                for key, item in enumerate(work):
                    _advance(streamed, block, key, item, store)
                    if progress is not None and key >= CHECK_PASSES:
                        progress(block * len(passes) + key + 1 - CHECK_PASSES, n_blocks * len(passes))
                    if block == n_blocks - 1:
                        store.drop(key)
    finally:
        spilled = store.spilled
        store.close()
    read = streamed.checkpoint.bytes_read - before
    return SweepReport(read, spilled, time.perf_counter() - start, clock.loading, clock.waited)


def own_logits(streamed: StreamedModel, last_hidden: Tensor) -> Tensor:
    """The model's own logits for rows of its last layer.

    The model runs its own norm, head, scale and soft-cap. Its blocks are skipped, and the last block returns the rows.

    Parameters
    ----------
    last_hidden : Tensor [N, D]

    Returns
    -------
    Tensor [N, V]
    """
    model, device = streamed.model, input_device(streamed.model)
    at_once = min(ROWS_AT_ONCE, loading.window(model.config) or ROWS_AT_ONCE)
    parts: list[Tensor] = []
    for rows in last_hidden.split(at_once):
        state = rows.to(device)[None]
        with torch.inference_mode(), streamed.block_runner.with_last_output(lambda hidden, state=state: state):  # type: ignore[misc]
            ids = torch.zeros(1, rows.shape[0], dtype=torch.int64, device=device)
            parts.append(compute_logits(model, ids)[0])
    return torch.cat(parts)


def _advance(streamed: StreamedModel, block: int, key: int, item: Pass, store: HiddenStore) -> None:
    """Runs one pass through one block and stores the output for the next block."""
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


class _Checks:
    """Two short passes that differ in their second half. Their states must be finite, and equal in the first half."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._last: dict[int, Tensor] = {}

    def passes(self, ids: Tensor) -> list[Pass]:
        def check_first(layer: int, hidden: Tensor) -> None:
            check_finite(self.model, hidden, f"at layer {layer}")
            self._last[layer] = hidden.clone()

        def check_second(layer: int, hidden: Tensor) -> None:
            check_causal(self.model, self._last.pop(layer), hidden)

        return [Pass({"input_ids": ids}, check_first), Pass({"input_ids": changed_sample_ids(ids)}, check_second)]


@dataclass
class _Clock:
    loading: float = 0.0
    waited: float = 0.0


@contextmanager
def _blocks_in_turn(streamed: StreamedModel, clock: _Clock) -> Iterator[Iterator[int]]:
    """Iterates over the blocks. The current block is in memory, and a thread reads the next one.

    All other blocks are on the meta device. On exit all blocks are.
    """
    count = len(streamed.anatomy.blocks)
    # the copies to the GPU use the stream of the computation, so they wait until the block that they replace is done
    stream = torch.cuda.current_stream() if input_device(streamed.model).type == "cuda" else None

    def load(block: int) -> None:
        start = time.perf_counter()
        with torch.cuda.stream(stream):
            streamed.load(block)
        clock.loading += time.perf_counter() - start

    def turns(pool: ThreadPoolExecutor) -> Iterator[int]:
        next_load: Future[None] = pool.submit(load, 0)
        for block in range(count):
            start = time.perf_counter()
            next_load.result()
            clock.waited += time.perf_counter() - start
            if block + 1 < count:
                next_load = pool.submit(load, block + 1)
            yield block
            streamed.free(block)

    with ThreadPoolExecutor(1, thread_name_prefix="xprobe-weights") as pool:
        try:
            yield turns(pool)
        finally:
            pool.shutdown(wait=True)
            for block in range(count):
                streamed.free(block)


def _block_list_that_runs(model: Any, candidates: dict[str, nn.ModuleList], ids: Tensor) -> tuple[str, nn.ModuleList]:
    """The candidate list that a forward pass calls. All blocks are skipped."""
    ran: set[str] = set()

    def recorder(name: str, form: Any) -> Any:
        def record(index: int, args: tuple, kwargs: dict, forward: Any) -> Any:
            ran.add(name)
            return form(hidden_input(args, kwargs))

        return record

    for form in OUTPUT_FORMS:
        with ExitStack() as stack, torch.inference_mode(), suppress(Exception):  # BlockRunner raises the error
            for name, blocks in candidates.items():
                stack.enter_context(replaced_forwards(blocks, recorder(name, form)))
            model(input_ids=ids, use_cache=False)
    name = single_block_list(model, ran)
    return name, candidates[name]


def _random_state(hidden: Tensor) -> Tensor:
    """A random state. It equals no other state of the model, so only the final norm's input can match it."""
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
