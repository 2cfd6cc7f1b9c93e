"""Tiny random models of many families: at every layer the lens equals the model's own norm and head."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, random_ids, tiny_model
from support.prompts import forced, prompt
from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig, PretrainedConfig
from xprobe_kernels import lens

from xprobe.errors import ModelError, ParityError
from xprobe.models.anatomy import inspect, watch_states
from xprobe.models.configuration import window
from xprobe.models.parity import check_parity


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def double(family):
    """(model, anatomy) of the family in fp64."""
    model = tiny_model(family, dtype=torch.float64)
    return model, inspect(model)


def own_lens(model, anatomy, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ``hidden`` from the model's own final norm and head.

    A hook replaces the last block's output by ``hidden`` in a forward pass. So the model's own code computes everything
    after the blocks (norm, projection, bias, scale, soft-cap).
    """

    def replaced(module, args, output):
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        return rows if isinstance(output, torch.Tensor) else (rows, *output[1:])

    hook = anatomy.blocks[-1].register_forward_hook(replaced)
    try:
        with torch.inference_mode():
            return model(input_ids=random_ids(1, hidden.shape[0]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        hook.remove()


def states_of(model, anatomy, ids: torch.Tensor) -> list[torch.Tensor]:
    states: list[torch.Tensor] = []
    with torch.inference_mode(), watch_states(anatomy.blocks, lambda layer, hidden: states.append(hidden.clone())):
        model(input_ids=ids, use_cache=False)
    return states


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_lens_equals_the_models_own_norm_and_head_at_every_layer(double, backend):
    model, anatomy = double
    states = states_of(model, anatomy, random_ids(1, 12))
    assert len(states) == anatomy.n_layers == 5
    for state in states:
        rows = state[0]
        wanted = own_lens(model, anatomy, rows)
        gold = torch.arange(10, 22)
        values = lens(rows, anatomy.head, gold, backend=backend)
        assert torch.allclose(values.log_probability[:, 0], wanted.gather(1, gold[:, None])[:, 0], rtol=0, atol=1e-6)
        entropy = -(wanted.exp() * wanted.nan_to_num(neginf=0.0)).sum(-1)
        assert torch.allclose(values.entropy, entropy, rtol=0, atol=1e-6)
        rank = 1 + (wanted > wanted.gather(1, gold[:, None])).sum(-1)
        assert torch.equal(values.rank[:, 0], rank)


def test_hooks_get_the_states_of_output_hidden_states_below_the_last_layer(double):
    model, anatomy = double
    ids = random_ids(1, 12)
    states = states_of(model, anatomy, ids)
    with torch.inference_mode():
        shown = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(shown) == len(states)
    for own, theirs in zip(states[:-1], shown[:-1], strict=True):
        assert torch.equal(own, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_holds(family, dtype):
    model = tiny_model(family, dtype=dtype)
    error = check_parity(model, inspect(model), forced([prompt(9, 3, 0), prompt(20, 2, 1)]))
    assert error < (1e-3 if dtype == torch.float32 else 0.2)


def test_parity_fails_with_the_head_of_another_model(family):
    model = tiny_model(family)
    anatomy = inspect(model)
    other = inspect(tiny_model(family, seed=1))
    with pytest.raises(ParityError, match="off the model's own log-probabilities"):
        check_parity(model, type(anatomy)(anatomy.blocks, other.head, anatomy.names), forced([prompt(9, 3, 0)]))


def test_parity_refuses_nan_in_a_single_prompt():
    model = tiny_model("llama")
    anatomy = inspect(model)
    item = prompt(9, 3, 0)
    with torch.no_grad():
        model.get_input_embeddings().weight[item.ids[9]] = float("nan")
    with pytest.raises(ParityError, match="NaN at answer positions"):
        check_parity(model, anatomy, forced([item]))


def test_no_hook_is_left_on_the_model(family):
    model = tiny_model(family)
    inspect(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("kind", "word"), [("bert", "later tokens"), ("xlm-roberta", "later tokens")])
def test_encoders_are_refused(kind, word):
    from support.families import COMMON
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON)).eval()
    with pytest.raises(ModelError, match=word):
        inspect(model)


def test_a_head_that_does_more_than_scale_and_cap_is_refused():
    model = tiny_model("llama")

    class CubedLogits(torch.nn.Linear):
        def forward(self, rows):
            return super().forward(rows).pow(3)

    head = CubedLogits(32, 160, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(ModelError, match="scale and soft-cap"):
        inspect(model)


def test_an_unknown_norm_is_refused():
    model = tiny_model("llama")

    class MaximumNorm(torch.nn.Module):
        def forward(self, rows):
            return rows / rows.abs().max(-1, keepdim=True).values

    model.model.norm = MaximumNorm()
    with pytest.raises(ModelError, match="neither RMSNorm nor LayerNorm"):
        inspect(model)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (MptConfig(max_seq_len=64), 64),
        (MptConfig(max_seq_len=64, max_position_embeddings=4096), 64),
        (GPT2Config(n_positions=128), 128),
        (LlamaConfig(max_position_embeddings=512), 512),
        (LlamaConfig(max_position_embeddings=512, seq_length=64), 512),
        (PretrainedConfig(seq_length=64, auto_map={"AutoConfig": "own.Own"}), 64),
        (PretrainedConfig(max_seq_length=64), 64),
        (BloomConfig(seq_length=64), None),
    ],
    ids=["mpt", "mpt with two names", "gpt2", "llama", "length in training", "own code", "max_seq_length", "bloom"],
)
def test_the_window_is_found_by_the_name_that_the_family_gives_it(config, tokens):
    assert window(config) == tokens
