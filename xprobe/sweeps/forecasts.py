"""What the runs of a sweep will take, from the configurations alone; and what to do where it does not fit."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from xprobe.errors import XprobeError
from xprobe.forecast import Forecast, forecast
from xprobe.runs.identity import checksum_of
from xprobe.sweeps.folder import FORECASTS, STATES, SweepFolder
from xprobe.sweeps.plan import SweepModel, SweepPlan

# Main memory of a process besides what the forecast counts: libraries, tables, and the checkpoint while it is read. The
# run of a model of 0.2 MB held 621 MB. A bf16 copy of the demo model, read into fp32, ran out of memory under a limit
# of 1,350 MB and not under 1,500 MB, where the forecast counts 642 MB.
PROCESS = 1_000_000_000
NO_GPU_DTYPE = "bfloat16"  # of a model that will run on a GPU, where the machine that plans has none


@dataclass(frozen=True)
class ModelForecast:
    """What one run will take.

    Attributes
    ----------
    parameters : int
    memory : int
        Bytes of main memory.
    gpu_memory : int
        Bytes of the GPU; 0 on a CPU.
    disk : int
        Bytes in the run folder.
    seconds : float or None
        Of the stage ``states``, without loading, at the speed of this machine. None if the run is for another kind.
    examples, tokens : int
        Examples, and tokens that are run.
    device, dtype : str
    stream : bool
        Whether weights are read block by block.
    key : str
        Checksum of what the forecast is of.
    stage_seconds : dict of str to float
        Of the later stages, answers at their longest. Empty on a GPU, where they were not measured well enough.
    """

    parameters: int
    memory: int
    gpu_memory: int
    disk: int
    seconds: float | None
    examples: int
    tokens: int
    device: str
    dtype: str
    stream: bool
    key: str = ""
    stage_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total_seconds(self) -> float | None:
        """Of the states and the later stages; None where that of the states is."""
        return None if self.seconds is None else self.seconds + sum(self.stage_seconds.values())


@dataclass(frozen=True)
class Room:
    """What the runs may take. None: not known.

    Attributes
    ----------
    memory, gpu_memory : int or None
        Bytes for one run.
    disk : int or None
        Bytes for all runs.
    """

    memory: int | None = None
    gpu_memory: int | None = None
    disk: int | None = None


@dataclass
class Outlook:
    """The forecasts of a sweep, and what follows from them.

    Attributes
    ----------
    forecasts : dict of str to ModelForecast
    streamed : dict of str to str
        Model -> why its weights are read block by block.
    refused, failed : dict of str to str
        Model -> why it does not fit; why its configuration cannot be used.
    unknown : dict of str to str
        Model -> why it has no forecast. It runs nevertheless.
    to_run : list of str
        Models that lack a stage, in the order of the plan.
    """

    forecasts: dict[str, ModelForecast] = field(default_factory=dict)
    streamed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    to_run: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def forecast_model(model: SweepModel, stages: Mapping[str, Any] | None = None) -> ModelForecast:
    """What the run of one model will take. Reads its configuration, its tokenizer and the questions, and no weights.

    Parameters
    ----------
    model : SweepModel
    stages : mapping of str to settings, optional
        The later stages.

    Raises
    ------
    XprobeError
        As the run itself would.
    """
    stages = stages or {}
    found = forecast(model.study, model.execution, stages)
    elsewhere = model.resources.gpus > 0 and found.device == "cpu"
    if elsewhere and model.study.dtype == "auto":
        found = forecast(replace(model.study, dtype=NO_GPU_DTYPE), model.execution)
    return _of(found, _key(model, stages), on_gpu=elsewhere or found.device != "cpu", known_speed=not elsewhere)


def _of(found: Forecast, key: str, *, on_gpu: bool, known_speed: bool) -> ModelForecast:
    held = sum(found.memory.values())
    return ModelForecast(
        parameters=found.parameters,
        memory=PROCESS + (0 if on_gpu else held),
        gpu_memory=held if on_gpu else 0,
        disk=sum(found.disk.values()),
        seconds=round(found.seconds, 1) if known_speed else None,
        examples=found.examples,
        tokens=found.tokens_run,
        device="gpu" if on_gpu else "cpu",
        dtype=found.dtype,
        stream=found.stream,
        key=key,
        stage_seconds={} if on_gpu else {name: round(value, 1) for name, value in found.stage_seconds.items()},
    )


def look_ahead(folder: SweepFolder, room: Room, show: Callable[[str], None] = lambda name: None) -> Outlook:
    """Forecasts all runs that are not finished, and decides which of them are streamed or refused.

    Forecasts are kept in the sweep's folder, and made again only where a model's study or execution has changed.

    Parameters
    ----------
    folder : SweepFolder
    room : Room
        What there is; ``memory`` and ``gpu_memory`` of a model in the sweep's file count before it.
    show : callable (name), optional
        Called before each forecast.
    """
    known, outlook = read_forecasts(folder.path), Outlook()
    disk = room.disk
    stages = {stage: folder.plan.settings_of(stage) for stage in folder.plan.stages}
    for model in folder.plan.models:
        name = model.name
        left = folder.left(name)
        if not left:
            if name in known:
                outlook.forecasts[name] = known[name]
            continue
        outlook.to_run.append(name)
        show(name)
        may_stream = STATES in left or folder.was_streamed(name)  # else only states would be left of its stages
        try:
            found = _look_at(model, stages, known.get(name), room, outlook, may_stream=may_stream)
        except XprobeError as error:
            outlook.failed[name] = str(error)
            continue
        except Exception as error:  # the run may be able to do what the forecast cannot
            outlook.unknown[name] = f"no forecast: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        outlook.forecasts[name] = found
        if disk is None or name in outlook.refused or STATES not in left:
            continue
        if found.disk > disk:
            outlook.refused[name] = (
                f"needs {size(found.disk)} on the disk, of which {size(disk)} are left after the models before it: "
                "make room, or use a folder on another disk (--out)"
            )
        else:
            disk -= found.disk
    values = {name: asdict(found) for name, found in outlook.forecasts.items()}
    folder.write(FORECASTS, json.dumps(values, indent=1).encode())
    return outlook


def streaming(plan: SweepPlan, outlook: Outlook) -> SweepPlan:
    """The plan, with ``stream`` for the models that fit in no other way."""
    return replace(plan, models=tuple(_streamed(model) if model.name in outlook.streamed else model
                                      for model in plan.models))  # fmt: skip


def _streamed(model: SweepModel) -> SweepModel:
    return replace(model, execution=replace(model.execution, stream=True))


def _look_at(
    model: SweepModel, stages: Mapping[str, Any], known: ModelForecast | None, room: Room, outlook: Outlook, *,
    may_stream: bool,
) -> ModelForecast:  # fmt: skip
    """One model's forecast: as it is or streamed. Notes in ``outlook`` what does not fit."""
    found = known if known is not None and known.key == _key(model, stages) else forecast_model(model, stages)
    lacking = _lacking(found, model, room)
    if lacking is None:
        return found
    if may_stream and not found.stream and model.execution.device_map is None:
        smaller = forecast_model(_streamed(model), stages)
        if _lacking(smaller, model, room) is None:
            outlook.streamed[model.name] = (
                f"{lacking}: its weights are read block by block, which takes "
                f"{size(smaller.gpu_memory or smaller.memory)}; only the stage lenses can be added to such a run"
            )
            return smaller
    outlook.refused[model.name] = f"{lacking}: give it more memory, or take a smaller model"
    return found


def _lacking(found: ModelForecast, model: SweepModel, room: Room) -> str | None:
    """What is too small for a run, in words; None if it fits."""
    for what, need, limits in (
        ("main memory", found.memory, (model.resources.memory, room.memory)),
        ("GPU memory", found.gpu_memory, (model.resources.gpu_memory, room.gpu_memory)),
    ):
        most = min((limit for limit in limits if limit is not None), default=None)
        if most is not None and need > most:
            return f"needs about {size(need)} of {what} and may take {size(most)}"
    return None


def read_forecasts(path: Path) -> dict[str, ModelForecast]:
    """The forecasts in a sweep's folder, by model; {} if there are none, or another version wrote them."""
    try:
        values: Mapping[str, Any] = json.loads((path / FORECASTS).read_bytes())
        return {name: ModelForecast(**entry) for name, entry in values.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def fitting(plan: SweepPlan, outlook: Outlook, room: Room, most: int) -> int:
    """How many runs fit on this machine at the same time, whichever they are; at least 1, at most ``most``.

    Examples
    --------
    >>> found = ModelForecast(1, 4_000_000_000, 0, 1, 1.0, 1, 1, "cpu", "float32", False)
    >>> outlook = Outlook({"a": found, "b": found, "c": found}, to_run=["a", "b", "c"])
    >>> fitting(SweepPlan(()), outlook, Room(memory=9_000_000_000), most=8)
    2
    """
    names = [name for name in outlook.to_run if name in outlook.forecasts and name not in outlook.refused]
    limits = {model.name: model.resources for model in plan.models}
    count = min(most, len(names))
    for of, total in (("memory", room.memory), ("gpu_memory", room.gpu_memory)):
        needs = sorted(
            (max(getattr(outlook.forecasts[name], of), getattr(limits.get(name), of, None) or 0) for name in names),
            reverse=True,
        )
        while total is not None and count > 1 and sum(needs[:count]) > total:
            count -= 1
    return max(1, count)


def room_here(path: Path) -> Room:
    """What this machine has free: main memory, memory of its smallest GPU, and disk under ``path``."""
    import torch

    memory = None
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        memory = int(found[1]) * 1024 if found else None
    except OSError:
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    gpu_memory = min((torch.cuda.mem_get_info(card)[0] for card in cards), default=None)
    return Room(memory, gpu_memory, shutil.disk_usage(path).free)


def size(count: float) -> str:
    """Bytes in words.

    Examples
    --------
    >>> size(642_000_000), size(1.34e9), size(900)
    ('642 MB', '1.34 GB', '900 bytes')
    """
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count:.0f} bytes"


def _key(model: SweepModel, stages: Mapping[str, Any]) -> str:
    study, execution = model.study.to_dict(), model.execution.to_dict()
    later = {stage: asdict(settings) for stage, settings in stages.items()}
    return checksum_of({"study": study, "execution": execution, "gpus": model.resources.gpus, "stages": later})
