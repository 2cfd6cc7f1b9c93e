"""What a call holds in memory: tiles, never all logits, and within ``workspace_bytes``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from xprobe_kernels import Readout, Unembedding, available_backends, capture, lens
from xprobe_kernels.readout import KERNELS

# the kernels' memory is measured on a GPU (test_triton.py): the interpreter's own copies would be counted here
TILED = [name for name in available_backends("cpu") if name != "reference" and name not in KERNELS]
MIB = 1 << 20

each_tiled_backend = pytest.mark.parametrize("backend", TILED)


class Allocations(TorchDispatchMode):
    """Watches every tensor made inside: the entries of the largest, and the bytes alive at once and at the end."""

    def __init__(self, *arguments: Tensor) -> None:
        super().__init__()
        self.arguments = {id(tensor.untyped_storage()) for tensor in arguments}
        self.kept = arguments  # ids stay theirs as long as they live
        self.alive: dict[int, int] = {}
        self.largest, self.bytes, self.peak = 0, 0, 0

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self.arguments or id(storage) in self.alive:
                continue
            self.alive[id(storage)] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
            weakref.finalize(storage, self.forget, id(storage))
        return result

    def forget(self, storage: int) -> None:
        self.bytes -= self.alive.pop(storage)


def watched(
    backend: str,
    rows: int,
    width: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
    **options: Any,
) -> tuple[Allocations, Readout]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=random).to(dtype)
    weight = torch.randn(vocabulary, width, generator=random).to(dtype).requires_grad_(trainable)
    lookup = torch.randint(0, vocabulary, (rows, 3), generator=random)
    head = Unembedding(weight, norm="layer", softcap=30.0)
    allocations = Allocations(
        hidden, weight, lookup, *(value for value in options.values() if isinstance(value, Tensor))
    )
    with allocations:
        readout = lens(hidden, head, lookup, backend=backend, **options)
    return allocations, readout


def output_bytes(readout: Readout) -> int:
    return sum(value.untyped_storage().nbytes() for value in vars(readout).values() if isinstance(value, Tensor))


def test_the_watch_sees_what_is_alive() -> None:
    with Allocations() as allocations:
        first = torch.zeros(1000)
        second = torch.zeros(10, 30)[:5]
        del first
        third = torch.zeros(100)
    assert (allocations.largest, allocations.peak, allocations.bytes) == (1000, 4 * 1300, 4 * 400)
    assert second.shape[0] + third.shape[0] == 105


def test_the_reference_does_hold_all_logits() -> None:
    allocations, _ = watched("reference", 33, 8, 5000)
    assert allocations.largest >= 33 * 5000


@each_tiled_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_all_logits_are_never_held_at_once(backend, dtype, vocabulary) -> None:
    options = {"top_k": 32, "final_rows": torch.arange(33) % 11}
    allocations, _ = watched(backend, 33, 8, vocabulary, dtype=dtype, **options)
    assert allocations.largest <= 33 * vocabulary // 8


@each_tiled_backend
def test_memory_does_not_grow_with_the_vocabulary(backend) -> None:
    small, _ = watched(backend, 33, 8, 10000, top_k=5)
    large, _ = watched(backend, 33, 8, 100000, top_k=5)
    assert large.peak == small.peak


@each_tiled_backend
@pytest.mark.parametrize("workspace", [1, 2])
@pytest.mark.parametrize("asked", ["look-ups", "top-k", "a few final rows", "as many final rows as rows"])
def test_temporary_memory_fits_the_workspace(backend, workspace, asked) -> None:
    options: dict[str, Any] = {
        "look-ups": {},
        "top-k": {"top_k": 32},
        "a few final rows": {"final_rows": torch.arange(300) % 5},
        "as many final rows as rows": {"final_rows": torch.arange(300)},
    }[asked]
    allocations, readout = watched(backend, 300, 8, 5000, workspace_bytes=workspace * MIB, **options)
    assert allocations.peak <= workspace * MIB + output_bytes(readout)


@each_tiled_backend
def test_the_fp32_copy_of_a_half_precision_head_fits_the_workspace(backend) -> None:
    allocations, readout = watched(backend, 16, 512, 5000, dtype=torch.bfloat16, workspace_bytes=MIB)
    assert allocations.peak <= MIB + output_bytes(readout)


@each_tiled_backend
def test_copies_of_the_rows_fit_the_workspace(backend) -> None:
    allocations, readout = watched(backend, 4000, 128, 300, workspace_bytes=MIB)
    assert allocations.peak <= MIB + output_bytes(readout)


@each_tiled_backend
def test_nothing_but_the_outputs_outlives_the_call(backend) -> None:
    allocations, readout = watched(backend, 33, 8, 10000, top_k=5, final_rows=torch.arange(33) % 11)
    assert allocations.bytes == output_bytes(readout)


@pytest.mark.parametrize("backend", [*TILED, "reference"])
def test_trainable_weights_leave_no_trace_for_autograd(backend) -> None:
    """A model's parameters ask for gradients; remembering every tile for them would hold all logits after all."""
    allocations, readout = watched(backend, 33, 8, 10000, trainable=True, top_k=5)
    assert not any(value.requires_grad for value in vars(readout).values() if isinstance(value, Tensor))
    assert allocations.bytes == output_bytes(readout)


def test_captured_rows_do_not_keep_their_block_alive() -> None:
    hidden = torch.randn(2, 5, 8, requires_grad=True) * 1.0
    out = torch.zeros(2, 8)
    capture(hidden, torch.tensor([[0, 1, 2], [1, 1, 4]]), out)
    storage = weakref.ref(hidden.untyped_storage())
    assert not out.requires_grad
    del hidden
    assert storage() is None
