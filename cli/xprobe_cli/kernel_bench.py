"""The kernels' benchmark for the command line. Wrong settings are a UsageError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xprobe.errors import UsageError, XprobeError


def measure(
    show: Callable[[str], None] | None = None, *, figure: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """Measures what ``settings`` ask for (``xprobe_kernels.bench.command.Settings``) and returns it, ready for JSON.

    ``show`` gets the text of each part when it is done. ``figure`` is the file that ``draw`` will write; it is
    checked before the measurement.

    Raises
    ------
    UsageError
        Names the setting, its value and what was expected.
    """
    from xprobe_kernels.bench import command
    from xprobe_kernels.bench import figure as drawing

    try:
        chosen = command.Settings(**settings)
        chosen.check()
        if figure is not None:
            drawing.check(str(figure), chosen.measured)
        return command.measure(chosen, show)
    except command.SettingsError as error:
        raise UsageError(str(error)) from error


def draw(result: dict[str, Any], figure: Path) -> None:
    """The roofline of a measurement; ``XprobeError`` if nothing in it can be drawn."""
    from xprobe_kernels.bench.figure import NothingToDrawError, roofline

    try:
        roofline(result, str(figure))
    except NothingToDrawError as error:
        raise XprobeError(str(error)) from error
