"""``manifest.json`` as a file: its JSON, its format, and its checksums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xprobe.errors import RunFolderError
from xprobe.runs.disk import read_file
from xprobe.runs.identity import checksum_of
from xprobe.runs.manifest import FORMAT, Manifest
from xprobe.runs.schema import RESULTS_SHA256, STAGE_SHA256, stage_is_untouched

_SELF = "sha256"  # entry of the manifest: checksum of all the others


def manifest_bytes(manifest: Manifest) -> bytes:
    """Content of the file: the entries, checksums of each stage and of its results, and a checksum of everything."""
    values = json.loads(json.dumps(manifest.to_dict()))  # as readers will see it
    for stage in values["stages"].values():
        stage[RESULTS_SHA256] = checksum_of(stage["results"])
        stage[STAGE_SHA256] = checksum_of(stage)
    values[_SELF] = checksum_of(values)
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # half a surrogate pair, as JSON writes it


def read_values(path: Path) -> dict[str, Any]:
    """The manifest as plain values, without the checksum of everything.

    Raises
    ------
    RunFolderError
        It is no JSON object, or of another format than this version reads.
    """
    try:
        values = _parsed(path)
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise RunFolderError(
            f"cannot read {path} ({error}): the run cannot be used; start it in a new folder"
        ) from error
    number = values.get("format")
    if type(number) is not int:
        what = json.dumps(number) if "format" in values else "missing"
        raise RunFolderError(
            f"{path}: entry format must be a whole number, is {what}; the run cannot be used: start it in a new folder"
        )
    if number != FORMAT:
        environment = values.get("environment")
        writer = environment.get("xprobe") if isinstance(environment, dict) else None
        version = f"xprobe {writer}, which wrote it" if isinstance(writer, str) else "the version that wrote it"
        raise RunFolderError(
            f"{path} is of run format {number}, this version of xprobe reads format {FORMAT}: "
            f"read it with {version}, or start the run in a new folder"
        )
    values.pop(_SELF, None)
    return values


def is_untouched(path: Path) -> bool:
    """Whether the manifest still has the checksum that it was written with."""
    try:
        values = _parsed(path)
        return values.pop(_SELF) == checksum_of(values)
    except (RunFolderError, ValueError, RecursionError, AttributeError, KeyError):
        return False


def untouched_stages(values: dict[str, Any]) -> set[str]:
    """Names of the stages in a manifest whose entries still have the checksums that they were written with."""
    stages = values.get("stages")
    return {name for name, stage in stages.items() if stage_is_untouched(stage)} if isinstance(stages, dict) else set()


def _parsed(path: Path) -> Any:
    return json.loads(read_file(path).decode("utf-8-sig"))
