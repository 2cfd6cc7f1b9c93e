"""The engine for models in memory: forward passes that write the requested rows of every layer into buffers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from xprobe_kernels import attention

from xprobe.arguments import check_least
from xprobe.capture.edited import edit_sample
from xprobe.capture.edits import check_edits
from xprobe.capture.generation import Generated, generate_in_batches, generate_on_tree, log_probabilities
from xprobe.capture.memory import is_out_of_memory, release_memory
from xprobe.capture.one_part import Choice, Select, run_part
from xprobe.capture.passes import run_pass
from xprobe.capture.plan import (
    STRATEGIES,
    Plan,
    Strategy,
    Wave,
    candidates,
    make_plan,
    part_tokens,
    rotary_limit,
    split,
)
from xprobe.capture.requests import Each, Group, Request, check_groups, check_requests, check_sample
from xprobe.capture.rows import RowBuffers, Rows
from xprobe.capture.runner import RunnerReport, Warnings, check_batch_tokens
from xprobe.capture.sharing import CarriesState, Isolation, NotIsolated, carries_state, disagreement, short_sample
from xprobe.capture.tree_attention import NotShareable
from xprobe.errors import UsageError
from xprobe.models import tensor_parallel
from xprobe.models.anatomy import Anatomy, input_device
from xprobe.models.parity import TeacherForced, check_parity, check_prompts, rounding_warning
from xprobe.models.token_limits import TokenLimits


class Engine:
    """Runs a decoder in memory over requests and keeps their rows. A ``Runner`` (``xprobe.capture.runner``).

    Parameters
    ----------
    model : transformers model
    anatomy : Anatomy
        Where its blocks and its head are (``xprobe.models.anatomy.inspect``).
    batch_tokens : int
        Most tokens in one forward pass. The engine halves it when memory runs out; ``report`` gives the last value.
    notify : callable (message), optional
        Called with each warning. ``report`` lists them all.

    Attributes
    ----------
    strategy : str
        How prompts share a pass. ``choose_strategy`` finds one that the model allows; ``capture`` calls it where nobody
        has. Before ``run`` it must be called, or a strategy set that is known to be right.
    kernel : bool
        Whether packed trees may use the attention kernel.
    limits : TokenLimits
        Which token ids a request may have, and how many. The window comes from the model's configuration.

    Raises
    ------
    UsageError
        ``batch_tokens`` is not a whole number of at least 1.
    """

    def __init__(
        self, model: Any, anatomy: Anatomy, batch_tokens: int, notify: Callable[[str], None] | None = None
    ) -> None:
        self.model, self.anatomy = model, anatomy
        self.batch_tokens = check_batch_tokens(batch_tokens)
        self.limits = TokenLimits.from_model(model, anatomy)
        self.warn = Warnings(notify)
        self._strategy: Strategy | None = None  # until it is chosen
        self.kernel = attention.available(input_device(model))
        self.max_shared_tokens = rotary_limit(model.config)
        self.parity_error: float | None = None
        self._edits_on_tree: bool | None = None  # until it is checked
        self._largest_part = 0  # most requests in one pass of the last capture
        shape = (anatomy.head.width, model.dtype, anatomy.head.weight.device)
        self._space = RowBuffers(anatomy.n_layers, *shape)
        self._last_layer = RowBuffers(1, *shape, first_layer=anatomy.n_layers - 1)

    @property
    def strategy(self) -> Strategy:
        """How prompts share a pass; ``tree`` until a strategy is chosen."""
        return self._strategy or "tree"

    @strategy.setter
    def strategy(self, strategy: Strategy) -> None:
        if strategy not in STRATEGIES:
            raise UsageError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
        self._strategy = strategy

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
        """Compares the lens at the last layer with the model's own logits, on a few prompts.

        Raises
        ------
        UsageError
            A prompt cannot be run (``xprobe.models.parity.check_prompts``).
        ParityError
            They differ by more than rounding.
        """
        check_prompts(prompts, self.limits)
        tensor_parallel.send_order("check_parity", prompts, backend)
        self.parity_error = check_parity(self.model, self.anatomy, prompts, backend)
        if warning := rounding_warning(self.parity_error):
            self.warn(warning)

    def choose_strategy(self, sample: Sequence[Request]) -> None:
        """Finds the fastest strategy that gives the same rows as plain runs of the model, and keeps it.

        A few requests of ``sample``, cut to a bounded length (``xprobe.capture.sharing.short_sample``), are run one by
        one, then by each strategy, and the rows are compared. The sample should hold requests with a common beginning.

        Raises
        ------
        UsageError
            The sample is empty, or a request in it cannot be run (``check_requests``).
        """
        check_sample(sample, self.limits)
        tensor_parallel.send_order("choose_strategy", list(sample))
        requests = short_sample(sample, self.model.config, self.max_shared_tokens)
        name = type(self.model).__name__
        budget = max(self.batch_tokens, sum(len(request.ids) for request in requests))
        wanted = self._capture(requests, "plain", 1).copy()

        @cache
        def noise() -> Rows:
            longest = max(len(request.ids) for request in requests)
            return self._capture(requests, "plain", len(requests) * longest).copy()

        stateful = carries_state(self.model, self.anatomy.blocks)
        if stateful is not None:
            self.warn(f"{name} cannot share beginnings: {stateful}")
            return self._use_plain_batches(wanted, noise())
        for strategy, kernel in candidates(self.kernel):
            self.kernel = kernel
            try:
                reason = self._why_not(strategy, requests, budget, wanted, noise)
            except CarriesState as error:
                self.warn(f"{name} cannot share beginnings: {error}")
                return self._use_plain_batches(wanted, noise())
            if reason is None:
                self.strategy = strategy
                return None
            with_kernel = ", and the attention kernel" if self.kernel else ""
            self.warn(f"{name} cannot be run with {STRATEGIES[strategy]}{with_kernel} ({reason})")
        return self._use_plain_batches(wanted, noise())

    def _why_not(
        self, strategy: Strategy, sample: Sequence[Request], budget: int, wanted: Rows, noise: Callable[[], Rows]
    ) -> str | None:
        """Why a strategy does not give the rows ``wanted``; None if it does."""
        try:
            if strategy == "tree":
                for forward_pass in Isolation(self.model, self.anatomy.blocks, self.kernel).passes:
                    run_pass(self.model, self.anatomy, forward_pass)
            # the budget lets all run in one pass: requests that run alone do not show whether sharing works
            rows = self._capture(sample, strategy, budget)
            together = self._largest_part
            reason = self._disagreement(rows.copy(), wanted, noise)
            if reason is None and together < min(2, len(sample)):
                reason = "no two prompts of the check could be run together"
            return reason
        except CarriesState:
            raise
        except NotIsolated as error:
            return str(error)
        except Exception as error:  # a model's own code may raise anything on inputs that it does not expect
            if is_out_of_memory(error):
                raise
            return " ".join(f"{type(error).__name__}: {error}".split())[:160]

    def _use_plain_batches(self, wanted: Rows, together: Rows) -> None:
        """Chooses plain batches, or one prompt at a time if plain batches change the rows."""
        self.strategy = "plain"
        if (reason := self._disagreement(together, wanted, None)) is None:
            self.warn(f"it is run with {STRATEGIES['plain']}")
        else:
            self.batch_tokens = 1
            self.warn(f"it is run one prompt at a time: its rows depend on the batch ({reason})")

    def _disagreement(self, rows: Rows, wanted: Rows, noise: Callable[[], Rows] | None) -> str | None:
        """Names the first layer at which rows differ from ``wanted`` by more than rounding; None if none does."""
        layers = range(self.anatomy.n_layers)
        reasons = (disagreement(rows, wanted, noise, self.anatomy.head, layer) for layer in layers)
        return next((reason for reason in reasons if reason), None)

    def run(self, plan: Plan, wanted: Container[str]) -> Iterator[tuple[Wave, Rows]]:
        """Yields every wave of ``plan`` with a group of ``wanted``, and its rows. The next wave overwrites them."""
        self._space.reserve(plan.most_rows)
        for wave in plan.waves:
            if any(group.key in wanted for group in wave.groups):
                yield wave, self.capture_wave(wave.requests)

    def capture(self, requests: Sequence[Request], *, last_layer: bool = False, select: Select | None = None) -> Rows:
        """Runs ``requests`` and returns their rows.

        Where no strategy was chosen yet, it is chosen first, by a check on a few of these requests. A request that is
        alone is run as it is. Requests may have edits (``xprobe.capture.edits``).

        ``last_layer``: only rows of the last layer are kept. ``select``: says which requests with edits are run
        (``xprobe.capture.one_part.Select``); the rows of the others hold anything.

        Raises
        ------
        UsageError
            A request cannot be run (``check_requests``).
        RuntimeError, MemoryError
            Memory runs out even for one request at a time, or the model fails.
        """
        check_requests(requests, self.limits)
        check_edits(requests, self.anatomy.n_layers, self.anatomy.head.width)
        if self._strategy is None and len({request.ids for request in requests}) > 1:
            self.choose_strategy(requests)
        strategy = self._strategy or "plain"
        if strategy == "tree" and self._edits_on_tree is None and any(request.edits for request in requests):
            self.check_edits_on_tree(requests)
        if select is not None and tensor_parallel.size() == 1:  # the other processes run every request
            return self._capture(requests, strategy, self.batch_tokens, last_layer, select).copy()
        return self.capture_wave(requests, strategy, last_layer).copy()

    def capture_wave(
        self, requests: Sequence[Request], strategy: Strategy | None = None, last_layer: bool = False
    ) -> Rows:
        """Like ``capture``, into memory of the engine: the next call overwrites the rows.

        ``strategy`` replaces the engine's own; neither is checked here. Raises what ``capture`` raises.
        """
        check_requests(requests, self.limits)
        check_edits(requests, self.anatomy.n_layers, self.anatomy.head.width)
        tensor_parallel.send_order("capture_wave", requests, strategy, last_layer)
        return self._capture(requests, strategy or self.strategy, self.batch_tokens, last_layer)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], stop: Collection[int]
    ) -> list[Generated]:
        """The most probable tokens after each prompt, up to a stop token (greedy decoding).

        With the strategy ``tree``, prompts that share a pass also generate together; otherwise the model's own
        ``generate`` is used. Where no strategy was chosen yet, it is chosen first, as in ``capture``.

        Parameters
        ----------
        prompts : sequence of token ids
        max_new_tokens : int or sequence of int
            Most tokens after each prompt. A prompt near the end of the model's window gets fewer.
        stop : collection of int
            Tokens that end an answer.

        Raises
        ------
        UsageError
            A prompt cannot be run, or fills the window; or ``max_new_tokens`` is not a whole number of at least 1.
        RuntimeError, MemoryError
            As ``capture``.
        """
        counts = max_new_tokens if isinstance(max_new_tokens, list | tuple) else [max_new_tokens] * len(prompts)
        for count in counts:
            check_least("max_new_tokens", count, 1)
        requests = [Request(tuple(ids), {"last": Each((len(ids) - 1,))}) for ids in prompts]
        check_requests(requests, self.limits, [f"prompt {index}" for index in range(len(requests))])
        if self._strategy is None and len(requests) > 1:
            self.choose_strategy(requests)
        tensor_parallel.send_order("generate", [list(ids) for ids in prompts], list(counts), set(stop))
        window = self.limits.window or sys.maxsize
        limits = [min(count, window - len(request.ids)) for count, request in zip(counts, requests, strict=True)]
        if full := [str(i) for i, limit in enumerate(limits) if limit < 1]:
            raise UsageError(f"prompt {full[0]} fills the model's window of {window} tokens: nothing can follow it")
        found: dict[int, Generated] = {}

        def run(part: Sequence[int]) -> None:
            texts, most = [requests[i].ids for i in part], [limits[i] for i in part]
            longest = max(map(sum, zip(map(len, texts), most, strict=True)))
            if self.strategy == "tree" and longest <= (self.max_shared_tokens or longest):
                answers = generate_on_tree(self.model, self.anatomy, texts, most, stop, kernel=self.kernel)
            else:
                answers = generate_in_batches(self.model, texts, most, stop, self.batch_tokens)
            found.update(zip(part, answers, strict=True))

        self._run_parts(requests, range(len(requests)), self.strategy, self.batch_tokens, run)
        return [found[i] for i in range(len(requests))]

    def log_probabilities(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Callable[[int], None] | None = None
    ) -> list[float]:
        """How probable each continuation is after its prompt, in nats: the sum over its tokens.

        Prompts that share their beginnings share the passes, as in ``capture``; only rows of the last layer are kept,
        and only for one pass. Where no strategy was chosen yet, it is chosen first.

        Parameters
        ----------
        texts : sequence of (token ids of the prompt, token ids of the continuation)
        progress : callable (count), optional
            Called after each pass with the number of texts that it ran.

        Raises
        ------
        UsageError
            A prompt or a continuation is empty, or a text cannot be run.
        RuntimeError, MemoryError
            As ``capture``.
        """
        if empty := [index for index, text in enumerate(texts) if not all(map(len, text))]:
            raise UsageError(f"text {empty[0]} has an empty prompt or continuation: each needs at least one token")
        requests = [
            Request(
                (*prompt, *answer[:-1]), {"answer": Each(tuple(range(len(prompt) - 1, len(prompt) + len(answer) - 1)))}
            )
            for prompt, answer in texts
        ]
        check_requests(requests, self.limits, [f"text {index}" for index in range(len(requests))])
        predicted = TokenLimits(self.anatomy.head.vocab_size)
        for index, (_, answer) in enumerate(texts):
            predicted.check(tuple(answer), f"the continuation of text {index}")
        if self._strategy is None and len(requests) > 1:
            self.choose_strategy(requests)
        tensor_parallel.send_order("log_probabilities", [(tuple(one), tuple(other)) for one, other in texts])
        found: dict[int, float] = {}

        def run(part: Sequence[int]) -> None:
            some = [requests[i] for i in part]
            rows = self._last_layer.rows_for(some)
            self._run(some, range(len(some)), rows, self.strategy)
            targets = [token for i in part for token in texts[i][1]]
            values = log_probabilities(rows["answer"][0], targets, self.anatomy.head)
            ends = rows.offsets["answer"].tolist()
            found.update(zip(part, (sum(values[a:b]) for a, b in pairwise(ends)), strict=True))
            if progress is not None:
                progress(len(part))

        self._run_parts(requests, range(len(requests)), self.strategy, self.batch_tokens, run)
        return [found[i] for i in range(len(requests))]

    def check_edits_on_tree(self, requests: Sequence[Request]) -> None:
        """Compares edits on the tree with those of plain runs. Without agreement, edits are run plainly from now on."""
        tensor_parallel.send_order("check_edits_on_tree", requests)
        sample = edit_sample(short_sample(requests, self.model.config, self.max_shared_tokens), self.anatomy)
        wanted, budget = self._capture(sample, "plain", 1).copy(), sum(len(request.ids) for request in sample)
        try:
            reason = self._disagreement(self._capture(sample, "tree", budget).copy(), wanted, None)
        except NotShareable as error:
            reason = str(error)
        self._edits_on_tree = reason is None
        if reason is not None:
            self.warn(f"{type(self.model).__name__}: edits are run with {STRATEGIES['plain']} ({reason})")

    def _capture(
        self, requests: Sequence[Request], strategy: Strategy, budget: int, last_layer: bool = False,
        select: Select | None = None,
    ) -> Rows:  # fmt: skip
        rows = (self._last_layer if last_layer else self._space).rows_for(requests)
        choice = Choice(requests, rows, select)
        if choice.edited and (strategy != "tree" or self._edits_on_tree is False):
            strategy = "plain"

        def run(part: Sequence[int]) -> None:
            self._run(requests, part, rows, strategy, choice.after(part))

        together = select is None or strategy == "tree"
        self._run_parts(requests, range(len(requests)) if together else choice.unedited, strategy, budget, run)
        if not together:
            self._run_parts(requests, choice.after(())(choice.edited), strategy, budget, run)
        return rows

    def _run_parts(
        self, requests: Sequence[Request], some: Iterable[int], strategy: Strategy, budget: int,
        run: Callable[[Sequence[int]], None],
    ) -> None:  # fmt: skip
        """Calls ``run`` with parts of ``some``, by index, that share a pass; smaller ones if memory runs out."""
        self._largest_part = 0
        waiting = split(requests, some, budget, strategy, self.max_shared_tokens)
        while waiting:
            try:
                run(waiting[0])
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or len(waiting[0]) == 1 or tensor_parallel.size() > 1:
                    raise  # with several processes, the others are in the middle of this pass
            else:
                self._largest_part = max(self._largest_part, len(waiting.pop(0)))
                continue
            # after the handler: the error's traceback holds the tensors of the pass that failed
            release_memory()
            self.batch_tokens = max(1, min(self.batch_tokens, part_tokens(requests, waiting[0], strategy)) // 2)
            self.warn(f"memory ran out: going on with at most {self.batch_tokens} tokens in a forward pass")
            left = [i for part in waiting for i in part]
            waiting = split(requests, left, self.batch_tokens, strategy, self.max_shared_tokens)

    def _run(
        self, requests: Sequence[Request], part: Sequence[int], into: Rows, strategy: Strategy,
        wanted: Callable[[Iterable[int]], Sequence[int]] = list,
    ) -> None:  # fmt: skip
        run_part(
            self.model, self.anatomy, requests, part, into, strategy, kernel=self.kernel,
            most_tokens=self.batch_tokens, max_shared_tokens=self.max_shared_tokens, wanted=wanted,
        )  # fmt: skip
