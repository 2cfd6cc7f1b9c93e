"""What a call of the kernels costs before the GPU works: launches, other GPU operations, and processor time.

    python benchmarks/host_time.py

It needs no GPU. A driver that does nothing stands in for CUDA: Triton compiles the kernels for an H100, and each launch
goes through Triton's own launch code up to the call of CUDA itself. Tensors lie on the CPU. So the times are those of
Python alone: xprobe's checks and allocations, and Triton's launch code. Calls with many rows are not timed: there the
GPU works for many milliseconds, and torch would copy rows on the CPU.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import click
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

ARCHITECTURE, PROCESSORS = "sm_90", 132
WIDTH, VOCABULARY, LAYERS = 4096, 128256, 33  # Llama-3-8B
MANY_ROWS = 33 * 512
NO_LAUNCH = ("empty", "slice", "select", "unbind", "view", "promote_types", "alias", "detach", "transpose", "permute")


class _Utilities:
    """Loads kernels into nothing."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": PROCESSORS, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return name, name, 0, 0, 1024


class Driver:
    """Stands in for CUDA: launches are counted by the name of the kernel and not executed."""

    def __init__(self) -> None:
        self.utils = _Utilities()
        self.launched: Counter[str] = Counter()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """A launcher, as Triton asks for one per compiled kernel."""
        name, launched = source.fn.__name__, self.launched

        def launch(*arguments: Any) -> None:
            launched[name] += 1

        return launch


class CountOperations(TorchDispatchMode):
    """Counts operations of torch that would start work on a GPU: not views, and not memory without content."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.count += not name.startswith(NO_LAUNCH)
        return function(*args, **(kwargs or {}))


def calls() -> dict[str, Callable[[], Any]]:
    """The calls to measure, by a description."""
    from xprobe_kernels import Unembedding, triton_capture, triton_lens, triton_readout
    from xprobe_kernels.request import LensRequest

    triton_lens.device_limits = triton_readout.device_limits = lambda device: (ARCHITECTURE, PROCESSORS)
    dtype = torch.bfloat16
    head = Unembedding(torch.zeros(VOCABULARY, WIDTH, dtype=dtype), norm="rms", gamma=torch.ones(WIDTH, dtype=dtype))

    def lens(rows: int, top_k: int = 0, with_kl: bool = False) -> Callable[[], Any]:
        hidden, lookup = torch.zeros(rows, WIDTH, dtype=dtype), torch.zeros(rows, 1, dtype=torch.int64)
        positions = rows // LAYERS
        final_rows = torch.arange(rows) % positions + rows - positions if with_kl else None
        request = LensRequest(hidden, head, lookup, top_k, final_rows)
        return lambda: triton_readout.readout(request)

    states, spans = torch.zeros(8, 512, WIDTH, dtype=dtype), torch.tensor([[i % 8, i, i + 1] for i in range(96)])
    kept = torch.empty(96, WIDTH, dtype=dtype)
    few = LAYERS * 3
    return {
        f"lens, {few} rows": lens(few),
        f"lens, {few} rows, top 5": lens(few, 5),
        f"lens, {few} rows, KL": lens(few, with_kl=True),
        f"lens, {MANY_ROWS} rows": lens(MANY_ROWS),
        f"lens, {MANY_ROWS} rows, top 5": lens(MANY_ROWS, 5),
        f"lens, {MANY_ROWS} rows, KL": lens(MANY_ROWS, with_kl=True),
        "capture, 96 single rows": lambda: triton_capture.capture_rows(states, spans, kept, None),
    }


def measure(call: Callable[[], Any], driver: Driver, rounds: int) -> dict[str, Any]:
    """Launches, other operations and the median time of one call, after a first one that compiles."""
    call()
    driver.launched.clear()
    with CountOperations() as operations:
        call()
    launches = dict(driver.launched)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    microseconds = round(1e6 * statistics.median(seconds), 1) if seconds else None
    return {"launches": launches, "operations": operations.count, "microseconds": microseconds}


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--rounds", default=200, show_default=True, help="Calls to time.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(rounds: int, out: Path | None) -> None:
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    results = {}
    for name, call in calls().items():
        result = results[name] = measure(call, driver, 0 if str(MANY_ROWS) in name else rounds)
        kernels, cost = sum(result["launches"].values()), result["microseconds"]
        timed = "" if cost is None else f"  {cost:7.1f} us"
        click.echo(f"{name:24}  {kernels:3} launches  {result['operations']:3} other operations{timed}")
    if out is not None:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        out.write_text(json.dumps({"versions": versions, "target": ARCHITECTURE, "calls": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
