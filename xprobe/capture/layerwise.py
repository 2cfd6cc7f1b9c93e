"""Capture for models larger than memory: all forward passes go through one block before the next block is read.

A file in the run folder keeps the rows until the last block has run: the divergence from the final layer needs the
final layer. Then the file is read group by group. An interrupted run starts its sweep again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xprobe_kernels import attention

from xprobe.capture.generation import Generated
from xprobe.capture.memory import is_out_of_memory
from xprobe.capture.passes import make_pass
from xprobe.capture.plan import STRATEGIES, Plan, Strategy, Wave, make_plan, rotary_limit, split
from xprobe.capture.products import fast_products
from xprobe.capture.requests import Group, Request, check_groups, check_requests, check_sample
from xprobe.capture.rows import RowBuffers, Rows
from xprobe.capture.runner import RunnerReport, Warnings, check_batch_tokens
from xprobe.capture.sharing import Isolation, NotIsolated, carries_state, disagreement, short_sample
from xprobe.capture.tree_attention import NotShareable
from xprobe.config import ROWS_FILE
from xprobe.errors import RunFolderError, UsageError
from xprobe.models.anatomy import input_device
from xprobe.models.parity import TeacherForced, check_prompts, compare_with_model, rounding_warning, shorten
from xprobe.models.passes import Pass, pad
from xprobe.models.streaming.streamed import StreamedModel, own_logits, sweep
from xprobe.models.token_limits import TokenLimits


class LayerwiseEngine:
    """Runs a model that is larger than memory, block by block. A ``Runner`` (``xprobe.capture.runner``).

    ``run`` makes one sweep over the blocks. It serves the parity check, the check of the strategy and all requests.
    Nothing is computed before.

    Parameters
    ----------
    streamed : StreamedModel
    batch_tokens : int
        Most tokens in one forward pass.
    folder : path
        Where rows and spilled hidden states are kept during the run.
    notify : callable (message), optional
        Called with each warning.
    progress : callable (done, total), optional
        Called after every block of every pass.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        batch_tokens: int,
        folder: Path,
        notify: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.streamed, self.folder = streamed, folder
        self.batch_tokens = check_batch_tokens(batch_tokens)
        self.limits = TokenLimits.from_model(streamed.model, streamed.anatomy)
        self.model, self.anatomy = streamed.model, streamed.anatomy
        self.warn = Warnings(notify)
        self.progress = progress
        self.max_shared_tokens = rotary_limit(streamed.model.config)
        self.strategy: Strategy = "tree"
        self.kernel = attention.available(input_device(streamed.model))
        self.parity_error: float | None = None
        self.bytes_read = 0
        self._sample: list[Request] = []
        self._parity_prompts: list[TeacherForced] = []
        self._backend = "auto"

    def report(self) -> RunnerReport:
        """How the engine has run the requests so far."""
        kernel = self.kernel and self.strategy == "tree"
        return RunnerReport(self.strategy, self.batch_tokens, kernel, self.parity_error, tuple(self.warn.messages))

    def plan(self, groups: Sequence[Group]) -> Plan:
        """How this engine would run ``groups``.

        Raises
        ------
        UsageError
            A request cannot be run (``check_requests``).
        """
        check_groups(groups, self.limits)
        return make_plan(groups, self.batch_tokens, self.strategy, self.max_shared_tokens)

    def check_parity(self, prompts: Sequence[TeacherForced], backend: str = "auto") -> None:
        """Keeps ``prompts`` for ``run``: the check needs rows of the last layer, and only a sweep gives them."""
        check_prompts(prompts, self.limits)
        self._parity_prompts, self._backend = [shorten(prompt) for prompt in prompts], backend

    def choose_strategy(self, sample: Sequence[Request]) -> None:
        """Keeps a short form of ``sample`` (``short_sample``) for ``run``: the sweep runs it alone and packed.

        Where the two differ, the sweep starts again with plain batches. No block is read for the check alone.

        Raises
        ------
        UsageError
            The sample is empty, or a request in it cannot be run (``check_requests``).
        """
        check_sample(sample, self.limits)
        self._sample = short_sample(sample, self.model.config, self.max_shared_tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], stop: Collection[int]
    ) -> list[Generated]:
        """Refuses: every new token would read the whole model from the disk again.

        Raises
        ------
        UsageError
            Always.
        """
        raise UsageError(
            "a streamed model cannot generate answers: each new token would read the whole model from the disk again. "
            "Use a machine that holds the model in memory (stream=False, --no-stream)"
        )

    def log_probabilities(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Callable[[int], None] | None = None
    ) -> list[float]:
        """Refuses: every call would read the whole model from the disk again.

        Raises
        ------
        UsageError
            Always.
        """
        raise UsageError(
            "a streamed model cannot be asked again and again: each call would read the whole model from the disk. Use "
            "a machine that holds the model in memory (stream=False, --no-stream)"
        )

    def run(self, plan: Plan, wanted: Container[str]) -> Iterator[tuple[Wave, Rows]]:
        """Makes one sweep, then yields every wave of ``plan`` that holds a group of ``wanted``, with its rows.

        Raises
        ------
        UsageError
            A request cannot be run (``check_requests``).
        ModelError, ParityError, RunFolderError
            The model cannot be run like this, the lens does not fit it, or there is no room for the rows.
        """
        waves = [wave for wave in plan.waves if any(group.key in wanted for group in wave.groups)]
        requests = [request for wave in waves for request in wave.requests]
        check_requests(requests, self.limits)
        if not requests and not self._parity_prompts:
            return
        space = _MappedBuffers(self.anatomy.n_layers, self.anatomy.head.width, self.model.dtype, self.folder)
        rows = space.rows_for(requests)
        last_rows = _LastRows(self.model, self.anatomy.n_layers - 1, self._parity_prompts)
        before = self.streamed.checkpoint.bytes_read
        name = type(self.model).__name__
        with fast_products(self.model):
            try:
                self._sweep(waves, requests, rows, [*self._checks(), *last_rows.passes])
            except NotShareable as reason:
                self.warn(f"{name} cannot be run with {STRATEGIES[self.strategy]} ({reason})")
                self.strategy = "plain"
                try:
                    self._sweep(waves, requests, rows, [*self._checks(), *last_rows.passes])
                    self.warn(f"it is run with {STRATEGIES['plain']}")
                except NotShareable as second_reason:
                    self.batch_tokens = 1
                    self.warn(f"it is run one prompt at a time: its rows depend on the batch ({second_reason})")
                    self._sweep(waves, requests, rows, last_rows.passes)
        self.bytes_read += self.streamed.checkpoint.bytes_read - before
        if self._parity_prompts:
            self._compare_with_model(last_rows)
        start = 0
        for wave in waves:
            stop = start + len(wave.requests)
            yield wave, rows.part(start, stop)
            start = stop

    def _compare_with_model(self, last_rows: _LastRows) -> None:
        device = self.anatomy.head.weight.device
        last = torch.cat(last_rows.rows).to(device)
        targets = torch.tensor([token for prompt in self._parity_prompts for token in prompt.targets])
        logits = own_logits(self.streamed, last)
        self.parity_error = compare_with_model(self.model, last, logits, self.anatomy.head, targets, self._backend)
        if warning := rounding_warning(self.parity_error):
            self.warn(warning)

    def _sweep(self, waves: Sequence[Wave], requests: Sequence[Request], rows: Rows, checks: Sequence[Pass]) -> None:
        passes = list(checks)
        parts: list[list[int]] = []
        start = 0
        for wave in waves:
            members = range(start, start + len(wave.requests))
            start = members.stop
            parts += split(requests, members, self.batch_tokens, self.strategy, self.max_shared_tokens)
        if self.max_shared_tokens is not None:  # in the order that ``split`` gives the parts of one wave
            limit = self.max_shared_tokens
            parts.sort(key=lambda part: max(0, max(len(requests[i].ids) for i in part) - limit))
        passes += [make_pass(self.model, requests, part, rows, self.strategy, self.kernel) for part in parts]
        sweep(self.streamed, passes, folder=self.folder, progress=self.progress)

    def _checks(self) -> list[Pass]:
        """Passes that run the sample one by one, then together. The first layer that differs raises NotShareable."""
        if not self._sample:
            return []
        sample = self._sample
        shape = (self.anatomy.n_layers, self.anatomy.head.width, self.model.dtype, input_device(self.model))
        wanted, noise, shared = (RowBuffers(*shape).rows_for(sample) for _ in range(3))
        indices = range(len(sample))
        passes = [make_pass(self.model, sample, [i], wanted, "plain") for i in indices]
        batch = make_pass(self.model, sample, indices, noise, "plain")
        if self.strategy == "plain":

            def compare(layer: int, hidden: Tensor) -> None:
                batch.receive(layer, hidden)
                if reason := disagreement(noise, wanted, None, self.anatomy.head, layer):
                    raise NotShareable(reason)

            return [*passes, Pass(batch.inputs, compare, batch.active)]
        stateful = carries_state(self.model, self.anatomy.blocks)
        if stateful is not None:
            raise NotShareable(stateful)
        packed = make_pass(self.model, sample, indices, shared, self.strategy, self.kernel)

        def receive(layer: int, hidden: Tensor) -> None:
            packed.receive(layer, hidden)
            if reason := disagreement(shared, wanted, lambda: noise, self.anatomy.head, layer):
                raise NotShareable(reason)

        isolation = Isolation(self.model, self.anatomy.blocks, self.kernel)
        isolation_passes = [self._guarded(item, item.receive) for item in isolation.passes]
        return [*isolation_passes, *passes, batch, self._guarded(packed, receive)]

    @staticmethod
    def _guarded(forward_pass: Pass, receive: Callable[[int, Tensor], None]) -> Pass:
        """A pass of the check. Any failure in it becomes NotShareable: the model cannot be run like this."""

        @contextmanager
        def active() -> Iterator[None]:
            try:
                with forward_pass.active():
                    yield
            except NotShareable:
                raise
            except NotIsolated as error:
                raise NotShareable(str(error)) from error
            except Exception as error:  # a model's own code may raise anything on inputs that it does not expect
                if is_out_of_memory(error):
                    raise
                raise NotShareable(" ".join(f"{type(error).__name__}: {error}".split())[:160]) from error

        return Pass(forward_pass.inputs, receive, active)


class _LastRows:
    """Passes that run prompts alone and keep the last layer's rows where their answers are predicted."""

    def __init__(self, model: Any, last: int, prompts: Sequence[TeacherForced]) -> None:
        self.rows = [torch.empty(0)] * len(prompts)
        self.passes: list[Pass] = []
        for number, prompt in enumerate(prompts):

            def receive(layer: int, hidden: Tensor, number: int = number, count: int = len(prompt.targets)) -> None:
                if layer == last:
                    self.rows[number] = hidden[0, -count:].clone()

            self.passes.append(Pass({"input_ids": pad([prompt.ids], input_device(model))}, receive))


class _MappedBuffers(RowBuffers):
    """Rows in a temporary file. It takes its room on the disk at once, so the disk cannot fill up later."""

    def __init__(self, layers: int, width: int, dtype: torch.dtype, folder: Path) -> None:
        super().__init__(layers, width, dtype, torch.device("cpu"))
        self.folder = folder

    def _new_memory(self, numbers: int) -> Tensor:
        size = numbers * self.dtype.itemsize
        try:
            descriptor, name = tempfile.mkstemp(prefix=ROWS_FILE, dir=self.folder)
            try:
                os.posix_fallocate(descriptor, 0, max(size, 1))
                return torch.from_file(name, shared=True, size=numbers, dtype=self.dtype)
            finally:
                os.close(descriptor)
                os.unlink(name)
        except OSError as error:
            raise RunFolderError(
                f"cannot keep {size / 1e9:.1f} GB of hidden rows in {self.folder} ({error.strerror or error}): make "
                "room, or use a folder on another disk"
            ) from error
