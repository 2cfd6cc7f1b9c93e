"""Heads with more than 2^31 numbers: what is looked up, summed and listed lies beyond where 32 bits reach."""

from __future__ import annotations

import pytest
import torch
from xprobe_kernels import Unembedding, lens
from xprobe_kernels.readout import KERNELS

GPU = torch.cuda.is_available()
SIZES = [
    pytest.param(517, 64, torch.float32, id="small"),
    pytest.param(262144, 8192, torch.bfloat16, id="2^31 numbers", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("vocabulary", "width", "dtype"), SIZES)
def test_the_end_of_the_vocabulary_is_read_as_the_rest(backend, vocabulary, width, dtype) -> None:
    device = torch.device("cuda" if GPU else "cpu")
    random = torch.Generator(device).manual_seed(0)
    weight = torch.empty(vocabulary, width, dtype=dtype, device=device)
    for part in weight.split(4096):
        part.copy_(torch.randn(part.shape, generator=random, device=device) / width**0.5)
    last = torch.tensor([vocabulary - 1, vocabulary // 2, 0], device=device)
    rows = weight[last] * 4  # each row's own token is far ahead of all others
    found = lens(rows, Unembedding(weight, norm="none"), last, top_k=1, backend=backend)
    logits = torch.cat([rows.double() @ part.double().T for part in weight.split(4096)], 1)
    assert found.top_ids is not None
    assert found.top_ids[:, 0].equal(last)
    assert found.rank[:, 0].tolist() == [1, 1, 1]
    own = logits.gather(1, last[:, None])
    assert float((found.logits - own).abs().max()) < 1e-4 * float(own.abs().max())
    assert float((found.logsumexp - logits.logsumexp(1)).abs().max()) < 1e-4 * float(own.abs().max())
