"""The plan of a sweep: which models, on which questions, with which stages and resources.

A TOML file says it (docs/sweeps.md). ``plan.json`` in the sweep's folder holds the same with every default filled in
and every path absolute, so that another machine or another working directory reads the same plan.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from xprobe.arguments import check_least
from xprobe.attribution.settings import RelevanceSettings
from xprobe.config import STAGE_COMMANDS, Execution, StudyConfig, check_probes
from xprobe.errors import UsageError
from xprobe.lenses.settings import LensesSettings
from xprobe.phases.patch_settings import PatchSettings
from xprobe.runs.disk import read_file
from xprobe.runs.places import in_folder, lens_in_folder
from xprobe.scoring.settings import AnswerSettings, OracleSettings

FORMAT = 1  # of plan.json
ROLES = ("base", "post-trained")

# later stage -> the class of its settings, in the order in which they are computed
STAGE_SETTINGS: dict[str, type] = dict(
    zip(STAGE_COMMANDS, (AnswerSettings, OracleSettings, RelevanceSettings, PatchSettings, LensesSettings), strict=True)
)
_PER_MODEL = ("dtype", "template", "lens")  # what one model may have of its own; questions are the same for all
_INFINITE = float("inf")
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
          "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What the run of one model takes.

    Attributes
    ----------
    memory : int, optional
        Bytes of main memory. Engines place the run by it, and on Linux the run cannot take more. None: the forecast
        places the run, and nothing limits it.
    gpus : float
        GPUs of a run, for Ray and Slurm.
    gpu_memory : int, optional
        Bytes of the GPU, if the machine that plans the sweep has none to ask.
    cpus : int, optional
        CPU threads of a run. None: those of this machine, divided by the number of runs at the same time.
    hours : float, optional
        Slurm's time limit of a run. None: what ``[slurm]`` says, or 24.
    """

    memory: int | None = None
    gpus: float = 0
    gpu_memory: int | None = None
    cpus: int | None = None
    hours: float | None = None


@dataclass(frozen=True)
class SweepModel:
    """One run of a sweep.

    Attributes
    ----------
    name : str
        Of its run folder, and in all tables.
    study : StudyConfig
    execution : Execution
    resources : Resources
    role : str, optional
        ``base`` or ``post-trained``.
    base : str, optional
        Name of the model in this sweep that it was post-trained from.
    size : float, optional
        Number of parameters. None: the forecast counts them.
    """

    name: str
    study: StudyConfig
    execution: Execution = field(default_factory=Execution)
    resources: Resources = field(default_factory=Resources)
    role: str | None = None
    base: str | None = None
    size: float | None = None


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep, and the stages that each of them gets.

    Attributes
    ----------
    models : tuple of SweepModel
    stages : dict of str to dict
        Later stage -> the settings that the file gives; in the order of computation.
    retries : int
        How often a run is started again after its process was killed.
    slurm : dict
        Parameters that submitit gets as they are: ``slurm_partition``, ``slurm_account``, ...
    """

    models: tuple[SweepModel, ...]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    retries: int = 2
    slurm: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> SweepModel:
        for model in self.models:
            if model.name == name:
                return model
        raise UsageError(f"this sweep has no model {name!r}; it has {', '.join(model.name for model in self.models)}")

    def settings_of(self, stage: str) -> Any:
        """The settings object of a later stage."""
        return STAGE_SETTINGS[stage](**self.stages[stage])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``plan.json``."""
        models = [
            {**vars(model), "study": model.study.to_dict(), "execution": model.execution.to_dict(),
             "resources": asdict(model.resources)}
            for model in self.models
        ]  # fmt: skip
        return {"format": FORMAT, **vars(self), "models": models}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepPlan:
        """The inverse of ``to_dict``.

        Raises
        ------
        UsageError
            Another version of xprobe wrote it.
        """
        if values.get("format") != FORMAT:
            raise UsageError(f"the plan has format {values.get('format')!r}, this version of xprobe reads {FORMAT}")
        models = tuple(
            SweepModel(
                **{
                    **model,
                    "study": StudyConfig.from_dict(model["study"]),
                    "execution": Execution.from_dict(model["execution"]),
                    "resources": Resources(**model["resources"]),
                }
            )
            for model in values["models"]
        )
        return cls(models, dict(values["stages"]), values["retries"], dict(values["slurm"]))


def read_plan(path: str | Path) -> SweepPlan:
    """The plan in a TOML file. Relative paths in it start at the file's folder.

    Raises
    ------
    UsageError
        The file is missing or no TOML, or an entry is unknown or wrong: names the file and the entry.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "two.toml").write_text('stages = ["answers"]\\n[study]\\nlimit = 4\\n[[models]]\\n'
    ...     'model = "org/one-7b"\\n[[models]]\\nmodel = "org/one-7b-chat"\\nbase = "one-7b"\\nmemory = "2 GiB"\\n')
    >>> plan = read_plan(folder / "two.toml")
    >>> [model.name for model in plan.models], plan["one-7b"].role, plan["one-7b-chat"].resources.memory
    (['one-7b', 'one-7b-chat'], 'base', 2147483648)
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is no file: name the TOML file of a sweep (docs/sweeps.md), or a sweep's folder")
    try:
        values = tomllib.loads(read_file(path).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML file: {error}") from error
    try:
        return _plan(values, path.resolve().parent)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _plan(values: dict[str, Any], folder: Path) -> SweepPlan:
    tables = ("study", "execution", "resources", "slurm", *STAGE_SETTINGS)
    _check_known("", values, ("models", "stages", "retries", *tables))
    for name in tables:
        _check_table(name, values.get(name, {}))
    study, execution = dict(values.get("study", {})), values.get("execution", {})
    if "model" in study:
        raise UsageError("study.model: each [[models]] table names its model")
    _check_known("study", study, _names(StudyConfig))
    _check_known("execution", execution, _names(Execution))
    stages = values.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, str) for stage in stages):
        raise UsageError(f"stages must be a list of names, got {stages!r}")
    for stage in stages:
        if stage not in STAGE_SETTINGS:
            raise UsageError(f"unknown stage {stage!r}; known: {', '.join(STAGE_SETTINGS)}")
    for stage in STAGE_SETTINGS:
        if stage in values and stage not in stages:
            raise UsageError(f"[{stage}] has settings of a stage that stages does not name: add {stage!r} to stages")
    entries = values.get("models", [])
    if not isinstance(entries, list) or not entries:
        raise UsageError("names no model: write one [[models]] table for each, with model = NAME")
    shared = {**study, **{name: in_folder(study[name], folder) for name in ("data", "template") if name in study}}
    models = [_model(number, entry, shared, execution, values.get("resources", {}), folder)
              for number, entry in enumerate(entries, 1)]  # fmt: skip
    plan = SweepPlan(
        _with_roles(models),
        {stage: _stage(values.get(stage, {}), folder) for stage in STAGE_SETTINGS if stage in stages},
        values.get("retries", 2),
        dict(values.get("slurm", {})),
    )
    check_least("retries", plan.retries, 0)
    for key, value in plan.slurm.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(f"slurm: {key} must be of texts and finite numbers, got {value!r}") from error
    for stage, given in plan.stages.items():
        _check_known(stage, given, _names(STAGE_SETTINGS[stage]))
        plan.settings_of(stage)
    return plan


def _stage(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a later stage, with absolute paths of lenses."""
    names = given.get("lenses")
    if names is None:
        return dict(given)
    found = (
        [lens_in_folder(name, folder) for name in names] if isinstance(names, list) else lens_in_folder(names, folder)
    )
    return {**given, "lenses": found}


def _model(
    number: int, entry: Any, study: dict[str, Any], execution: dict[str, Any], resources: dict[str, Any], folder: Path
) -> SweepModel:
    where = f"models, table {number}"
    _check_table(where, entry)
    if not isinstance(entry.get("model"), str) or not entry["model"]:
        raise UsageError(f"{where}: model must be a text: a Hugging Face id, a local folder or a .gguf file")
    own = ("name", "model", "role", "base", "size")
    _check_known(where, entry, (*own, *_PER_MODEL, *_names(Execution), *_names(Resources)))
    name = entry.get("name", re.sub(r"[^\w.-]+", "-", entry["model"].rstrip("/").rpartition("/")[2]))
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UsageError(f"{where}: name must be letters, digits, '.', '_' and '-', for a folder; got {name!r}")
    chosen = {key: in_folder(entry[key], folder) for key in _PER_MODEL if key in entry}
    study = {**study, **chosen}
    if "lens" in study:
        study["lens"] = lens_in_folder(study["lens"], folder)
    config = StudyConfig(**{**study, "model": in_folder(entry["model"], folder)})
    check_probes(config.probes or ())
    given = {key: entry[key] for key in _names(Execution) if key in entry}
    trust: dict[str, Any] = {key: execution[key] for key in ("trust_remote_code", "allow_pickle") if key in execution}
    how = Execution(**execution).resumed_with({**trust, **given})
    if how.tensor_parallel:
        raise UsageError(f"{name}: tensor_parallel needs torchrun, which a sweep does not start: use device_map")
    size = None if "size" not in entry else _number(f"{name}: size", entry["size"])
    role, base = entry.get("role"), entry.get("base")
    if role is not None and role not in ROLES:
        raise UsageError(f"{name}: unknown role {role!r}; known: {', '.join(ROLES)}")
    demands = _resources(name, {**resources, **{key: entry[key] for key in _names(Resources) if key in entry}})
    return SweepModel(name, config, how, demands, role, base, size)


def _resources(name: str, given: dict[str, Any]) -> Resources:
    _check_known("resources", given, _names(Resources))
    values = dict(given)
    for key in ("memory", "gpu_memory"):
        if key in values:
            values[key] = _bytes(f"{name}: {key}", values[key])
    for key in ("gpus", "hours"):
        value = values.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _INFINITE:
            raise UsageError(f"{name}: {key} must be a number of at least 0, got {value!r}")
    if "cpus" in values:
        check_least(f"{name}: cpus", values["cpus"], 1)
    return Resources(**values)


def _with_roles(models: list[SweepModel]) -> tuple[SweepModel, ...]:
    """The models with the roles that ``base`` implies. Checks that names differ and bases are there."""
    names = [model.name for model in models]
    folders = [name.casefold() for name in names]  # some file systems do not tell case apart
    for name in names:
        if folders.count(name.casefold()) > 1:
            raise UsageError(f"two models are called {name}, in any case: give each its own name = ...")
    bases = {model.base for model in models} - {None}
    found = []
    for model in models:
        implied = "post-trained" if model.base else "base" if model.name in bases else None
        if model.base is not None and (model.base not in names or model.base == model.name):
            raise UsageError(f"{model.name}: base must be the name of another model here, got {model.base!r}")
        if model.name in _bases(model, models):
            raise UsageError(f"{model.name}: its base was itself post-trained from {model.name}: leave out one base")
        if model.role not in (None, implied) and implied is not None:
            raise UsageError(f"{model.name}: role {model.role!r} contradicts base, which makes it {implied!r}")
        found.append(replace(model, role=model.role or implied))
    return tuple(found)


def _bases(model: SweepModel, models: list[SweepModel]) -> list[str]:
    """The base of a model, the base of that, and so on, each of them once."""
    base_of = {one.name: one.base for one in models}
    found: list[str] = []
    base = model.base
    while base is not None and base not in found:
        found.append(base)
        base = base_of.get(base)
    return found


def _names(kind: type) -> tuple[str, ...]:
    return tuple(entry.name for entry in fields(kind))


def _check_table(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a table, got {value!r}")


def _check_known(where: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in values:
        if name not in known:
            place = f"{where}: " if where else ""
            raise UsageError(f"{place}unknown entry {name!r}; known: {', '.join(known)}")


def _number(what: str, value: Any) -> float:
    """A count such as 135000000, "135M" or "7B"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBT]?)", value.strip().upper()) if isinstance(value, str) else None
    if found and float(found[1]):
        return float(found[1]) * _UNITS[found[2]]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _INFINITE:
        raise UsageError(f'{what} must be a number of parameters, such as 135_000_000 or "7B", got {value!r}')
    return float(value)


def _bytes(what: str, value: Any) -> int:
    """Bytes such as 2_000_000_000, "2 GB" or "900 MiB"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)", value.strip().upper()) if isinstance(value, str) else None
    if found and float(found[1]):
        return int(float(found[1]) * _BYTES[found[2]])
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UsageError(f'{what} must be a number of bytes, such as "2 GiB" or "900 MB", got {value!r}')
    return value


def plan_text(plan: SweepPlan) -> bytes:
    """``plan.json``."""
    return json.dumps(plan.to_dict(), ensure_ascii=False, indent=1).encode("utf-8")
