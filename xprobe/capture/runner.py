"""What every way to run a model offers: in memory (``engine``) or block by block (``layerwise``)."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from xprobe.capture.plan import Plan, Strategy, Wave
from xprobe.capture.requests import Group, Request
from xprobe.capture.rows import Rows
from xprobe.config import Execution
from xprobe.models.anatomy import Anatomy
from xprobe.models.parity import TeacherForced


@dataclass(frozen=True)
class RunnerReport:
    """How the requests were run.

    Parameters
    ----------
    strategy : str
        One of ``xprobe.capture.plan.STRATEGIES``.
    batch_tokens : int
        Most tokens in one forward pass, in the end.
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
        """Has the lens at the last layer compared with the model's own logits, at once or with the next run.

        Raises
        ------
        ParityError
            They differ by more than rounding.
        """

    def choose_strategy(self, sample: Sequence[Request]) -> None:
        """Has ``sample`` run in several ways, at once or with the next run, to see which give the same rows."""

    def plan(self, groups: Sequence[Group]) -> Plan:
        """How this runner would run ``groups``."""

    def run(self, plan: Plan, wanted: Container[str]) -> Iterator[tuple[Wave, Rows]]:
        """Every wave of ``plan`` that holds a group of ``wanted``, with its rows, which the next wave overwrites."""

    def warn(self, message: str) -> None:
        """Adds a warning to the report."""

    def report(self) -> RunnerReport: ...


def check_batch_tokens(batch_tokens: int) -> int:
    """The same number, if it is one that ``Execution`` allows.

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
    return Execution(batch_tokens=batch_tokens).batch_tokens


@dataclass
class Warnings:
    """Warnings of one runner: kept for its report, and handed on as they come."""

    notify: Callable[[str], None] | None = None
    messages: list[str] = field(default_factory=list)

    def __call__(self, message: str) -> None:
        self.messages.append(message)
        if self.notify is not None:
            self.notify(message)
