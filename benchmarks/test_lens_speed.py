"""Speed of the lens beside the naive one and a bare matrix product: ``pytest benchmarks --benchmark-only``.

For a ratio to quote, take ``python benchmarks/lens_ratio.py``: it runs the variants by turns.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.lens_ratio import SHAPES, VARIANTS, Task, make


@functools.cache
def task(shape: str) -> Task:
    return make(SHAPES[shape])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_lens_speed(benchmark, shape, variant) -> None:
    benchmark.group = f"{shape}: {SHAPES[shape]}"
    benchmark.name = variant
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    with torch.inference_mode():
        benchmark.pedantic(VARIANTS[variant], args=(task(shape),), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("shape", ["small"])
def test_the_variants_agree(shape) -> None:
    """No speed counts for a wrong answer."""
    with torch.inference_mode():
        log_p, rank, entropy, top_logits, top_ids = VARIANTS["naive fp32, top 5"](task(shape))
        readout = VARIANTS["lens cpu, top 5"](task(shape))
    assert torch.allclose(readout.log_probability, log_p, atol=2e-5)
    assert torch.allclose(readout.entropy, entropy, atol=2e-5)
    assert torch.allclose(readout.top_logits, top_logits, atol=2e-5)
    assert bool((readout.top_ids == top_ids).float().mean() > 0.99)
    assert bool(((readout.rank[:, 0] - rank).abs() <= 2).all())
