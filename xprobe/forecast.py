"""What a run would do, before it does it: groups, tokens, memory, disk and time, from the configuration alone.

No weights are read: the model is built without them. What cannot be known without them (whether this model's attention
lets prompts be packed; how fast the whole of it runs) is estimated and said to be so.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from xprobe.capture.plan import Plan, Way, group_prompts, make_plan, part_tokens, rotary_limit
from xprobe.capture.products import fast_linear_products
from xprobe.capture.sharing import carries_state
from xprobe.config import StudyConfig
from xprobe.errors import DataError
from xprobe.lenses.reading import ROW_BYTES
from xprobe.models import loading
from xprobe.models.anatomy import block_lists
from xprobe.models.placement import without_weights
from xprobe.models.streaming.streamed import SPILL_BYTES
from xprobe.qa.prompts import build_prompts
from xprobe.study import read_questions

# how much longer things take than their matrix products alone, as measured on a CPU with a small model
FORWARD_OVERHEAD, LENS_OVERHEAD = 2.0, 1.2
WORKSPACE = 256 << 20  # bytes the lens may use besides its rows
DISK_SPEED = 1e9  # bytes per second, of a checkpoint that is read block by block


@dataclass(frozen=True)
class GroupForecast:
    """One context group: its key, examples, tokens of all its prompts, and tokens that are run over."""

    key: str
    examples: int
    tokens: int
    tokens_run: int


@dataclass(frozen=True)
class Forecast:
    """Of a run. Memory and disk in bytes, time in seconds; ``memory`` and ``disk`` are by what takes them."""

    model: str
    parameters: int
    n_blocks: int
    width: int
    vocab_size: int
    dtype: str
    device: str
    way: Way
    stream: bool
    examples: int
    skipped: int
    passes: int
    tokens: int
    tokens_run: int
    memory: dict[str, int]
    disk: dict[str, int]
    seconds: float
    groups: tuple[GroupForecast, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "groups": [asdict(group) for group in self.groups]}


def forecast(config: StudyConfig) -> Forecast:
    """Plans the run of ``config`` without loading weights.

    Raises
    ------
    XprobeError
        As the run itself would, for bad data or an unknown model.
    """
    template, _, examples, _ = read_questions(config)
    source = loading.resolve(config.model)
    model_config = loading.load_config(source, config.trust_remote_code)
    tokenizer = loading.load_tokenizer(source, config)
    prompts, skipped = build_prompts(examples, tokenizer, template, loading.window(model_config))
    if not prompts:
        raise DataError(f"none of {len(examples)} examples can be used, the first: {skipped[0]}")
    device = loading.pick_device(config.device)
    dtype = _dtype(config, model_config, device)
    model = without_weights(model_config, dtype, trust_remote_code=config.trust_remote_code)
    way: Way = "tree" if getattr(model, "_supports_attention_backend", False) else "prefix"
    shape = _Shape.of(model, model_config)
    if (config.stream and way == "prefix") or carries_state(model, shape.blocks) is not None:
        way = "plain"
    groups = group_prompts(prompts)
    plan = make_plan(groups, config.batch_tokens, way, rotary_limit(model_config))
    return Forecast(
        model=source.name,
        parameters=shape.parameters,
        n_blocks=shape.n_blocks,
        width=shape.width,
        vocab_size=shape.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        way=way,
        stream=config.stream,
        examples=len(prompts),
        skipped=len(skipped),
        passes=sum(len(plan.parts(wave)) for wave in plan.waves),
        tokens=plan.tokens,
        tokens_run=plan.tokens_run,
        memory=_memory(shape, plan, dtype, stream=config.stream),
        disk=_disk(shape, plan, dtype, config),
        seconds=_seconds(shape, plan, dtype, device, stream=config.stream),
        groups=tuple(
            GroupForecast(
                group.key,
                len(group.prompts),
                sum(len(prompt.ids) - 1 for prompt in group.prompts),
                part_tokens(group.prompts, range(len(group.prompts)), way),
            )
            for group in groups
        ),
    )


@dataclass(frozen=True)
class _Shape:
    parameters: int
    per_token: int  # parameters of the blocks that a token meets: of experts, those it is sent to
    largest_block: int
    head: int  # parameters of the output embedding
    outside: int  # parameters outside the blocks
    n_blocks: int
    width: int
    vocab_size: int
    widest: int  # of a product's result within a block
    blocks: tuple[torch.nn.Module, ...]

    @classmethod
    def of(cls, model: Any, config: Any) -> _Shape:
        text = config.get_text_config(decoder=True)
        blocks = list(block_lists(model).values())
        inside = list(blocks[0]) if blocks else []
        sizes = [sum(p.numel() for p in block.parameters()) for block in inside]
        total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
        used = sum(p.numel() * _share(p, text) for block in inside for p in block.parameters() if p.ndim > 1)
        head = model.get_output_embeddings().weight
        return cls(
            parameters=total,
            per_token=int(used),
            largest_block=max(sizes, default=0),
            head=head.numel(),
            outside=total - sum(sizes),
            n_blocks=len(inside) or getattr(text, "num_hidden_layers", 0),
            width=head.shape[1],
            vocab_size=head.shape[0],
            widest=max((max(p.shape[-2:]) for block in inside for p in block.parameters() if p.ndim > 1), default=0),
            blocks=tuple(inside),
        )


def _share(parameter: torch.Tensor, config: Any) -> float:
    """Part of a parameter that one token meets: stacked experts are used a few at a time."""
    chosen = getattr(config, "num_experts_per_tok", None)
    return min(1.0, chosen / parameter.shape[0]) if chosen and parameter.ndim == 3 else 1.0


def _memory(shape: _Shape, plan: Plan, dtype: torch.dtype, *, stream: bool) -> dict[str, int]:
    size = dtype.itemsize
    layers = shape.n_blocks + 1
    positions, examples = plan.largest_wave
    tokens = min(plan.batch_tokens, plan.tokens_run)
    weights = (shape.outside + 2 * shape.largest_block) if stream else shape.parameters
    row = layers * shape.width
    states = {"states between blocks": min(SPILL_BYTES, _states(shape, plan, dtype))} if stream else {}
    return {
        "weights": weights * size,
        **states,
        "rows": 0 if stream else row * (positions + examples) * size,
        "forward pass": tokens * (8 * shape.width * size + 3 * shape.widest * size + 2 * shape.width * 4),
        "lens": min(ROW_BYTES, row * positions * 4) + WORKSPACE // 4,
    }


def _disk(shape: _Shape, plan: Plan, dtype: torch.dtype, config: StudyConfig) -> dict[str, int]:
    layers = shape.n_blocks + 1
    prompts = [prompt for wave in plan.waves for prompt in wave.prompts]
    positions = sum(len(prompt.targets) for prompt in prompts)
    kept = 2 * len(prompts) * layers * shape.width * dtype.itemsize if config.store_rows else 0
    found = {"shards": kept + positions * layers * 20}
    if config.stream:
        found["states between blocks"] = max(0, _states(shape, plan, dtype) - SPILL_BYTES)
        found["rows until the end"] = layers * shape.width * dtype.itemsize * (positions + len(prompts))
    return found


def _states(shape: _Shape, plan: Plan, dtype: torch.dtype) -> int:
    """Bytes of all passes' hidden states, which a run block by block keeps in memory or on disk."""
    return plan.tokens_run * shape.width * dtype.itemsize


def _seconds(shape: _Shape, plan: Plan, dtype: torch.dtype, device: str, *, stream: bool) -> float:
    positions = sum(len(prompt.targets) for wave in plan.waves for prompt in wave.prompts)
    forward = 2 * shape.per_token * plan.tokens_run
    lens = 2 * shape.head * positions * (shape.n_blocks + 1)
    lens_dtype = dtype if device != "cpu" else torch.float32
    seconds = FORWARD_OVERHEAD * forward / _rate(shape, dtype, device)
    seconds += LENS_OVERHEAD * lens / _rate(shape, lens_dtype, device)
    return max(seconds, shape.parameters * dtype.itemsize / DISK_SPEED) if stream else seconds


def _rate(shape: _Shape, dtype: torch.dtype, device: str) -> float:
    """Operations per second of a product of the model's width on this device, measured."""
    width, out = shape.width, min(4 * shape.width, 16384)
    rows = torch.ones(1024, width, dtype=dtype, device=device)
    weight = torch.ones(out, width, dtype=dtype, device=device)

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    best = float("inf")
    with torch.inference_mode(), fast_linear_products(device, dtype):
        for _ in range(4):
            start = time.perf_counter()
            F.linear(rows, weight)
            wait()
            best = min(best, time.perf_counter() - start)
    return 2 * 1024 * width * out / best


def _dtype(config: StudyConfig, model_config: Any, device: str) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    stored = getattr(model_config, "dtype", None)
    return stored if device != "cpu" and isinstance(stored, torch.dtype) else torch.float32
