"""The parity check costs the same for long prompts, and still finds a head that it reads wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.families import FAMILIES, random_ids
from transformers import AutoConfig, AutoModelForCausalLM

from xprobe.errors import ParityError
from xprobe.models.anatomy import inspect
from xprobe.models.parity import MOST_TOKENS, TeacherForced, check_parity


def test_a_long_prompt_is_shortened_and_a_wrong_head_is_found_on_it():
    options = {**FAMILIES["llama"][1], "max_position_embeddings": 4096}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options)).eval()
    anatomy = inspect(model)
    ids = tuple(random_ids(1, 3003)[0].tolist())
    prompt = TeacherForced(ids[:3000], ids[2998:3001])
    lengths = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        assert check_parity(model, anatomy, [prompt]) < 1e-3
    finally:
        hook.remove()
    assert lengths == [MOST_TOKENS]
    wrong = replace(anatomy, head=replace(anatomy.head, scale=3.0))
    with pytest.raises(ParityError):
        check_parity(model, wrong, [prompt])
