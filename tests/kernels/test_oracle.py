"""The reference defines what is right, so it must not use the code that it judges."""

from __future__ import annotations

import pytest
import torch
from support.lens_cases import judge
from support.lens_truth import same_bits
from xprobe_kernels import Unembedding, cpu, reference, ties


def broken(*arguments: object, **options: object) -> None:
    raise AssertionError("the reference called code that the other backends use")


@pytest.mark.parametrize("regime", ["everything at once", "rms norm with gamma", "small scale", "equal logits"])
def test_the_reference_does_without_the_arithmetic_of_the_other_backends(monkeypatch, regime) -> None:
    case = judge(regime, torch.float32).case
    before, logits = case.read("reference"), reference.logits(case.hidden, case.head)
    for name in ("normalize", "bias_and_scale", "cap"):
        monkeypatch.setattr(Unembedding, name, broken)
    for module in (ties, cpu):
        monkeypatch.setattr(module, "tie_threshold", broken)
    monkeypatch.setattr(ties, "TIE_ROUNDINGS", float("nan"))
    assert same_bits(case.read("reference"), before)
    assert reference.logits(case.hidden, case.head).equal(logits)
    with pytest.raises(AssertionError, match="the reference called"):
        case.read("cpu")
