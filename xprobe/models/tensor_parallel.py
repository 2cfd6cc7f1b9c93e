"""Tensor parallelism: several processes share one model. The first process leads, the others follow its orders.

Every process holds a part of each layer, so all processes must run every forward pass. Only the first process handles
data, folders and tables. Before each step with the model it sends an order, and all processes run that step together.
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

ORDER_TIMEOUT = timedelta(days=365)  # the first process may work for long between two orders
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # one exchange; it includes the wait for the slowest process to load
FAILURE_TIMEOUT = timedelta(seconds=20)  # the wait for the first process to report its own failure

_CHANNEL: ContextVar[OrderChannel | None] = ContextVar("xprobe_order_channel", default=None)


@dataclass
class OrderChannel:
    """Sends and receives orders among the processes that share a model.

    Attributes
    ----------
    rank : int
        Rank of this process. The process with rank 0 sends the orders.
    size : int
        Number of processes.
    store : torch.distributed.Store
        Carries the orders.
    orders : int
        Number of orders so far.

    Examples
    --------
    >>> from torch.distributed import HashStore
    >>> store = HashStore()
    >>> OrderChannel(0, 2, store).send("check_parity", 3)
    >>> OrderChannel(1, 2, store).receive()
    ('check_parity', (3,))
    """

    rank: int
    size: int
    store: Any
    orders: int = 0

    def send(self, what: str, *args: Any) -> None:
        """Sends an order and deletes the previous one. (All processes have read it, because they ran its step.)"""
        self.store.set(str(self.orders), pickle.dumps((what, args)))
        if self.orders:
            self.store.delete_key(str(self.orders - 1))
        self.orders += 1

    def receive(self, timeout: timedelta = ORDER_TIMEOUT) -> tuple[str, tuple[Any, ...]]:
        """The next order: the name of a method, and its arguments."""
        self.store.wait([str(self.orders)], timeout)
        order = pickle.loads(self.store.get(str(self.orders)))
        self.orders += 1
        return order


def rank_and_count() -> tuple[int, int]:
    """Rank of this process and the number of processes, from torchrun's environment; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_launch(execution: Execution) -> None:
    """Checks that ``execution`` fits the number of processes.

    Raises
    ------
    UsageError
        There are several processes without tensor parallelism, or tensor parallelism with a single process.
    """
    _, size = rank_and_count()
    if size > 1 and not execution.tensor_parallel:
        raise UsageError(
            f"started as one of {size} processes (WORLD_SIZE={size}), each of which would do the same run: add "
            "tensor_parallel (--tensor-parallel) to share one model among them, or start it once"
        )
    if size == 1 and execution.tensor_parallel:
        raise UsageError(
            "tensor_parallel (--tensor-parallel) shares a model among processes, and there is only one: start it with "
            "`torchrun --nproc-per-node N -m xprobe_cli run ...`"
        )


@contextmanager
def lead(execution: Execution) -> Iterator[None]:
    """The context of the first process: ``loading.load`` and ``Engine`` send their orders inside it.

    On exit the other processes stop. Without ``execution.tensor_parallel`` the context does nothing.
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
            with suppress(Exception):  # the store is gone if the processes have ended
                channel.send("stop", code)


def send_order(what: str, *args: Any) -> None:
    """Makes the other processes call ``Engine.what(*args)``, or load the model (``open``).

    In a single process, and in a process that follows, it does nothing.
    """
    channel = _CHANNEL.get()
    if channel is not None and channel.rank == 0:
        channel.send(what, *args)


def size() -> int:
    """Number of processes that share the model; 1 without tensor parallelism.

    Examples
    --------
    >>> size()
    1
    """
    channel = _CHANNEL.get()
    return 1 if channel is None else channel.size


def check_heads(config: Any, name: str) -> None:
    """Raises a ModelError if the number of processes does not divide the number of attention heads."""
    text = config.get_text_config(decoder=True)
    for entry in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, entry, None)
        if heads and heads % size():
            raise ModelError(
                f"{size()} processes cannot share the heads of {name} evenly ({entry} = {heads}): choose a number of "
                f"processes that divides {heads}"
            )


@contextmanager
def join_processes() -> Iterator[OrderChannel]:
    """Connects the processes that torchrun started.

    Raises
    ------
    ModelError
        The processes cannot connect.
    """
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
        raise ModelError(f"the processes cannot connect to each other: {' '.join(str(error).split())[:300]}") from error
    channel = OrderChannel(rank, count, dist.PrefixStore("orders", store))
    token = _CHANNEL.set(channel)
    try:
        yield channel
    except BaseException:
        _CHANNEL.reset(token)
        raise  # keep the process group: destroying it would wait for the other processes
    _CHANNEL.reset(token)
    with suppress(Exception):
        dist.destroy_process_group()
