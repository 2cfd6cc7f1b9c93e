"""Heads are measured correctly in every dtype, or refused; blocks with any form of output are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import COMMON, tiny_model
from support.prompts import chosen, family_of_prompts, forced, prompt, requests
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from xprobe.capture.engine import Engine
from xprobe.errors import ModelError, ParityError
from xprobe.models.anatomy import inspect
from xprobe.models.parity import check_parity
from xprobe.models.streaming.stand_ins import BlockRunner

PROMPTS = [prompt(9, 3, 0), prompt(20, 2, 1), prompt(30, 4, 2)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = {"hidden_size": 32, "vocab_size": 160, "num_hidden_layers": 4}


def with_logits_changed(model: Any, change: Any) -> Any:
    """``model`` with code after the head, as in some custom models."""

    class Custom(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

    model.__class__ = Custom
    return model


def model_of_type(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def parity_bound(dtype: torch.dtype) -> float:
    return 1e-4 if dtype.itemsize >= 4 else 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.05, 0.97, 1.001, 3.7])
def test_a_scale_outside_the_configuration_is_measured(dtype, scale):
    model = with_logits_changed(tiny_model("llama", dtype=dtype), lambda logits: logits * scale)
    anatomy = inspect(model)
    assert anatomy.head.scale == pytest.approx(scale, rel=2e-5 if dtype.itemsize >= 4 else 5e-3)
    assert check_parity(model, anatomy, forced(PROMPTS)) < parity_bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_that_is_a_quotient_of_configuration_entries_is_exact(dtype):
    options = {**COMMON, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
               "v_head_dim": 8, "num_key_value_heads": 4, "dim_model_base": 12}  # fmt: skip
    assert inspect(model_of_type("minicpm3", dtype, **options)).head.scale == 12 / 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [1.5, 7.0])
def test_a_soft_cap_outside_the_configuration_is_measured(dtype, cap):
    model = with_logits_changed(tiny_model("llama", dtype=dtype), lambda logits: cap * torch.tanh(logits / cap))
    anatomy = inspect(model)
    assert anatomy.head.softcap == pytest.approx(cap, rel=1e-3 if dtype.itemsize >= 4 else 0.1)
    assert check_parity(model, anatomy, forced(PROMPTS)) < parity_bound(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_caps_under_other_names_are_recognised(dtype):
    options = {**COMMON, "lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 16,
               "logits_soft_cap": 2.0}  # fmt: skip
    anatomy = inspect(model := model_of_type("recurrent_gemma", dtype, **options))
    assert anatomy.head.softcap == 2.0
    assert check_parity(model, anatomy, forced(PROMPTS)) < parity_bound(dtype)


def test_the_soft_cap_of_xlstm_is_recognised():
    model = model_of_type("xlstm", **SIZES, num_heads=4, chunk_size=8, output_logit_soft_cap=2.0)
    assert inspect(model).head.softcap == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_outside_of_all_modules_is_measured(dtype):
    bias = torch.linspace(-2, 2, 160)
    model = with_logits_changed(tiny_model("llama", dtype=dtype), lambda logits: logits + bias.to(logits.dtype))
    anatomy = inspect(model)
    assert anatomy.head.bias is not None
    assert float((anatomy.head.bias.float() - bias).abs().max()) < (1e-4 if dtype == torch.float32 else 2e-2)
    assert check_parity(model, anatomy, forced(PROMPTS)) < parity_bound(dtype)


def masked(value: float, dtype: torch.dtype) -> Any:
    """A model that gives two tokens the same low logit, as Chameleon does with its image tokens."""

    def mask(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., [3, 77]] = value
        return logits

    return with_logits_changed(tiny_model("llama", dtype=dtype), mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-torch.inf, -1e38])
def test_masked_tokens_keep_their_logit(dtype, value):
    model = masked(value, dtype)  # outside the range of fp16, where it becomes -inf
    anatomy = inspect(model)
    assert anatomy.head.bias is not None
    assert [float(anatomy.head.bias[token]) < -1e37 for token in (3, 4, 77)] == [True, False, True]
    assert check_parity(model, anatomy, forced(PROMPTS)) < parity_bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_within_the_range_of_logits_is_refused(dtype):
    with pytest.raises(ModelError, match="does to its logits what"):
        inspect(masked(-1e4, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_logits_than_rows_of_the_head_are_refused(dtype):
    model = with_logits_changed(
        tiny_model("llama", dtype=dtype), lambda logits: torch.cat([logits, logits[..., :4] + 3], -1)
    )
    with pytest.raises(ModelError, match="gives 164 logits for each token, and its head has 160 rows"):
        inspect(model)


def test_padding_rows_of_a_head_are_dropped():
    model = with_logits_changed(tiny_model("llama"), lambda logits: logits[..., :150])
    anatomy = inspect(model)
    assert anatomy.head.vocab_size == 150
    low = [p for p in PROMPTS if max(p.targets) < 150]
    assert low
    assert check_parity(model, anatomy, forced(low)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.sigmoid(),
        lambda logits: logits - logits.mean(-1, keepdim=True) * 2,
        lambda logits: logits.log_softmax(-1) * torch.linspace(0.5, 1, 160),
    ],
)
def test_other_operations_than_bias_scale_and_cap_are_refused(dtype, change):
    with pytest.raises(ModelError, match="does to its logits what"):
        inspect(with_logits_changed(tiny_model("llama", dtype=dtype), change))


@pytest.mark.parametrize("wrong", [{"scale": 1.05}, {"softcap": 3.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_in_16_bit_detects_a_wrong_scale_and_a_wrong_cap(wrong, dtype):
    """The tolerance is a multiple of the rounding error on these rows, not a share of the largest logit."""
    from dataclasses import replace

    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(8)  # logits as large as those of real models
    model = model.to(dtype)
    anatomy = inspect(model)
    assert check_parity(model, anatomy, forced(PROMPTS)) < 0.1
    with pytest.raises(ParityError, match="off the model's own"):
        check_parity(model, replace(anatomy, head=replace(anatomy.head, **wrong)), forced(PROMPTS))


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_with_fp32_logits_from_16_bit_products_are_read(kind, dtype):
    model = model_of_type(kind, dtype, **SIZES, state_size=8, expand=2, time_step_rank=4)
    assert check_parity(model, inspect(model), forced(PROMPTS)) < 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-3])
def test_the_epsilon_of_a_layer_norm_is_recognised(dtype, eps):
    model = tiny_model("gpt2", dtype=dtype)
    model.transformer.ln_f.eps = eps
    anatomy = inspect(model)
    assert (anatomy.head.norm, anatomy.head.eps) == ("layer", eps)
    assert check_parity(model, anatomy, forced(PROMPTS)) < parity_bound(dtype)


def test_a_model_that_counts_two_layers_for_each_block_is_read():
    options = {**COMMON, "num_layers": 3, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
               "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "moe_topk": 2,
               "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "zero_expert_num": 1, "head_dim": 8}  # fmt: skip
    options.pop("num_hidden_layers")
    model = model_of_type("longcat_flash", **options)
    anatomy = inspect(model)
    assert model.config.num_hidden_layers == 6
    assert anatomy.n_layers == 4
    assert check_parity(model, anatomy, forced(PROMPTS)) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gemma3", "gpt2", "bloom", "llama_tied", "gemma2"])
@pytest.mark.parametrize("size", [300.0, 3000.0])
def test_large_channels_as_in_real_models_are_read(family, dtype, size):
    """Rounding error and tolerance grow with the channels. A saturated soft-cap is still recognised."""
    if dtype == torch.float16 and size > 1000:
        pytest.skip("its states exceed what fp16 holds")
    model = tiny_model(family, dtype=dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] = size
    anatomy = inspect(model)
    assert anatomy.head.softcap == (3.0 if family == "gemma2" else None)
    check_parity(model, anatomy, forced(PROMPTS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_default_epsilon_of_torch_is_recognised(dtype):
    model = tiny_model("llama", dtype=dtype)
    model.model.norm = nn.RMSNorm(32, dtype=dtype)
    anatomy = inspect(model)
    computed_in = torch.promote_types(dtype, torch.float32)
    assert (anatomy.head.norm, anatomy.head.eps) == ("rms", torch.finfo(computed_in).eps)
    assert check_parity(model, anatomy, forced(PROMPTS)) < parity_bound(dtype)


# -- blocks with any form of output ----------------------------------------------------------------------------


class OwnConfig(PretrainedConfig):
    model_type = "of-our-own"

    def __init__(self, form: str = "tensor", **options: Any) -> None:
        self.hidden_size, self.vocab_size, self.num_hidden_layers, self.form = 32, 160, 4, form
        super().__init__(**options)


class OwnBlock(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.mix = form, nn.Linear(32, 32)

    def forward(self, stream: torch.Tensor, flag: bool = True) -> Any:
        left = stream + torch.tanh(self.mix(stream.cumsum(1) / 10))
        return {"tensor": left, "tuple": (left, None), "list": [left], "dict": {"stream": left, "loss": None}}[
            self.form
        ]


class OwnDecoder(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(160, 32)
        self.stack = nn.ModuleList(OwnBlock(config.form) for _ in range(4))
        self.norm = nn.LayerNorm(32)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        stream = self.embed(input_ids)
        for block in self.stack:
            out = block(flag=True, stream=stream)  # by keyword, under an unusual name
            stream = out["stream"] if isinstance(out, dict) else out if isinstance(out, torch.Tensor) else out[0]
        return self.norm(stream)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config: OwnConfig, outputs: str = "object") -> None:
        super().__init__(config)
        self.model, self.lm_head, self.outputs = OwnDecoder(config), nn.Linear(32, 160, bias=False), outputs
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = self.lm_head(self.model(input_ids))
        return {"object": CausalLMOutput(logits=logits), "tuple": (logits,), "dict": {"logits": logits}}[self.outputs]


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
@pytest.mark.parametrize("outputs", ["object", "tuple", "dict"])
def test_blocks_called_by_keyword_and_outputs_of_any_form_are_read(form, outputs):
    torch.manual_seed(0)
    model = OwnModel(OwnConfig(form), outputs).eval()
    anatomy = inspect(model)
    assert anatomy.names["blocks"] == "model.stack"
    assert check_parity(model, anatomy, forced(PROMPTS)) < 1e-4
    engine = Engine(model, anatomy, 1000)
    assert chosen(engine, family_of_prompts()) == "plain"  # a sum over earlier tokens is not attention
    rows = engine.capture(requests(family_of_prompts()))["answer"]
    assert bool(rows.isfinite().all())


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_blocks_with_any_form_of_output_run_one_at_a_time(form):
    torch.manual_seed(0)
    model = OwnModel(OwnConfig(form)).eval()
    ids = torch.arange(10, 18)[None]
    anatomy = inspect(model)
    block_runner = BlockRunner(model, anatomy.blocks, ids)
    hidden = None
    for index in range(4):
        _, hidden = block_runner.run_block(index, {"input_ids": ids}, hidden)
    with torch.inference_mode():
        wanted = model(ids).logits
        assert torch.allclose(model.lm_head(model.model.norm(hidden)), wanted, atol=1e-6)


def test_an_error_in_the_models_own_code_names_the_model():
    model = tiny_model("llama")
    model.model.layers[1].mlp.forward = lambda hidden: hidden["nothing"]
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be run on a short prompt .* its own code fails"):
        inspect(model)


def test_heads_with_more_than_a_norm_and_a_projection_are_refused():
    options = {**COMMON, "is_decoder": True}
    with pytest.raises(ModelError, match=r"changes the hidden state between|unknown module"):
        inspect(model_of_type("roberta", **options))
