"""The capture engine: forward passes over waves of prompts that leave chosen rows of every layer in one buffer."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from xprobe_kernels import attention
from xprobe_kernels.transfer import upload

from xprobe.capture.memory import is_out_of_memory, release_memory
from xprobe.capture.plan import (
    WAYS,
    Group,
    Plan,
    Wave,
    Way,
    fed_length,
    make_plan,
    part_tokens,
    prefix_length,
    rotary_limit,
    split,
)
from xprobe.capture.prefix import shared_cache
from xprobe.capture.products import fast_products
from xprobe.capture.rows import Captured, Receiver, RowSpace
from xprobe.capture.sharing import CarriesState, Isolation, NotIsolated, carries_state, disagreement
from xprobe.capture.tree import grow
from xprobe.capture.tree_attention import Layout, packed_attention
from xprobe.models import tensor_parallel
from xprobe.models.anatomy import Anatomy, input_device, watch_states
from xprobe.models.block_io import own_code
from xprobe.models.parity import check_parity
from xprobe.models.passes import Pass, pad
from xprobe.qa.prompts import Prompt

# Packed sequences end at a multiple of it
MULTIPLE = 64

Notify = Callable[[str], None]


class Engine:
    """Runs a decoder over prompts and keeps the rows that the lens and the probes need.

    Parameters
    ----------
    model, anatomy
        The decoder, and where its blocks are.
    batch_tokens : int
        Most tokens in one forward pass. Halved when memory runs out; what fits is remembered in ``batch_tokens``.
    notify : callable (message), optional
        Told of a fallback or a smaller batch; ``remarks`` lists what was told.
    """

    def __init__(self, model: Any, anatomy: Anatomy, batch_tokens: int, notify: Notify | None = None) -> None:
        self.model, self.anatomy, self.batch_tokens = model, anatomy, batch_tokens
        self._notify = notify or (lambda message: None)
        self.way: Way = "tree"
        self.kernel = attention.available(input_device(model))  # whether packed trees may use the attention kernel
        self.alone_beyond = rotary_limit(model.config)
        self.remarks: list[str] = []
        self.parity_error: float | None = None
        self._together = 0  # most prompts in one pass of the last capture
        self.space = RowSpace(anatomy.n_layers, anatomy.head.width, model.dtype, anatomy.head.weight.device)

    def plan(self, groups: Sequence[Group]) -> Plan:
        """How ``groups`` are run by this engine."""
        return make_plan(groups, self.batch_tokens, self.way, self.alone_beyond)

    def warn(self, message: str) -> None:
        """Keeps a warning in ``remarks`` and hands it to ``notify``."""
        self.remarks.append(message)
        self._notify(message)

    def check(self, prompts: list[Prompt], backend: str = "auto") -> float:
        """Parity of the lens on a few prompts (``check_parity``), kept in ``parity_error``."""
        tensor_parallel.tell("check", prompts, backend)
        self.parity_error = check_parity(self.model, self.anatomy, prompts, backend)
        return self.parity_error

    def settle(self, sample: Sequence[Prompt]) -> Way:
        """Finds the way of sharing that gives this model the rows of its own plain runs, and keeps to it.

        Told from numbers: ``sample`` (a few prompts with a common beginning) is run one by one, then each way.
        """
        prompts = list(sample)
        tensor_parallel.tell("settle", prompts)
        whole = max(self.batch_tokens, sum(fed_length(prompt) for prompt in prompts))
        wanted = self._capture(prompts, "plain", 1).copy()
        noise = self._capture(prompts, "plain", len(prompts) * max(map(fed_length, prompts))).copy()
        stateful = carries_state(self.model, self.anatomy.blocks)
        if stateful is not None:
            self.warn(f"{type(self.model).__name__} cannot share beginnings: {stateful}")
            return self._without_sharing(wanted, noise)
        kernel = self.kernel
        for way, self.kernel in _ways(kernel):
            try:
                if way == "tree":
                    for one in Isolation(self.model, self.anatomy.blocks, self.kernel).passes:
                        run_pass(self.model, self.anatomy, one)
                # in one pass, whatever the budget: prompts that run alone say nothing of sharing
                reason = self._disagreement(self._capture(prompts, way, whole), wanted, noise)
                if reason is None and self._together < min(2, len(prompts)):
                    reason = "no two prompts of the check could be run together"
            except CarriesState as found:
                self.warn(f"{type(self.model).__name__} cannot share beginnings: {found}")
                return self._without_sharing(wanted, noise)
            except NotIsolated as found:
                reason = str(found)
            except Exception as error:  # a model's own code may raise anything when it is fed what it does not know
                if is_out_of_memory(error):
                    raise
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            if reason is None:
                self.way = way
                return way
            by = ", and the attention kernel" if self.kernel else ""
            self.warn(f"{type(self.model).__name__} cannot be run with {WAYS[way]}{by} ({reason})")
        return self._without_sharing(wanted, noise)

    def _without_sharing(self, wanted: Captured, together: Captured) -> Way:
        """Plain batches; one prompt at a time if even these change the rows."""
        self.way = "plain"
        if (reason := self._disagreement(together, wanted, None)) is None:
            self.warn(f"it is run with {WAYS['plain']}")
        else:
            self.batch_tokens = 1
            self.warn(f"it is run one prompt at a time: its rows depend on the batch ({reason})")
        return self.way

    def _disagreement(self, found: Captured, wanted: Captured, noise: Captured | None) -> str | None:
        """In words, how far rows are from those they should equal; None if only by rounding."""
        layers = range(self.anatomy.n_layers)
        return next((r for k in layers if (r := disagreement(found, wanted, noise, self.anatomy.head, k))), None)

    def waves(self, plan: Plan, wanted: Container[str], backend: str = "auto") -> Iterator[tuple[Wave, Captured]]:
        """Every wave of ``plan`` that holds a group of ``wanted``, and its rows, valid until the next is asked for."""
        self.space.reserve(*plan.largest_wave)
        for wave in plan.waves:
            if any(group.key in wanted for group in wave.groups):
                yield wave, self.capture(wave.prompts)

    def capture(self, prompts: Sequence[Prompt]) -> Captured:
        """Rows of ``prompts``, valid until the next call.

        Raises
        ------
        RuntimeError, MemoryError
            Memory runs out even for one prompt at a time, or the model fails.
        """
        tensor_parallel.tell("capture", prompts)
        return self._capture(prompts, self.way, self.batch_tokens)

    def _capture(self, prompts: Sequence[Prompt], way: Way, budget: int) -> Captured:
        captured = self.space.take(prompts)
        self._together = 0
        waiting = split(prompts, range(len(prompts)), budget, way, self.alone_beyond)
        while waiting:
            try:
                self._run(prompts, waiting[0], captured, way)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or len(waiting[0]) == 1 or tensor_parallel.size() > 1:
                    raise  # among several processes the others are in the middle of this pass
            else:
                self._together = max(self._together, len(waiting.pop(0)))
                continue
            # outside of the handler: the error's traceback holds the tensors of the pass that failed
            release_memory()
            self.batch_tokens = max(1, min(self.batch_tokens, part_tokens(prompts, waiting[0], way)) // 2)
            self.warn(f"memory ran out: going on with at most {self.batch_tokens} tokens in a forward pass")
            left = [i for part in waiting for i in part]
            waiting = split(prompts, left, self.batch_tokens, way, self.alone_beyond)
        return captured

    def _run(self, prompts: Sequence[Prompt], part: Sequence[int], into: Captured, way: Way) -> None:
        with torch.inference_mode(), fast_products(self.model), own_code(self.model):
            if self.alone_beyond is not None and fed_length(prompts[part[0]]) > self.alone_beyond:
                # dynamic NTK keeps the angles of the longest prompt until a short one comes
                self.model.base_model(
                    input_ids=pad([prompts[part[0]].ids[:1]], input_device(self.model)), use_cache=False
                )
            if way == "prefix":
                self._run_on_prefix(prompts, part, into)
            else:
                run_pass(self.model, self.anatomy, make_pass(self.model, prompts, part, into, way, self.kernel))

    def _run_on_prefix(self, prompts: Sequence[Prompt], part: Sequence[int], into: Captured) -> None:
        shared = prefix_length([prompts[i] for i in part])
        if shared == 0:
            run_pass(self.model, self.anatomy, make_pass(self.model, prompts, part, into, "plain"))
            return
        cache = shared_cache(self.model, list(prompts[part[0]].ids[:shared]))
        ids = pad([prompts[i].ids[shared:-1] for i in part], input_device(self.model))
        receiver = Receiver(prompts, part, lambda place, start, stop: [(place, start - shared, stop - shared)], into)
        with watch_states(self.anatomy.blocks, receiver):
            self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)


def _ways(kernel: bool) -> list[tuple[Way, bool]]:
    """Ways of sharing to try, the fastest first, and whether by the attention kernel."""
    ways: list[tuple[Way, bool]] = [("tree", True), ("tree", False), ("prefix", False)]
    return ways if kernel else ways[1:]


def make_pass(
    model: Any, prompts: Sequence[Prompt], part: Sequence[int], into: Captured, way: Way, kernel: bool = False
) -> Pass:
    """The forward pass over ``part`` of ``prompts``, ``tree`` or ``plain``, that leaves its rows in ``into``.

    ``kernel``: packed trees may use the attention kernel.
    """
    device = input_device(model)
    if way == "plain":
        ids = pad([prompts[i].ids[:-1] for i in part], device)
        return Pass({"input_ids": ids}, Receiver(prompts, part, lambda i, start, stop: [(i, start, stop)], into))
    tree = grow([prompts[i].ids[:-1] for i in part]).filled(MULTIPLE)
    layout = Layout(tree, device, kernel)
    receiver = Receiver(
        prompts, part, lambda i, start, stop: [(0, *piece) for piece in tree.pieces(i, start, stop)], into
    )
    inputs = {"input_ids": upload(torch.tensor([tree.ids]), device), "position_ids": layout.positions[None]}
    return Pass(inputs, receiver, partial(packed_attention, model, layout))


def run_pass(model: Any, anatomy: Anatomy, one: Pass) -> None:
    """One forward pass of the decoder without its head."""
    with torch.inference_mode(), watch_states(anatomy.blocks, one.receive), one.active():
        model.base_model(**one.inputs, use_cache=False)
