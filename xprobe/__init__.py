"""xprobe: at which layer a multilingual language model understands a question, and at which it finds the answer.

>>> import xprobe
>>> study = xprobe.run("smollm2-135m", data="builtin", setting="en-x")     # doctest: +SKIP
>>> study.stability                                                        # doctest: +SKIP

Names are resolved on first use: ``import xprobe`` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xprobe.attribution.settings import RelevanceSettings
    from xprobe.comparison import Comparison, compare
    from xprobe.config import Execution, StudyConfig
    from xprobe.errors import XprobeError
    from xprobe.evaluation import attribute, attribute_example, evaluate, forecast_oracle, oracle, patch, read_lenses
    from xprobe.lenses.fit import fit_lens
    from xprobe.lenses.settings import FitSettings, LensesSettings
    from xprobe.phases.patch_settings import PatchSettings
    from xprobe.report.tracking import Tracker
    from xprobe.results import Study, load_study
    from xprobe.scoring.settings import AnswerSettings, OracleSettings
    from xprobe.single_prompt.lens import PromptLens, lens_prompt
    from xprobe.single_prompt.patch import PatchedPrompt, PromptEdit, patch_prompt
    from xprobe.study import run
    from xprobe.sweeps.comparing import SweepComparison, compare_sweep
    from xprobe.sweeps.run import Sweep, sweep

__version__ = "0.2.0"

_HOME = {
    "run": "xprobe.study",
    "Study": "xprobe.results",
    "compare": "xprobe.comparison",
    "Comparison": "xprobe.comparison",
    "sweep": "xprobe.sweeps.run",
    "Sweep": "xprobe.sweeps.run",
    "compare_sweep": "xprobe.sweeps.comparing",
    "SweepComparison": "xprobe.sweeps.comparing",
    "load_study": "xprobe.results",
    "StudyConfig": "xprobe.config",
    "Execution": "xprobe.config",
    "AnswerSettings": "xprobe.scoring.settings",
    "OracleSettings": "xprobe.scoring.settings",
    "RelevanceSettings": "xprobe.attribution.settings",
    "FitSettings": "xprobe.lenses.settings",
    "LensesSettings": "xprobe.lenses.settings",
    "fit_lens": "xprobe.lenses.fit",
    "PatchSettings": "xprobe.phases.patch_settings",
    "attribute": "xprobe.evaluation",
    "attribute_example": "xprobe.evaluation",
    "evaluate": "xprobe.evaluation",
    "oracle": "xprobe.evaluation",
    "forecast_oracle": "xprobe.evaluation",
    "patch": "xprobe.evaluation",
    "read_lenses": "xprobe.evaluation",
    "patch_prompt": "xprobe.single_prompt.patch",
    "PatchedPrompt": "xprobe.single_prompt.patch",
    "lens_prompt": "xprobe.single_prompt.lens",
    "PromptLens": "xprobe.single_prompt.lens",
    "PromptEdit": "xprobe.single_prompt.patch",
    "Tracker": "xprobe.report.tracking",
    "XprobeError": "xprobe.errors",
}

_MODULES = ("errors", "events", "probes")  # modules for users: no import of their own is needed

__all__ = [
    "AnswerSettings", "Comparison", "Execution", "FitSettings", "LensesSettings", "OracleSettings", "PatchSettings",
    "PatchedPrompt", "PromptEdit", "PromptLens", "RelevanceSettings", "Study", "StudyConfig", "Sweep",
    "SweepComparison", "Tracker", "XprobeError", "__version__", "attribute", "attribute_example", "compare",
    "compare_sweep", "evaluate", "fit_lens", "forecast_oracle", "lens_prompt", "load_study", "oracle", "patch",
    "patch_prompt", "read_lenses", "run", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"xprobe.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'xprobe' has no attribute {name!r}; it has {', '.join(__dir__())}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
