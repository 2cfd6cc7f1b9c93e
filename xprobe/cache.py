"""Where xprobe keeps what it has prepared once: converted models and fetched data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$XPROBE_CACHE`` if set, else ``$XDG_CACHE_HOME/xprobe``, else ``~/.cache/xprobe``. Not created here."""
    named = os.environ.get("XPROBE_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "xprobe"
