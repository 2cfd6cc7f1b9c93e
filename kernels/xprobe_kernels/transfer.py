"""Between main memory and a device without making either wait for the other."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on(device: torch.device) -> AbstractContextManager[None]:
    """Kernels are launched on the current device: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, copied in line with the work that it was given; the host does not wait.

    Copies from ordinary memory would wait for all of that work first; page-locked memory is kept by torch's allocator
    until the copy is done.
    """
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return page_locked(tensor).to(device, non_blocking=True)


def page_locked(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor in memory that a GPU reads by itself."""
    return tensor.pin_memory()


class HostCopy:
    """Tensors on their way to main memory; the device goes on with what comes after them.

    ``tensors`` may be overwritten on the device by later work of the same stream: the copies come before it.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        on_gpu = next((tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"), None)
        # what is in main memory already is copied too: its owner overwrites it
        self._tensors = {
            name: tensor.to("cpu", non_blocking=True) if tensor.device.type == "cuda" else tensor.clone()
            for name, tensor in tensors.items()
        }
        self._event = None
        if on_gpu is not None:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(on_gpu))

    def wait(self) -> dict[str, Tensor]:
        """The tensors in main memory, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
