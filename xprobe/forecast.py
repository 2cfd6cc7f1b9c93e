"""Forecast of a run from its configurations: groups, tokens, memory, disk and time.

No weights are read: the model is built without them. What cannot be known without them (whether this model's attention
lets prompts be packed; how fast all of it runs) is estimated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from xprobe.arguments import check_instance
from xprobe.capture.plan import Plan, Strategy, count_rows, make_plan, part_tokens, rotary_limit
from xprobe.capture.products import fast_linear_products
from xprobe.capture.requests import group_requests
from xprobe.capture.sharing import carries_state
from xprobe.config import Execution, StudyConfig, check_probes
from xprobe.errors import DataError
from xprobe.lenses.reading import ROW_BYTES
from xprobe.models import loading
from xprobe.models.anatomy import block_lists
from xprobe.models.placement import build_on_meta
from xprobe.models.streaming.streamed import SPILL_BYTES
from xprobe.qa.prompts import build_prompts
from xprobe.stages.cost import Speed, stage_seconds
from xprobe.stages.questions import read_questions
from xprobe.stages.requests import ANSWER, QUESTION, study_request

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
    """Forecast of a run. ``memory`` and ``disk`` are bytes by purpose, ``seconds`` is the time.

    ``stage_seconds`` are those of later stages; none on a GPU, where launching kernels takes time that is not counted.
    ``notes`` say what a reader must know about these numbers.
    """

    model: str
    parameters: int
    n_blocks: int
    width: int
    vocab_size: int
    dtype: str
    device: str
    strategy: Strategy
    stream: bool
    examples: int
    skipped: int
    passes: int
    tokens: int
    tokens_run: int
    memory: dict[str, int]
    disk: dict[str, int]
    seconds: float
    stage_seconds: dict[str, float]
    groups: tuple[GroupForecast, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "groups": [asdict(group) for group in self.groups]}


def forecast(
    study: StudyConfig, execution: Execution | None = None, stages: Mapping[str, Any] | None = None
) -> Forecast:
    """Plans the run of ``study`` without loading weights, and the later ``stages``: name -> settings.

    Raises
    ------
    XprobeError
        As the run itself would, for bad data, or an unknown model or probe.
    """
    execution = Execution() if execution is None else execution
    check_instance("study", study, StudyConfig)
    check_instance("execution", execution, Execution)
    check_probes(study.probes or ())
    questions = read_questions(study)
    source = loading.resolve(study.model)
    model_config = loading.load_config(source, execution.trust_remote_code)
    tokenizer = loading.load_tokenizer(source, execution.trust_remote_code)
    prompts, skipped = build_prompts(questions.examples, tokenizer, questions.template, loading.window(model_config))
    if not prompts:
        raise DataError(f"none of {len(questions.examples)} examples can be used, the first: {skipped[0]}")
    device = loading.pick_device(execution.device)
    dtype = _dtype(study, model_config, device)
    model = build_on_meta(model_config, dtype, trust_remote_code=execution.trust_remote_code)
    strategy: Strategy = "tree" if getattr(model, "_supports_attention_backend", False) else "prefix"
    shape = _Shape.from_model(model, model_config)
    if (execution.stream and strategy == "prefix") or carries_state(model, shape.blocks) is not None:
        strategy = "plain"
    groups = group_requests([study_request(prompt) for prompt in prompts])
    plan = make_plan(groups, execution.tokens_on(device), strategy, rotary_limit(model_config))
    took = _time(shape, plan, dtype, device, stream=execution.stream)
    later = stages if stages and device == "cpu" and not execution.stream else {}
    speed = Speed(
        token=took.forward / plan.tokens_run, row=took.row, forward=took.forward, reading=took.reading,
        n_blocks=shape.n_blocks, strategy=strategy, batch_tokens=plan.batch_tokens,
        max_shared_tokens=plan.max_shared_tokens,
    )  # fmt: skip
    return Forecast(
        model=source.name,
        parameters=shape.parameters,
        n_blocks=shape.n_blocks,
        width=shape.width,
        vocab_size=shape.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        strategy=strategy,
        stream=execution.stream,
        examples=len(prompts),
        skipped=len(skipped),
        passes=sum(len(plan.parts(wave)) for wave in plan.waves),
        tokens=plan.tokens,
        tokens_run=plan.tokens_run,
        memory=_memory(shape, plan, dtype, stream=execution.stream),
        disk=_disk(shape, plan, dtype, study, execution.stream),
        seconds=took.seconds,
        stage_seconds=stage_seconds(later, prompts, study.lens, study.seed, speed),
        groups=tuple(
            GroupForecast(
                group.key,
                len(group.requests),
                sum(len(request.ids) for request in group.requests),
                part_tokens(group.requests, range(len(group.requests)), strategy),
            )
            for group in groups
        ),
        notes=tuple(note for note in (questions.selection.shortfall,) if note),
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
    widest: int  # width of the widest product in a block
    blocks: tuple[torch.nn.Module, ...]

    @classmethod
    def from_model(cls, model: Any, config: Any) -> _Shape:
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
    most = plan.most_rows
    positions, examples = most[ANSWER], most[QUESTION]
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


def _disk(shape: _Shape, plan: Plan, dtype: torch.dtype, study: StudyConfig, stream: bool) -> dict[str, int]:
    layers = shape.n_blocks + 1
    rows = count_rows(request for wave in plan.waves for request in wave.requests)
    positions, examples = rows[ANSWER], rows[QUESTION]
    kept = 2 * examples * layers * shape.width * dtype.itemsize if study.store_rows else 0
    sizes = {"shards": kept + positions * layers * 20}
    if stream:
        sizes["states between blocks"] = max(0, _states(shape, plan, dtype) - SPILL_BYTES)
        sizes["rows until the end"] = layers * shape.width * dtype.itemsize * (positions + examples)
    return sizes


def _states(shape: _Shape, plan: Plan, dtype: torch.dtype) -> int:
    """Bytes of all passes' hidden states, which a run block by block keeps in memory or on disk."""
    return plan.tokens_run * shape.width * dtype.itemsize


@dataclass(frozen=True)
class _Time:
    """Seconds of all forward passes, of the lens on every answer position and layer, and of one row of it."""

    forward: float
    reading: float
    row: float
    seconds: float  # of the stage


def _time(shape: _Shape, plan: Plan, dtype: torch.dtype, device: str, *, stream: bool) -> _Time:
    positions = sum(count_rows(wave.requests)[ANSWER] for wave in plan.waves)
    lens_dtype = dtype if device != "cpu" else torch.float32
    forward = FORWARD_OVERHEAD * 2 * shape.per_token * plan.tokens_run / _rate(shape, dtype, device)
    row = LENS_OVERHEAD * 2 * shape.head / _rate(shape, lens_dtype, device)
    reading = row * positions * (shape.n_blocks + 1)
    seconds = forward + reading
    if stream:
        seconds = max(seconds, shape.parameters * dtype.itemsize / DISK_SPEED)
    return _Time(forward, reading, row, seconds)


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


def _dtype(study: StudyConfig, model_config: Any, device: str) -> torch.dtype:
    if study.dtype != "auto":
        return getattr(torch, study.dtype)
    stored = getattr(model_config, "dtype", None)
    return stored if device != "cpu" and isinstance(stored, torch.dtype) else torch.float32
