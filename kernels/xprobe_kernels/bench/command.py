"""``Settings`` (what to measure) and ``measure``, which both command lines call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from xprobe_kernels import readout
from xprobe_kernels.bench import capture_speed, lens_speed, rivals, table
from xprobe_kernels.bench.baselines import DTYPES
from xprobe_kernels.bench.environment import environment
from xprobe_kernels.bench.measure import clock
from xprobe_kernels.bench.shapes import CPU, GPU, HEADS, QUICK, REGIMES, SMALL, Head, Work, work

SCHEMA = 1
LENS, CAPTURE, RIVALS, ALL = "lens", "capture", "rivals", "all"
KERNELS = (LENS, CAPTURE)
SECONDS = {"cpu": 8.0, "cuda": 4.0}  # of timing per shape, if the number of rounds is not given


class SettingsError(ValueError):
    """A setting is wrong. Nothing was measured."""


@dataclass(frozen=True)
class Settings:
    """What to measure. ``None``: the default depends on the device."""

    kernel: str = LENS
    shape: str | None = None  # a name of HEADS, or all
    rows: str = ALL  # many, few or all
    rounds: int | None = None
    dtype: str = "bfloat16"
    backends: tuple[str, ...] = ()  # none: all but the reference
    device: str = "auto"
    threads: int | None = None
    quick: bool = False
    kl: bool = False
    rivals: bool = False  # measure other projects' kernels and the lens at their task, instead of the kernel

    @property
    def measured(self) -> tuple[str, ...]:
        """The parts of the result that will not be empty."""
        if self.rivals:
            return (RIVALS,)
        return KERNELS if self.kernel == ALL else (self.kernel,)

    def check(self) -> None:
        """Raises ``SettingsError`` naming the setting, its value and what was expected."""
        if self.kernel == "run":
            raise SettingsError("kernel run is not available yet: choose lens, capture or all")
        _one_of("kernel", self.kernel, (*KERNELS, ALL))
        if self.rivals and (self.kernel != LENS or self.kl):
            raise SettingsError("rivals are measured at their own task: leave out kernel and kl")
        if self.shape is not None:
            _one_of("shape", self.shape, (*HEADS, ALL))
        _one_of("rows", self.rows, (*REGIMES, ALL))
        _one_of("dtype", self.dtype, tuple(DTYPES))
        for name in ("rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1, got {value}")
        device = self.torch_device()
        for name in self.backends:
            _one_of("backend", name, tuple(measured_backends(device)))

    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise SettingsError(f"device must be a torch device such as cpu or cuda, got {self.device!r}") from error
        if device.type not in ("cpu", "cuda"):
            raise SettingsError(f"device must be cpu or cuda, got {self.device!r}")
        if device.type == "cuda" and not (
            torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        ):
            raise SettingsError(f"device {self.device!r} does not exist: torch sees {torch.cuda.device_count()} GPUs")
        return device

    def heads(self) -> list[Head]:
        if self.shape is not None and self.shape != ALL:
            return [HEADS[self.shape]]
        small = self.shape is None and self.torch_device().type == "cpu"
        return [head for head in HEADS.values() if not small or head.name in SMALL]

    def works(self) -> list[Work]:
        device, regimes = self.torch_device(), REGIMES if self.rows == ALL else (self.rows,)
        limits = QUICK if self.quick else CPU if device.type == "cpu" else GPU
        itemsize = getattr(torch, self.dtype).itemsize
        free = clock(device).free()
        return [work(head, regime, limits, free, itemsize) for head in self.heads() for regime in regimes]


def measure(settings: Settings, show: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measures everything that the settings ask for. Returns a dictionary ready for JSON.

    ``show`` is called with the text of each part as soon as it is measured.

    Raises
    ------
    SettingsError
        Names the setting, its value and what was expected.
    """
    settings.check()
    show = show or (lambda text: None)
    before = torch.get_num_threads()
    try:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        with torch.inference_mode():
            return _measure(settings, show)
    finally:
        torch.set_num_threads(before)


def _measure(settings: Settings, show: Callable[[str], None]) -> dict[str, Any]:
    device = settings.torch_device()
    result: dict[str, Any] = {
        "benchmark": "xprobe bench",
        "schema": SCHEMA,
        "environment": environment(device),
        "settings": asdict(settings),
        "lens": [],
        "capture": [],
        "rivals": [],
    }
    show(table.head_text(result["environment"]))
    if LENS in settings.measured:
        for part in _lens(settings, device):
            result["lens"].append(part)
            show("\n" + table.lens_text(part))
        show("\n" + table.LENS_LEGEND)
    if CAPTURE in settings.measured:
        for part in _capture(settings, device):
            result["capture"].append(part)
            show("\n" + table.capture_text(part))
        show("\n" + table.CAPTURE_LEGEND)
    if RIVALS in settings.measured:
        for part in _rivals(settings, device):
            result["rivals"].append(part)
            show("\n" + table.rivals_text(part))
        show("\n" + table.RIVALS_LEGEND)
    return result


def _seconds(settings: Settings, device: torch.device) -> float:
    return 0.5 if settings.quick else SECONDS[device.type]


def _lens(settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    for each in settings.works():
        yield lens_speed.compare(
            each,
            device=device,
            dtype=getattr(torch, settings.dtype),
            backends=list(settings.backends) or measured_backends(device),
            rounds=settings.rounds,
            seconds=_seconds(settings, device),
            kl=settings.kl,
            quick=settings.quick,
        )


def _rivals(settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    for each in settings.works():
        yield rivals.compare(
            each,
            device=device,
            dtype=getattr(torch, settings.dtype),
            backends=list(settings.backends) or measured_backends(device),
            rounds=settings.rounds,
            seconds=_seconds(settings, device),
            quick=settings.quick,
        )


def _capture(settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    for head in settings.heads():
        for case in (capture_speed.POSITIONS, capture_speed.SPANS):
            yield capture_speed.compare(
                head,
                case,
                device=device,
                dtype=getattr(torch, settings.dtype),
                rounds=settings.rounds,
                seconds=min(_seconds(settings, device), 1.0),
                quick=settings.quick,
            )


def measured_backends(device: torch.device) -> list[str]:
    """The backends whose speed matters on ``device``.

    The reference is left out everywhere. The kernels are measured on a GPU only, because the interpreter's speed is not
    meaningful. The CPU backends are measured on a GPU only if there are no kernels.
    """
    names = [name for name in readout.available_backends(device) if name != "reference"]
    kernels = [name for name in names if name in readout.KERNELS and device.type != "cpu"]
    return kernels or [name for name in names if name not in readout.KERNELS]


def _one_of(name: str, value: str, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise SettingsError(f"{name} must be one of {', '.join(expected)}, got {value!r}")
