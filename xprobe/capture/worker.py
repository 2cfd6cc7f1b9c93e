"""The processes of tensor parallelism other than the first: each holds its part of the model and follows orders."""

from __future__ import annotations

from contextlib import suppress

from xprobe.capture.engine import Engine
from xprobe.config import Execution
from xprobe.errors import ModelError, XprobeError
from xprobe.models import loading
from xprobe.models.anatomy import input_device, inspect
from xprobe.models.tensor_parallel import FAILURE_TIMEOUT, OrderChannel, join_processes


def follow(execution: Execution) -> int:
    """Follows the orders of the first process until it is done, and returns the exit code of the first process.

    Raises
    ------
    ModelError
        This process failed, and the first process did not report a failure. Names the process and the reason.
    """
    engine: Engine | None = None
    with join_processes() as channel:
        while True:
            try:
                what, args = channel.receive()
                if what == "stop":
                    return int(args[0])
                if what == "open":
                    model = loading.load(args[0], execution, dtype=args[1]).model
                    engine = Engine(model, inspect(model), execution.tokens_on(str(input_device(model))))
                else:
                    getattr(engine, what)(*args)
            except Exception as error:
                return _exit_code_of_first(channel, error)


def _exit_code_of_first(channel: OrderChannel, error: Exception) -> int:
    """The exit code of the first process if it failed, too, and has reported why. Otherwise raises."""
    with suppress(Exception):
        what, args = channel.receive(FAILURE_TIMEOUT)
        if what == "stop" and args[0]:
            return int(args[0])
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if not isinstance(error, XprobeError):
        reason = f"{type(error).__name__}: {reason}"
    raise ModelError(f"process {channel.rank} of {channel.size} failed: {reason}") from error
