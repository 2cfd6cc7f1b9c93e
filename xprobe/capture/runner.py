"""The interface of the engines: models in memory (``engine``) or block by block (``layerwise``)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from xprobe.arguments import check_least
from xprobe.capture.generation import Generated
from xprobe.capture.plan import Plan, Strategy, Wave
from xprobe.capture.requests import Group, Request
from xprobe.capture.rows import Rows
from xprobe.models.anatomy import Anatomy
from xprobe.models.parity import TeacherForced


@dataclass(frozen=True)
class RunnerReport:
    """How a runner has run its requests.

    Parameters
    ----------
    strategy : str
        One of ``xprobe.capture.plan.STRATEGIES``.
    batch_tokens : int
        Most tokens in one forward pass, after any halving.
    attention_kernel : bool
        Whether packed prompts went through the attention kernel.
    parity_error : float, optional
        In nats; None before the check.
    warnings : tuple of str
    """

    strategy: Strategy
    batch_tokens: int
    attention_kernel: bool
    parity_error: float | None
    warnings: tuple[str, ...]


class Runner(Protocol):
    """Runs a model over requests and keeps rows of every layer."""

    @property
    def model(self) -> Any: ...

    @property
    def anatomy(self) -> Anatomy: ...

    def check_parity(self, prompts: Sequence[TeacherForced], backend: str = "auto") -> None:
        """Compares the lens at the last layer with the model's own logits, at once or during the next run.

        Raises
        ------
        ParityError
            They differ by more than rounding.
        """

    def choose_strategy(self, sample: Sequence[Request]) -> None:
        """Runs ``sample`` with several strategies, now or during the next run, and keeps one that gives equal rows."""

    def plan(self, groups: Sequence[Group]) -> Plan:
        """How this runner would run ``groups``."""

    def run(self, plan: Plan, wanted: Container[str]) -> Iterator[tuple[Wave, Rows]]:
        """Yields every wave of ``plan`` with a group of ``wanted``, and its rows. The next wave overwrites them.

        ``wanted`` holds keys of groups; keys that the plan does not have are ignored.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], stop: Collection[int]
    ) -> list[Generated]:
        """The most probable tokens after each prompt, up to a stop token.

        Raises
        ------
        UsageError
            This runner cannot generate.
        """

    def log_probabilities(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Callable[[int], None] | None = None
    ) -> list[float]:
        """How probable each continuation is after its prompt, in nats: the sum over its tokens.

        Raises
        ------
        UsageError
            A text cannot be run, or this runner cannot run texts that depend on earlier results.
        """

    def warn(self, message: str) -> None:
        """Adds a warning to the report."""

    def report(self) -> RunnerReport:
        """How the runner has run its requests so far."""


def check_batch_tokens(batch_tokens: int) -> int:
    """The same number, if it is a whole number of at least 1.

    Raises
    ------
    UsageError
        It is not a whole number of at least 1.

    Examples
    --------
    >>> check_batch_tokens(0)
    Traceback (most recent call last):
    ...
    xprobe.errors.UsageError: batch_tokens must be a whole number of at least 1, got 0
    """
    check_least("batch_tokens", batch_tokens, 1)
    return batch_tokens


@dataclass
class Warnings:
    """The warnings of one runner. It keeps them for the report and passes each to ``notify``.

    Examples
    --------
    >>> warn = Warnings(notify=print)
    >>> warn("memory ran out")
    memory ran out
    >>> warn.messages
    ['memory ran out']
    """

    notify: Callable[[str], None] | None = None
    messages: list[str] = field(default_factory=list)

    def __call__(self, message: str) -> None:
        self.messages.append(message)
        if self.notify is not None:
            self.notify(message)
