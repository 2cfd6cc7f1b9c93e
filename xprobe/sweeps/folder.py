"""The folder of a sweep: the plan, one run folder for each model, and the last news of each run.

What is done is read from the run folders alone. A status file says only what a run folder cannot: what a process is
doing, and why it failed. Without the status files the same runs are left to do.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from xprobe.errors import RunFolderError, UsageError, XprobeError
from xprobe.runs.disk import entries, make_folder, read_file, replacing, what_is, writing
from xprobe.runs.folder import RunFolder
from xprobe.runs.lock import LOCK
from xprobe.runs.manifest import Manifest
from xprobe.sweeps.plan import SweepModel, SweepPlan, plan_text

PLAN, TOML, FORECASTS, SUMMARY, PAGE = "plan.json", "sweep.toml", "forecasts.json", "summary.json", "comparison.html"
STOP = "stop"  # a file: its processes stop at the next safe point, or at once if it says so
NOW = "now"
STATES = "states"  # what `xprobe run` computes, among the stages of a sweep
KINDS = ("waiting", "running", "done", "failed", "stopped", "refused")


@dataclass(frozen=True)
class Status:
    """The last news of one run.

    Attributes
    ----------
    name : str
    state : str
        One of ``KINDS``.
    stage : str
        What it is, or was, doing.
    done, total : int
        Steps of that.
    errors : dict of str to str
        Stage -> why it failed.
    seconds : float
        Since its process started, or until it ended.
    starts : int
        How often a process was started for it.
    host : str
    notes : tuple of str
        Warnings about the run as a whole, such as that its weights are streamed.
    """

    name: str
    state: str = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    starts: int = 0
    host: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Status:
        """The inverse of ``to_dict``; entries of other versions are left out."""
        known = {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        return cls(**{**known, "notes": tuple(known.get("notes", ()))})


class SweepFolder:
    """Paths and files of a sweep's folder.

    Attributes
    ----------
    path : Path
    plan : SweepPlan
    """

    def __init__(self, path: Path, plan: SweepPlan) -> None:
        self.path = path
        self.plan = plan

    @classmethod
    def holds_sweep(cls, path: Path) -> bool:
        """Whether there is a sweep in the folder."""
        return (path / PLAN).is_file()

    @classmethod
    def open(cls, path: str | Path) -> SweepFolder:
        """The sweep in a folder.

        Raises
        ------
        UsageError
            There is none, or another version of xprobe wrote its plan.
        RunFolderError
            The plan was damaged.
        """
        path = Path(path)
        if not cls.holds_sweep(path):
            raise UsageError(f"{path} holds no sweep: it has no {PLAN}. `xprobe sweep FILE.toml` makes one")
        try:
            plan = SweepPlan.from_dict(json.loads(read_file(path / PLAN)))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise UsageError(f"{path / PLAN}: {error}") from error
            raise RunFolderError(
                f"{path / PLAN} is damaged ({error}): start the sweep again with its TOML file and --out {path}"
            ) from error
        return cls(path, plan)

    @classmethod
    def check_place(cls, path: Path) -> None:
        """Checks that a sweep may lie in ``path``: a sweep, an empty folder, or nothing lies there.

        Raises
        ------
        UsageError
            Something else does.
        """
        if cls.holds_sweep(path):
            return
        if what_is(path) not in (None, "a folder") or (
            path.is_dir() and {entry.name for entry in entries(path)} - {LOCK}
        ):
            raise UsageError(f"{path} holds something else than a sweep: choose another folder (--out)")

    @classmethod
    def create(cls, path: Path, plan: SweepPlan, source: Path) -> SweepFolder:
        """A new sweep, or the one in the folder with more models, other resources or further stages.

        Raises
        ------
        UsageError
            The folder holds something else, or a model of the same name with another study: names the difference.
        """
        if cls.holds_sweep(path):
            try:
                before = cls.open(path).plan.models
            except RunFolderError:  # the plan was damaged, and is written anew; each run folder knows its own study
                before = ()
            for model in before:
                _check_same(path, model, plan)
        cls.check_place(path)
        folder = cls(path, plan)
        with writing(path):
            for part in ("runs", "status", "logs"):
                make_folder(path / part)
            folder.write(PLAN, plan_text(plan))
            shutil.copyfile(source, path / TOML)
        return folder

    def change_plan(self, plan: SweepPlan) -> None:
        """Replaces the plan, also on the disk."""
        if plan != self.plan:
            self.plan = plan
            self.write(PLAN, plan_text(plan))

    def write(self, name: str, content: bytes) -> None:
        """Writes a file in one step: readers see the old content or the new."""
        with writing(self.path), replacing(self.path / name) as temporary:
            temporary.write_bytes(content)

    def run(self, name: str) -> Path:
        """The run folder of a model."""
        return self.path / "runs" / name

    def log(self, name: str) -> Path:
        """What the processes of a model printed."""
        return self.path / "logs" / f"{name}.txt"

    # -- what is left ----------------------------------------------------------------------------------------

    def left(self, name: str) -> list[str]:
        """Stages that a model's run folder lacks, in order; ``states`` stands for all that `xprobe run` computes.

        Examples
        --------
        >>> from xprobe.config import StudyConfig
        >>> plan = SweepPlan((SweepModel("one", StudyConfig("org/one")),), stages={"answers": {}})
        >>> SweepFolder(Path("nowhere"), plan).left("one")
        ['states', 'answers']
        """
        model, run = self.plan[name], self.run(name)
        everything = [STATES, *self.stages_of(model)]
        try:
            if not (run.is_dir() and RunFolder(run).has_manifest() and RunFolder(run).is_finished()):
                return everything
            manifest = RunFolder(run).read_finished()
        except XprobeError:  # the run itself says what is wrong with its folder
            return everything
        if manifest.study != model.study:
            return everything
        lost = _without_tables(RunFolder(run), manifest)
        later = [
            stage for stage in everything[1:] if stage in lost or not self._holds(stage, manifest.stages.get(stage))
        ]
        return [STATES, *later] if lost else later

    def changed(self, name: str) -> list[str]:
        """Stages that a model's run folder holds with other settings than those of the plan."""
        try:
            stages = RunFolder(self.run(name)).read_finished().stages
        except XprobeError:
            return []
        later = self.stages_of(self.plan[name])
        return [stage for stage in later if stage in stages and not self._holds(stage, stages[stage])]

    def was_streamed(self, name: str) -> bool:
        """Whether the states of a finished run were read block by block."""
        try:
            executions = RunFolder(self.run(name)).read_finished().stages[STATES].executions
        except (XprobeError, KeyError):
            return False
        return bool(executions) and executions[-1].options.stream

    def stages_of(self, model: SweepModel) -> list[str]:
        """The later stages of a model: a model that is read block by block can only be read by lenses."""
        return [stage for stage in self.plan.stages if stage == "lenses" or not model.execution.stream]

    def _holds(self, stage: str, entry: Any) -> bool:
        """Whether a stage was computed with the settings that the plan names."""
        if entry is None:
            return False
        for name, value in vars(self.plan.settings_of(stage)).items():
            held = entry.results.get(name, value)
            same = set(value) <= set(held) if isinstance(held, dict) else held == value  # lenses: with their checksums
            if not same:
                return False
        return True

    # -- the last news ---------------------------------------------------------------------------------------

    def news(self, name: str) -> Status:
        """The last news of a run, as its process has written them."""
        try:
            return Status.from_dict(json.loads((self.path / "status" / f"{name}.json").read_bytes()))
        except (OSError, ValueError, TypeError):  # not there, or damaged: the run folder is enough
            return Status(name)

    def status(self, name: str) -> Status:
        """The last news of a run, and ``done`` or ``waiting`` if its run folder says so."""
        known = self.news(name)
        if known.state == "running":
            return known
        if not self.left(name):
            return replace(known, state="done", stage="", done=0, total=0, errors={})
        return replace(known, state="waiting") if known.state == "done" else known

    def set_status(self, status: Status) -> None:
        """Writes the last news of a run, without waiting for the disk."""
        path = self.path / "status" / f"{status.name}.json"
        temporary = path.with_name(f".{path.name}.part")
        with writing(path):
            temporary.write_text(json.dumps(status.to_dict(), ensure_ascii=False), encoding="utf-8")
            temporary.replace(path)

    # -- stopping --------------------------------------------------------------------------------------------

    def ask_to_stop(self, *, now: bool = False) -> None:
        """Makes all processes of the sweep stop, wherever they run: at the next safe point, or at once."""
        self.write(STOP, (NOW if now else time.ctime()).encode())

    def may_go_on(self) -> None:
        """Takes ``ask_to_stop`` back."""
        (self.path / STOP).unlink(missing_ok=True)

    def stop_asked(self) -> str | None:
        """What the file ``stop`` says; None if it is not there."""
        try:
            return (self.path / STOP).read_text(encoding="utf-8")
        except OSError:
            return None


def _without_tables(run: RunFolder, manifest: Manifest) -> set[str]:
    """Stages of a run of which a table is gone or was changed. `xprobe run --resume` repairs them."""
    return {
        stage
        for stage, entry in manifest.stages.items()
        if not all(run.holds_table(table, digest) for table, digest in entry.tables.items())
    }


def _check_same(path: Path, before: SweepModel, plan: SweepPlan) -> None:
    """Refuses a plan in which a model of the sweep in ``path`` has another study."""
    now = next((model for model in plan.models if model.name == before.name), None)
    if now is None or now.study == before.study:
        return
    ours, theirs = now.study.to_dict(), before.study.to_dict()
    words = [f"{name}: {theirs[name]} before, {ours[name]} now" for name in ours if ours[name] != theirs[name]]
    raise UsageError(
        f"{path} holds a sweep with another study of {before.name} ({'; '.join(words)}): choose another folder (--out)"
    )
