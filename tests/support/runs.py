"""Run folders as tests compare them: everything but times and places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xprobe.runs.folder import MANIFEST
from xprobe.runs.identity import checksum_of
from xprobe.runs.manifest import Manifest
from xprobe.runs.schema import STAGE_SHA256

CHANGING = ("created", "total_seconds", "sha256")


def steady(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without what differs between two runs of the same: times, and the checksums that cover them."""
    stages = {name: without(stage, "seconds", STAGE_SHA256) for name, stage in manifest.get("stages", {}).items()}
    return without({**manifest, "stages": stages}, *CHANGING)


def without(values: Any, *names: str) -> Any:
    return {name: value for name, value in values.items() if name not in names} if isinstance(values, dict) else values


def raw_manifest(out: Path) -> dict[str, Any]:
    """The manifest as plain values, as it lies on the disk."""
    return json.loads((out / MANIFEST).read_text())


def write_signed(out: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest with a checksum that fits it, as another version of xprobe would."""
    values = without(manifest, "sha256")
    (out / MANIFEST).write_text(json.dumps({**values, "sha256": checksum_of(values)}))


def contents(out: Path) -> dict[str, Any]:
    """Every file's bytes, hidden ones included; the manifest as ``steady`` values."""
    found: dict[str, Any] = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    if MANIFEST in found:
        found[MANIFEST] = steady(json.loads(found[MANIFEST]))
    return found


def parity(study: Any) -> float:
    """Of a study, in nats."""
    return study.manifest.stages["states"].results["parity_error"]


def chosen_strategy(study: Any) -> str:
    return study.manifest.stages["states"].results["plan"]["strategy"]


def summary(manifest: Manifest, setting: str) -> dict[str, Any]:
    return manifest.stages["phases"].results["settings"][setting]
