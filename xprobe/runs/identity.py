"""What a run is made of, and whether it may go on with what is there now."""

from __future__ import annotations

from typing import Any

from xprobe.models import loading
from xprobe.runs.folder import MAY_CHANGE


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What keeps a run from going on, in words; empty if nothing.

    Parameters
    ----------
    before : dict
        The run's manifest, checked by ``RunFolder.read_run``.
    now : dict
        ``config``, ``model`` and ``data`` (with ``name`` and ``files_sha256``) and ``template_sha256`` as they are now.
    """
    old, new = before["config"], now["config"]
    changed = [name for name in {**new, **old} if name not in MAY_CHANGE and not _same(name, old, new)]
    found = [_in_words(name, old, new) for name in changed]
    # the data's bytes are those of the languages read
    for part in ("model",) if {"languages", "settings"} & set(changed) else ("model", "data"):
        if before[part].get("files_sha256") != now[part]["files_sha256"]:
            name, other = before[part].get("name"), now[part]["name"]
            renamed = f"{part} was {name!r} and is now {other!r} (other bytes)"
            found.append(renamed if name != other else f"{part} {name!r} has other bytes than it had")
    if before["template_sha256"] != now["template_sha256"]:
        found.append("the wording of the template is another one now")
    return found


def other_device(before: dict[str, Any], device: str) -> list[str]:
    """The same for the kind of device: half of the shards in bf16 from a GPU, half in float32 from a CPU, is no run."""
    was, now = str(before["model"].get("device")), loading.pick_device(device)
    return [] if was.split(":")[0] == now.split(":")[0] else [f"device was {was!r} and is now {now!r}"]


def _same(name: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    return name in old and name in new and old[name] == new[name] and type(old[name]) is type(new[name])


def _in_words(name: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    if name not in new:
        return f"{name} was {old[name]!r}, which this version of xprobe does not know"
    if name not in old:
        return f"{name} is now {new[name]!r} and was not known to the version that began the run"
    return f"{name} was {old[name]!r} and is now {new[name]!r}"
