"""The examples in the docstrings of the kernels run, on the CPU."""

from __future__ import annotations

import doctest
import importlib

import pytest
import xprobe_kernels
from xprobe_kernels import attention, continuation, reach, transfer

PUBLIC = [getattr(xprobe_kernels, name) for name in xprobe_kernels.__all__]
PUBLIC += [continuation.Continuation, attention.continued_attention]
PUBLIC += [attention.tree_attention, reach.Reach, transfer.upload, transfer.HostCopy]


@pytest.mark.parametrize("module", sorted({thing.__module__ for thing in PUBLIC} | {"xprobe_kernels"}))
def test_examples_give_what_they_show(module) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_everything_public_has_an_example(thing) -> None:
    assert doctest.DocTestFinder(recurse=False).find(thing)[0].examples
