"""Several processes that hold one model together: the first runs the study, the others compute what it tells them.

Every process holds a part of each layer, so all must run every forward pass. Only the first knows of data, folders
and tables: it sends an order ahead of each piece of work with the model, and the others do that piece along with it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from xprobe.config import Execution
from xprobe.errors import ModelError, UsageError

ORDER_TIMEOUT = timedelta(days=365)  # between two orders the first process may be busy with anything
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # one exchange between processes, the wait for the slowest to load included
FAILURE_TIMEOUT = timedelta(seconds=20)  # for the first process to say that it failed as well

_CHANNEL: ContextVar[OrderChannel | None] = ContextVar("xprobe_order_channel", default=None)


@dataclass
class OrderChannel:
    """This process's place among ``size`` processes, and the store that orders go through."""

    rank: int
    size: int
    store: Any
    orders: int = 0

    def send(self, what: str, *args: Any) -> None:
        """Sends an order; all have read the one before, since they took part in its work."""
        self.store.set(str(self.orders), pickle.dumps((what, args)))
        if self.orders:
            self.store.delete_key(str(self.orders - 1))
        self.orders += 1

    def receive(self, patience: timedelta = ORDER_TIMEOUT) -> tuple[str, tuple[Any, ...]]:
        """The next order."""
        self.store.wait([str(self.orders)], patience)
        order = pickle.loads(self.store.get(str(self.orders)))
        self.orders += 1
        return order


def rank_and_count() -> tuple[int, int]:
    """Rank of this process, and how many there are, as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_launch(execution: Execution) -> None:
    """Refuses a configuration that does not fit the way this process was started.

    Raises
    ------
    UsageError
        One of several processes, each of which would do the same run; or tensor parallelism in a single one.
    """
    _, size = rank_and_count()
    if size > 1 and not execution.tensor_parallel:
        raise UsageError(
            f"started as one of {size} processes (WORLD_SIZE={size}), each of which would do the same run: add "
            "--tensor-parallel to share one model among them, or start it once"
        )
    if size == 1 and execution.tensor_parallel:
        raise UsageError(
            "--tensor-parallel shares a model among processes, and there is but one: start it with "
            "`torchrun --nproc-per-node N -m xprobe_cli run ...`"
        )


@contextmanager
def lead(execution: Execution) -> Iterator[None]:
    """For the first process: inside, ``loading.load`` and ``Engine`` have the others work along; then these go home.

    Does nothing unless ``execution.tensor_parallel``.
    """
    if not execution.tensor_parallel:
        yield
        return
    with join_processes() as channel:
        code = 1
        try:
            yield
            code = 0
        except BaseException as error:
            code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
            raise
        finally:
            with suppress(Exception):  # the store may be gone with the processes
                channel.send("stop", code)


def send_order(what: str, *args: Any) -> None:
    """Has the other processes call ``Engine.what(*args)`` (or open the model); nothing where there are none."""
    channel = _CHANNEL.get()
    if channel is not None and channel.rank == 0:
        channel.send(what, *args)


def size() -> int:
    """How many processes work together here; 1 outside of a team."""
    channel = _CHANNEL.get()
    return 1 if channel is None else channel.size


def check_heads(config: Any, name: str) -> None:
    """Raises a ModelError if the attention heads of a model cannot be dealt out evenly."""
    text = config.get_text_config(decoder=True)
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, what, None)
        if heads and heads % size():
            raise ModelError(
                f"{size()} processes cannot share the heads of {name} evenly ({what} = {heads}): choose a number of "
                f"processes that divides {heads}"
            )


@contextmanager
def join_processes() -> Iterator[OrderChannel]:
    """Brings the processes that torchrun started together; this one's place among them."""
    import torch
    import torch.distributed as dist

    rank, count = rank_and_count()
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        dist.init_process_group(
            "gloo" if device is None else "nccl",
            store=dist.PrefixStore("model", store), rank=rank, world_size=count, timeout=COLLECTIVE_TIMEOUT,
            device_id=device,
        )  # fmt: skip
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"the processes did not find each other: {' '.join(str(error).split())[:300]}") from error
    channel = OrderChannel(rank, count, dist.PrefixStore("orders", store))
    token = _CHANNEL.set(channel)
    try:
        yield channel
    except BaseException:
        _CHANNEL.reset(token)
        raise  # the group is left as it is: taking it down would wait for the others
    _CHANNEL.reset(token)
    with suppress(Exception):
        dist.destroy_process_group()
