"""How probes are trained: the settings that the manifest keeps for every probe."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from xprobe.arguments import check_instance, check_jobs
from xprobe.config import MAX_SEED
from xprobe.errors import UsageError


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are trained.

    Parameters
    ----------
    folds : int
        Number of folds. A fold holds whole paragraphs; there are fewer folds where there are fewer paragraphs.
    n_components : int
        Most principal components that a probe sees.
    alpha : float
        Ridge penalty of the alignment probe, per training sample.
    C : float
        Inverse penalty of the logistic regressions.
    seed : int
        Seed of the control tasks and of the randomised principal components.
    jobs : int
        Layers trained at the same time; -1: as many as there are cores.
    device : str
        ``cpu``, or a torch device: principal components and ridge regressions then run there, through scikit-learn's
        array API. Needs the environment variable ``SCIPY_ARRAY_API=1`` set before scipy is imported.

    Raises
    ------
    UsageError
        A value is out of its range.

    Examples
    --------
    >>> ProbeSettings(folds=3).to_dict()
    {'folds': 3, 'n_components': 128, 'alpha': 0.1, 'C': 1.0, 'seed': 0, 'device': 'cpu'}
    >>> ProbeSettings(folds=1)
    Traceback (most recent call last):
        ...
    xprobe.errors.UsageError: folds must be a whole number of at least 2, got 1
    """

    folds: int = 5
    n_components: int = 128
    alpha: float = 0.1
    C: float = 1.0
    seed: int = 0
    jobs: int = -1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least, most in (("folds", 2, None), ("n_components", 1, None), ("seed", 0, MAX_SEED)):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not is_whole or value < least or (most is not None and value > most):
                limit = f"at least {least}" if most is None else f"{least} to {most}"
                raise UsageError(f"{name} must be a whole number of {limit}, got {value!r}")
        for name in ("alpha", "C"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be a finite number above 0, got {value!r}")
        check_jobs(self.jobs)
        check_instance("device", self.device, str)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``manifest.json``. ``jobs`` is left out: it changes no number."""
        return {name: value for name, value in asdict(self).items() if name != "jobs"}
