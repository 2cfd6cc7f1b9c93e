"""Capture for models larger than memory: all forward passes go through one block before the next block is read.

Rows are kept in a file of the run's folder until the last block has run, since the divergence from the final layer
needs the final layer; then group after group is read from it. An interrupted run starts its sweep again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from xprobe_kernels import attention

from xprobe.capture.engine import Notify, make_pass
from xprobe.capture.memory import is_out_of_memory
from xprobe.capture.plan import WAYS, Group, Plan, Wave, Way, fed_length, make_plan, rotary_limit, split
from xprobe.capture.products import fast_products
from xprobe.capture.rows import Captured, RowSpace
from xprobe.capture.sharing import Isolation, NotIsolated, carries_state, disagreement
from xprobe.capture.tree_attention import NotShareable
from xprobe.errors import RunFolderError
from xprobe.models.anatomy import input_device
from xprobe.models.parity import compare_with_own
from xprobe.models.passes import Pass
from xprobe.models.streaming.streamed import StreamedModel, own_logits, sweep
from xprobe.qa.prompts import Prompt
from xprobe.runs.folder import ROWS

STAGE = "blocks"  # as progress is told
PARITY_PROMPTS = 4


class LayerwiseEngine:
    """What ``Engine`` is for a model in memory; ``folder`` is where rows and spilled hidden states go meanwhile."""

    def __init__(
        self,
        streamed: StreamedModel,
        batch_tokens: int,
        folder: Path,
        notify: Notify | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.streamed, self.batch_tokens, self.folder = streamed, batch_tokens, folder
        self.model, self.anatomy = streamed.model, streamed.anatomy
        self._notify = notify or (lambda message: None)
        self.alone_beyond = rotary_limit(streamed.model.config)
        self.remarks: list[str] = []
        self.progress = progress or (lambda stage, done, total: None)
        self.way: Way = "tree"
        self.kernel = attention.available(input_device(streamed.model))  # as Engine has it
        self.sample: list[Prompt] = []
        self.parity_error: float | None = None
        self.bytes_read = 0

    def plan(self, groups: Sequence[Group]) -> Plan:
        """How ``groups`` are run by this engine."""
        return make_plan(groups, self.batch_tokens, self.way, self.alone_beyond)

    def warn(self, message: str) -> None:
        """Keeps a warning in ``remarks`` and hands it to ``notify``."""
        self.remarks.append(message)
        self._notify(message)

    def settle(self, sample: Sequence[Prompt]) -> Way:
        """Keeps ``sample`` to be run alone and packed ahead of the rest: where the two differ, the sweep starts again
        with plain batches. No block is read for it alone."""
        self.sample = list(sample)
        return self.way

    def waves(self, plan: Plan, wanted: Container[str], backend: str = "auto") -> Iterator[tuple[Wave, Captured]]:
        """Every wave of ``plan`` that holds a group of ``wanted``, and its rows, after one sweep over all of them.

        Raises
        ------
        ModelError, ParityError, RunFolderError
            The model cannot be run so, is not understood, or there is no room for the rows.
        """
        waves = [wave for wave in plan.waves if any(group.key in wanted for group in wave.groups)]
        if not waves:
            return
        layers, width, model = self.anatomy.n_layers, self.anatomy.head.width, self.model
        prompts = [prompt for wave in waves for prompt in wave.prompts]
        space = _MappedSpace(layers, width, model.dtype, self.folder)
        captured = space.take(prompts)
        before = self.streamed.checkpoint.bytes_read
        with fast_products(model):
            try:
                self._sweep(waves, prompts, captured, self._checks())
            except NotShareable as reason:
                self.warn(f"{type(model).__name__} cannot be run with {WAYS[self.way]} ({reason})")
                self.way = "plain"
                try:
                    self._sweep(waves, prompts, captured, self._checks())
                    self.warn(f"it is run with {WAYS['plain']}")
                except NotShareable as why:
                    self.batch_tokens = 1
                    self.warn(f"it is run one prompt at a time: its rows depend on the batch ({why})")
                    self._sweep(waves, prompts, captured, [])
        self.bytes_read += self.streamed.checkpoint.bytes_read - before
        self._check_parity(captured.part(0, min(PARITY_PROMPTS, len(prompts))), backend)
        start = 0
        for wave in waves:
            stop = start + len(wave.prompts)
            yield wave, captured.part(start, stop)
            start = stop

    def check(self, prompts: list[Prompt], backend: str = "auto") -> None:
        """Nothing yet: parity needs rows of the last layer, and is told from those of the sweep."""

    def _check_parity(self, captured: Captured, backend: str) -> None:
        device = self.anatomy.head.weight.device
        last, targets = captured.answers[-1].to(device), captured.targets.to(device)
        own = own_logits(self.streamed, last)
        self.parity_error = compare_with_own(self.model, last, own, self.anatomy.head, targets, backend)

    def _sweep(
        self, waves: Sequence[Wave], prompts: Sequence[Prompt], captured: Captured, checks: Sequence[Pass]
    ) -> None:
        passes = list(checks)
        parts: list[list[int]] = []
        start = 0
        for wave in waves:
            members = range(start, start + len(wave.prompts))
            start = members.stop
            parts += split(prompts, members, self.batch_tokens, self.way, self.alone_beyond)
        if self.alone_beyond is not None:  # as ``split`` orders those of a wave
            limit = self.alone_beyond
            parts.sort(key=lambda part: max(0, max(fed_length(prompts[i]) for i in part) - limit))
        passes += [make_pass(self.model, prompts, part, captured, self.way, self.kernel) for part in parts]
        sweep(self.streamed, passes, folder=self.folder, progress=lambda done, total: self.progress(STAGE, done, total))

    def _checks(self) -> list[Pass]:
        """The sample one by one, then together: NotShareable is raised at the first layer where the two differ."""
        if not self.sample:
            return []
        limit = self.alone_beyond
        sample = [p for p in self.sample if limit is None or fed_length(p) <= limit]
        if len(sample) < min(2, len(self.sample)):
            raise NotShareable(f"the check has no two prompts of at most {limit} tokens")
        shape = (self.anatomy.n_layers, self.anatomy.head.width, self.model.dtype, input_device(self.model))
        wanted, noise, found = (RowSpace(*shape).take(sample) for _ in range(3))
        everyone = range(len(sample))
        passes = [make_pass(self.model, sample, [i], wanted, "plain") for i in everyone]
        batch = make_pass(self.model, sample, everyone, noise, "plain")
        if self.way == "plain":

            def compare(layer: int, hidden: Tensor) -> None:
                batch.receive(layer, hidden)
                if reason := disagreement(noise, wanted, None, self.anatomy.head, layer):
                    raise NotShareable(reason)

            return [*passes, Pass(batch.inputs, compare, batch.active)]
        stateful = carries_state(self.model, self.anatomy.blocks)
        if stateful is not None:
            raise NotShareable(stateful)
        packed = make_pass(self.model, sample, everyone, found, self.way, self.kernel)

        def receive(layer: int, hidden: Tensor) -> None:
            packed.receive(layer, hidden)
            if reason := disagreement(found, wanted, noise, self.anatomy.head, layer):
                raise NotShareable(reason)

        isolation = Isolation(self.model, self.anatomy.blocks, self.kernel)
        alone = [self._guarded(one, one.receive) for one in isolation.passes]
        return [*alone, *passes, batch, self._guarded(packed, receive)]

    @staticmethod
    def _guarded(one: Pass, receive: Callable[[int, Tensor], None]) -> Pass:
        """A pass of the check: whatever fails in it says that the model cannot be run so."""

        @contextmanager
        def active() -> Iterator[None]:
            try:
                with one.active():
                    yield
            except NotShareable:
                raise
            except NotIsolated as error:
                raise NotShareable(str(error)) from error
            except Exception as error:  # a model's own code may raise anything when it is fed what it does not know
                if is_out_of_memory(error):
                    raise
                raise NotShareable(" ".join(f"{type(error).__name__}: {error}".split())[:160]) from error

        return Pass(one.inputs, receive, active)


class _MappedSpace(RowSpace):
    """Rows in a file that vanishes with the process; its room on the disk is taken at once, so that it cannot end
    in the middle."""

    def __init__(self, layers: int, width: int, dtype: torch.dtype, folder: Path) -> None:
        super().__init__(layers, width, dtype, torch.device("cpu"))
        self.dtype, self.folder = dtype, folder

    def _memory(self, before: Tensor, numbers: int) -> Tensor:
        size = numbers * self.dtype.itemsize
        try:
            descriptor, name = tempfile.mkstemp(prefix=ROWS, dir=self.folder)
            try:
                os.posix_fallocate(descriptor, 0, max(size, 1))
                return torch.from_file(name, shared=True, size=numbers, dtype=self.dtype)
            finally:
                os.close(descriptor)
                os.unlink(name)
        except OSError as error:
            raise RunFolderError(
                f"cannot keep {size / 1e9:.1f} GB of hidden rows in {self.folder} ({error.strerror or error}): make "
                "room, or choose another --out"
            ) from error
