"""Every public function of this room has an example. tests/test_docs.py runs them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import xprobe.probes

NAMES = [module.name for module in pkgutil.iter_modules(xprobe.probes.__path__)]
MODULES = [importlib.import_module(f"xprobe.probes.{name}") for name in NAMES]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_function_has_an_example(module: ModuleType) -> None:
    functions = [value for value in vars(module).values() if inspect.isfunction(value)]
    own = [f for f in functions if f.__module__ == module.__name__ and not f.__name__.startswith("_")]
    assert [f.__name__ for f in own if ">>>" not in (f.__doc__ or "")] == []
