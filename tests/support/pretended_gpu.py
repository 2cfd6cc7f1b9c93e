"""A GPU that is not there: tensors that say they are on one, kept in main memory, and a record of who waited for it.

What the code does on a GPU (which branches it takes, in what order it reads what) can so be tested on any machine, with
Triton's kernels in the interpreter. Copies to main memory that do not wait hold rubbish until their event was waited
for. It says nothing of speed, of races or of the compiler.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

GPU = torch.device("cuda:0")
# operations whose result depends on numbers that the host must read first
WAITING = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "unique",
    "unique_consecutive",
    "unique_dim",
    "repeat_interleave.Tensor",
    "_unique2",
    "masked_select",
    "equal",
    "is_nonzero",
    "bincount",
)
SORTS = ("cuda", "meta")  # what Python calls it, and what torch does
RUBBISH = 77


class OnGpu(torch.Tensor):
    """A tensor whose numbers are in ``inner``, in main memory. Inside torch it is on the meta device, which needs no
    driver; Python sees a GPU."""

    inner: torch.Tensor
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        with torch.inference_mode(False):  # as a view of a tensor that knows of gradients it must know of them too
            self = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device="meta",
            )  # fmt: skip
        self.inner = inner
        return self

    def tolist(self) -> Any:
        """Through main memory: torch refuses it for its subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _CURRENT is not None, "a pretended GPU is used outside of its context"
        return _CURRENT.run(func, args, kwargs or {})


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0

    def record(self, stream: Any = None) -> None:
        assert _CURRENT is not None
        self.at = len(_CURRENT.copies)

    def synchronize(self) -> None:
        assert _CURRENT is not None
        if threading.current_thread() is threading.main_thread():
            _CURRENT._waited("event")
        for target, source in _CURRENT.copies[: self.at]:
            target.copy_(source)

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Current(nullcontext):
    """Stands in for torch.cuda.device."""


class PretendedGpu(TorchDispatchMode):
    """``waits``: operations that would have made the host wait, with their place in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.operations = self.launches = 0
        self.locked: set[int] = set()  # where page-locked memory begins

    def lock(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        self.locked.add(copy.data_ptr())
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(isinstance(leaf, OnGpu) for leaf in leaves)
        name = str(func).removeprefix("aten.")
        wanted = next(
            (leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)), None
        )
        to_gpu = wanted is not None and wanted.type in SORTS
        moves = name.startswith(("_to_copy.", "to."))
        waits = not (kwargs.get("non_blocking") or (name == "to.device" and len(args) > 3 and args[3]))
        self.operations += there or to_gpu
        if moves and there and wanted is not None and not to_gpu:
            return self._to_host(args[0], kwargs, waits)
        if moves and to_gpu and not there and waits:
            self._waited(f"{name} to the GPU of {list(args[0].shape)}")
        if name.startswith("copy_.") and isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu):
            self._waited(f"{name} between memories")
        if there and any(name == word or name.startswith(f"{word}.") for word in WAITING):
            self._waited(name)
        if name.startswith("index") and there:
            indices = [i for i in args[1] if isinstance(i, torch.Tensor)] if isinstance(args[1], list | tuple) else []
            if any(i.dtype == torch.bool for i in indices):
                self._waited(f"{name} by a mask")
            if any(not isinstance(i, OnGpu) for i in indices):
                self._waited(f"{name} by indices in main memory")
        others = [
            leaf for leaf in leaves if not isinstance(leaf, OnGpu) and leaf.dim() and not name.startswith("index")
        ]
        if there and others and not moves and not name.startswith(("copy_.", "detach", "set_")):
            self._waited(f"{name} of tensors in two memories")
        if moves and to_gpu and not there and not waits and args[0].data_ptr() not in self.locked:
            self._waited(f"{name} to the GPU from pageable memory")
        plain, named = tree_map(inner, args), tree_map(inner, dict(kwargs))
        if name == "mm.dtype":  # the CPU does not know it
            found: Any = torch.mm(plain[0].float(), plain[1].float())
        elif name == "mm.dtype_out":
            found = torch.mm(plain[0].float(), plain[1].float(), out=named["out"])
        elif name.startswith("_scaled_dot_product_efficient_attention."):  # nor this
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *plain[:3], *plain[5:], scale=named["scale"]
            )
        else:
            found = func(*plain, **named)
        if not (there or to_gpu):
            return found
        ours = {id(leaf.inner): leaf for leaf in leaves if isinstance(leaf, OnGpu)}  # of what was changed in place
        return tree_map(lambda t: ours.get(id(t), OnGpu(t)) if isinstance(t, torch.Tensor) else t, found)

    def _to_host(self, tensor: OnGpu, kwargs: dict[str, Any], waits: bool) -> torch.Tensor:
        source = tensor.inner.to(kwargs.get("dtype") or tensor.dtype, copy=True)
        if waits:
            self._waited(f"copy to main memory of {list(tensor.shape)}")
            return source
        target = torch.full_like(source, RUBBISH)
        self.copies.append((target, source))
        return target

    def _waited(self, what: str) -> None:
        import traceback

        ours = [
            f
            for f in traceback.extract_stack()
            if "/xprobe" in f.filename and "pretended" not in f.filename and "site-packages" not in f.filename
        ]  # a checkout may lie in a folder named xprobe
        self.waits.append(f"{what} at {ours[-1].filename.rsplit('/', 1)[-1]}:{ours[-1].lineno}" if ours else what)


_CURRENT: PretendedGpu | None = None


def inner(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type in SORTS:
        return torch.device("cpu")
    return value.inner if isinstance(value, OnGpu) else value


class Interpreted:
    """A Triton kernel that is launched on what is inside of pretended tensors."""

    def __init__(self, kernel: Any, gpu: PretendedGpu) -> None:
        self.kernel, self.gpu = kernel, gpu

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.gpu.launches += 1
            with torch.utils._python_dispatch._disable_current_modes():
                self.kernel[grid](*map(inner, args), **{k: inner(v) for k, v in options.items()})

        return launch


@contextmanager
def pretended_gpu(monkeypatch: Any) -> Iterator[PretendedGpu]:
    """Inside, ``device="cuda"`` works; the kernels run in the interpreter."""
    global _CURRENT
    from xprobe_kernels import transfer, triton_attention, triton_capture, triton_lens, triton_rows, workspace
    from xprobe_kernels import triton_continued as continued

    from xprobe.models.streaming.streamed import StreamedModel

    gpu, load = PretendedGpu(), StreamedModel.load

    def load_there(self: StreamedModel, block: int) -> None:
        with gpu:  # blocks are read by a thread of their own, and a mode is a thread's
            load(self, block)

    with monkeypatch.context() as patch:
        for module, name in (
            (triton_attention, "tree_attention_kernel"), (continued, "continued_attention_kernel"),
            (triton_capture, "capture_kernel"),
            (triton_lens, "lens_kernel"), (triton_rows, "prepare_kernel"), (triton_rows, "merge_kernel"),
            (workspace, "row_kernel"),
        ):  # fmt: skip
            patch.setattr(module, name, Interpreted(getattr(module, name), gpu))
        patch.setattr(StreamedModel, "load", load_there)
        patch.setattr(triton_lens, "device_limits", lambda device: ("interpreter", 3))
        patch.setattr(torch.cuda, "device", Current)
        patch.setattr(transfer, "page_locked", gpu.lock)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        _CURRENT = gpu
        try:
            with gpu:
                yield gpu
        finally:
            _CURRENT = None


def to_gpu(model: Any) -> Any:
    """Moves a model's parameters and buffers to the pretended GPU."""
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fresh = torch.nn.Parameter(OnGpu(value.detach()), requires_grad=False)
                module._parameters[name] = moved.setdefault(id(value), fresh)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer.detach())
    return model
