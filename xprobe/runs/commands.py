"""Commands that messages name, quoted for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path


def resume_command(folder: Path, options: Sequence[str] = (), program: str = "xprobe") -> str:
    """The command that continues the run in ``folder``.

    ``program`` is how xprobe is called, quoted already.

    Examples
    --------
    >>> resume_command(Path("runs/my run"))
    "xprobe run --out 'runs/my run' --resume"
    """
    return f"{program} {shlex.join(['run', '--out', str(folder), '--resume', *options])}"
