"""Which tests run with Triton's kernels: all of them on a GPU, the most telling ones under the slow interpreter.

The other ones are marked slow there. Dtypes that the kernels do not take are left out: fp64, and bf16 under the
interpreter.
"""

from __future__ import annotations

import pytest
import torch
from xprobe_kernels.readout import KERNELS, interpreted

LARGE = ("1025 rows", "vocabulary of 50257", "vocabulary of 151936")
FP16 = ("17 rows of width 576", "everything at once", "peaked rows", "logits in the thousands", "bias")
SLOW_TESTS = ("test_duplicates_tie_when_the_bias_dwarfs_the_projection", "test_no_token_ranks_behind_itself")
SLOW_MODULES = ("test_lens_properties",)  # test_triton.py has its own properties, with shapes that split and tile
WIDE = 576


def _impossible(given: dict[str, object]) -> bool:
    refused = {torch.float64, torch.bfloat16} if interpreted() else {torch.float64}
    return given.get("dtype") in refused or ("bf16" in str(given.get("regime")) and torch.bfloat16 in refused)


def _takes_long(item: pytest.Item, given: dict[str, object]) -> bool:
    if getattr(item, "originalname", "") in SLOW_TESTS or given.get("regime") in LARGE or given.get("width") == WIDE:
        return True
    return given.get("dtype") == torch.float16 and given.get("regime") not in FP16


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = []
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if given.get("backend") not in KERNELS:
            continue
        if _impossible(given) or (item.path.stem in SLOW_MODULES and interpreted()):
            left_out.append(item)
        elif interpreted() and _takes_long(item, given):
            item.add_marker(pytest.mark.slow)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
