"""Copies between main memory and a device that do not make the host wait."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on(device: torch.device) -> AbstractContextManager[None]:
    """Makes ``device`` the current device, on which kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to ``device`` without waiting. The copy is queued behind the work of the current stream.

    A copy from ordinary memory would wait for that work. So the tensor is first copied to page-locked memory, which
    torch's allocator keeps until the copy to the device is done.

    Examples
    --------
    >>> import torch
    >>> from xprobe_kernels.transfer import upload
    >>> upload(torch.tensor([1, 2]), torch.device("cpu")).tolist()
    [1, 2]
    """
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return page_locked(tensor).to(device, non_blocking=True)


def page_locked(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor in page-locked memory, which a GPU reads without the host."""
    return tensor.pin_memory()


class HostCopy:
    """Copies of tensors to main memory that are made in the background. The device goes on with later work.

    Later work of the same stream may overwrite ``tensors`` on the device, because the copies are made before it.

    Examples
    --------
    >>> import torch
    >>> from xprobe_kernels.transfer import HostCopy
    >>> rows = torch.ones(2)
    >>> copy = HostCopy({"rows": rows})
    >>> _ = rows.zero_()
    >>> copy.wait()["rows"].tolist()
    [1.0, 1.0]
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        on_gpu = next((tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"), None)
        # a tensor in main memory is copied too, because its owner may overwrite it
        self._tensors = {
            name: tensor.to("cpu", non_blocking=True) if tensor.device.type == "cuda" else tensor.clone()
            for name, tensor in tensors.items()
        }
        self._event = None
        if on_gpu is not None:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(on_gpu))

    def wait(self) -> dict[str, Tensor]:
        """Waits for the copies and returns them by name."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
