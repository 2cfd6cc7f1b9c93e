"""Whether a run may be resumed: its study, model and data compared with the present ones."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from xprobe.config import DEFAULT_MODEL, TEMPLATES, StudyConfig
from xprobe.errors import UsageError
from xprobe.runs.manifest import Manifest
from xprobe.runs.places import study_here

MAY_CHANGE = ("model", "data")  # names, on resume; the bytes of model and data may not change


def differences(before: Manifest, now: Manifest, old: dict[str, Any]) -> list[str]:
    """Differences that forbid resuming a run, in words.

    How it is computed (``Execution``) does not matter: a run may be resumed on another device.

    Parameters
    ----------
    before : Manifest
        Of the run.
    now : Manifest
        With study, model, data and template as they are now.
    old : dict
        The run's ``StudyConfig`` as it was written (``RunFolder.read_study``).
    """
    new = now.study.to_dict()
    changed = [
        name for name in {**new, **old}
        if name not in MAY_CHANGE and not _same(name, old, new) and not _same_file(name, before, now)
    ]  # fmt: skip
    reasons = [_describe_change(name, old, new) for name in changed]
    reasons += _other_bytes("model", before.model, now.model)
    if not {"languages", "settings"} & set(changed):  # the checksum of the data is of the languages read
        reasons += [] if before.data.same_records(now.data) else _other_bytes("data", before.data, now.data)
    if before.template_sha256 != now.template_sha256:
        reasons.append("the wording of the template has changed")
    if before.lens_sha256 != now.lens_sha256 and "lens" not in changed:
        reasons.append("the file of the lens has other bytes")
    return reasons


def _other_bytes(what: str, before: Any, now: Any) -> list[str]:
    if before.files_sha256 == now.files_sha256:
        return []
    if what == "model" and now.kind == "hub" and before.kind in ("folder", "gguf"):
        return [f"no model lies at {now.name!r} here (that of the run lay at {before.location}): name it by its path"]
    if before.name == now.name:
        return [f"{what} {now.name!r} has other bytes than it had"]
    return [f"{what} was {before.name!r} and is now {now.name!r} (other bytes)"]


def _same(name: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    return name in old and name in new and old[name] == new[name] and type(old[name]) is type(new[name])


def _same_file(name: str, before: Manifest, now: Manifest) -> bool:
    """Whether two paths of a template or a lens lead to the same bytes."""
    one, other = getattr(before.study, name, None), getattr(now.study, name, None)
    if name == "template":
        return before.template_sha256 == now.template_sha256 and not {one, other} & set(TEMPLATES)
    if name == "lens" and isinstance(one, str) and isinstance(other, str):
        kinds = {text.partition(":")[0] for text in (one, other)}
        return len(kinds) == 1 and before.lens_sha256 == now.lens_sha256 != ""
    return False


def _describe_change(name: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    if name not in new:
        return f"{name} was {old[name]!r}, which this version of xprobe does not know"
    if name not in old:
        return (
            f"{name} is now {new[name]!r} and is missing in the manifest (it was removed, or the version that began "
            "the run did not know it)"
        )
    return f"{name} was {old[name]!r} and is now {new[name]!r}"


def study_to_load(manifest: Manifest, folder: Path) -> StudyConfig:
    """The study of the run in ``folder``, with paths that lead to its files from this working directory.

    Raises
    ------
    UsageError
        No model lies where it was.
    """
    study, entry = study_here(manifest), manifest.model
    if entry.kind not in ("folder", "gguf") or study.model == DEFAULT_MODEL or Path(study.model).exists():
        return study
    if not Path(entry.location).exists():
        resume = shlex.join(["xprobe", "run", "MODEL", "--out", str(folder), "--resume"])
        places = " or ".join(dict.fromkeys((study.model, entry.location)))
        raise UsageError(f"no model lies at {places}, where the run in {folder} had it: `{resume}` tells it where")
    return replace(study, model=entry.location)


def run_key(values: dict[str, Any]) -> str:
    """Checksum of everything that the shards of a run depend on. Journal lines with another key are ignored.

    ``values`` is the manifest as it was written: a later version that knows more options gets the same key.
    """
    parts = {name: values.get(name) for name in ("study", "model", "data")}
    study, model, data = (part if isinstance(part, dict) else {} for part in parts.values())
    lens = {"lens": values["lens_sha256"]} if values.get("lens_sha256") else {}
    return checksum_of(
        {
            **lens,
            "study": {name: value for name, value in study.items() if name not in MAY_CHANGE},
            "model": model.get("files_sha256"),
            "data": data.get("files_sha256"),
            "template": values.get("template_sha256"),
        }
    )


def execution_key(options: dict[str, Any], device: str, environment: dict[str, Any]) -> str:
    """The name of an execution in the journal: equal for equal options, device and environment."""
    return checksum_of({"options": options, "device": device, "environment": environment})[:16]


def checksum_of(values: dict[str, Any]) -> str:
    """SHA-256 of plain values, whatever the order of their names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
