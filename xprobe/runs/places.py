"""Names of models, data, templates and lenses that are paths: where they lead to from another working directory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from xprobe.config import DEFAULT_MODEL, DTYPES, TEMPLATES, StudyConfig
from xprobe.runs.manifest import Manifest

_NO_PATHS = (DEFAULT_MODEL, "builtin", "xquad", *TEMPLATES, *DTYPES)  # whatever lies in the folder
_HUB = "hf:"  # before the name of a data set, which may be a folder


def in_folder(value: Any, folder: Path) -> Any:
    """A text that names something in ``folder`` as an absolute path; anything else as it is.

    Parameters
    ----------
    value : any
        The name of a model, data, template or lens, as ``StudyConfig`` has it.
    folder : Path

    Examples
    --------
    >>> in_folder("builtin", Path("/usr")), in_folder("hf:bin", Path("/usr"))[:8], in_folder("org/model", Path("/usr"))
    ('builtin', 'hf:/usr/', 'org/model')
    """
    if not isinstance(value, str) or not value or "\0" in value or value in _NO_PATHS:
        return value
    if value.startswith(_HUB):  # a folder in the layout of the Hub
        name, *parts = _parts(value)
        return ",".join([f"{_HUB}{(folder / name).resolve()}", *parts]) if _exists(folder, name) else value
    return str((folder / value).resolve()) if _exists(folder, value) else value


def lens_in_folder(name: Any, folder: Path) -> Any:
    """``in_folder`` for the file of a lens, such as ``regression:lens.pt``."""
    kind, colon, place = name.partition(":") if isinstance(name, str) else (name, "", "")
    return f"{kind}:{in_folder(place, folder)}" if colon else name


def continued_study(before: Manifest, study: StudyConfig, directory: str) -> StudyConfig:
    """The study of a run that goes on: model and data as they are named now, template and lens as the run named them.

    Shards belong to a study to the letter, so the names of files with the same bytes must stay. What is named by a
    relative path now gets an absolute one if the run began in another ``directory``.
    """
    names = {name: getattr(study, name) for name in ("model", "data")}
    if directory != os.getcwd():
        names = {name: in_folder(value, Path()) for name, value in names.items()}
    return replace(study, **names, template=before.study.template, lens=before.study.lens)


def first_directory(before: Manifest, now: Manifest) -> str:
    """The working directory in which a run began: this one if its manifest names none that is there."""
    known = before.directory
    return known if isinstance(known, str) and os.path.isabs(known) and os.path.isdir(known) else now.directory


def new_places(before: Manifest, study: StudyConfig) -> dict[str, str]:
    """Where the files of a run lie, as ``study`` names them now, if its own names do not lead there."""
    found: dict[str, str] = {}
    for name, find in _FIND.items():
        place = find(getattr(study, name), Path())
        known = getattr(before.study, name)
        own = find(known, Path(before.directory)) if before.directory else known
        if _lies_there(name, place) and place != own:
            found[name] = place
    return found


def study_here(manifest: Manifest) -> StudyConfig:
    """The study of a run, with paths that lead from this working directory to the files that the run read.

    First counts the place that the last resume named, whose bytes it checked; then a name that leads to something
    here; then the directory in which the run began. What a path leads to is compared with the run's checksums.
    """
    study = manifest.study
    found: dict[str, Any] = {}
    for name, find in _FIND.items():
        value, place = getattr(study, name), manifest.places.get(name)
        if place is not None and _lies_there(name, place):
            found[name] = place
        elif not _lies_there(name, value) and manifest.directory:
            found[name] = find(value, Path(manifest.directory))
    return replace(study, **found)


def _lies_there(name: str, value: Any) -> bool:
    """Whether an entry of a study names the path of something that exists."""
    if not isinstance(value, str) or value in _NO_PATHS:
        return False
    if name == "lens":
        return _exists(Path(), value.partition(":")[2])
    return _exists(Path(), _parts(value)[0] if value.startswith(_HUB) else value)


def _parts(value: str) -> list[str]:
    """A data set of the Hub, and what follows it: config=, split=, ..."""
    return re.split(",(?=[a-z]+=)", value.removeprefix(_HUB))


def _exists(folder: Path, name: str) -> bool:
    try:
        return bool(name) and (folder / name).exists()
    except (OSError, ValueError):  # no name of a file
        return False


_FIND: dict[str, Callable[[Any, Path], Any]] = {
    "model": in_folder, "data": in_folder, "template": in_folder, "lens": lens_in_folder,
}  # fmt: skip
