"""What the commands that draw figures share."""

from __future__ import annotations

from pathlib import Path

from xprobe.errors import UsageError


def check_figure(path: Path) -> None:
    """Refuses a figure that cannot be drawn, before anything is computed.

    Raises
    ------
    UsageError
        matplotlib is not installed, the kind of file is unknown to it, or the folder is not there.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install 'xprobe[plot]'") from error
    known = FigureCanvasBase.filetypes
    if path.suffix.lstrip(".").lower() not in known:
        raise UsageError(f"--figure {path}: name a file that ends in one of {', '.join(sorted(known))}")
    if not path.parent.is_dir():
        raise UsageError(f"--figure {path}: there is no folder {path.parent}")
