"""GGUF files: settings that transformers ignores are applied exactly, or the file is refused by the setting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.families import random_ids
from support.gguf_files import BLOCKS, HEADS, WIDTH, tiny_llama, write_gguf

from xprobe.errors import ModelError
from xprobe.models import gguf, loading

HEAD = WIDTH // HEADS


def read_back(path):
    """The fp32 model that xprobe makes of a GGUF file."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gguf.convert(path)).eval()


def furthest(one, other) -> float:
    """Largest difference between the log-probabilities of two models on one prompt of 300 tokens."""
    ids = random_ids(1, 300, vocab_size=one.config.vocab_size)
    with torch.inference_mode():
        return float((one(ids).logits.log_softmax(-1) - other(ids).logits.log_softmax(-1)).abs().max())


def llama3(factor: float = 8.0) -> dict:
    return {"rope_type": "llama3", "rope_theta": 1e4, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


def frequencies(model) -> np.ndarray:
    """The tensor that llama.cpp's converter writes for a model with Llama 3's scaling."""
    plain = 1e4 ** (-np.arange(0, HEAD, 2) / HEAD)
    return plain / model.model.rotary_emb.inv_freq.numpy()


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_file_gives_the_original_model(tmp_path, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    assert furthest(read_back(write_gguf(tmp_path / "m.gguf", model)), model) < 1e-4


@pytest.mark.usefixtures("empty_cache")
def test_rotary_frequencies_of_llama_3_are_applied(tmp_path):
    model = tiny_llama(rope_parameters=llama3())
    factors = frequencies(model)
    assert factors.max() > 4  # so the frequencies differ from those of a plain model
    path = write_gguf(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": factors})
    assert furthest(tiny_llama(), model) > 0.1
    assert furthest(read_back(path), model) < 1e-4


@pytest.mark.usefixtures("empty_cache")
def test_linear_scaling_is_applied(tmp_path):
    model = tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert furthest(tiny_llama(), model) > 0.1
    assert furthest(read_back(write_gguf(tmp_path / "m.gguf", model, keys)), model) < 1e-4


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.type": "none"},
        {"rope.scaling.factor": 1.0, "rope.scaling.finetuned": False},
        {"logit_scale": 1.0, "attention.key_length": HEAD, "expert_count": 0},
    ],
)
def test_neutral_settings_are_accepted(tmp_path, keys):
    model = tiny_llama()
    assert furthest(read_back(write_gguf(tmp_path / "m.gguf", model, keys)), model) < 1e-4


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("keys", "setting"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "llama.rope.scaling.type = yarn"),
        ({"rope.scaling.type": "longrope"}, "llama.rope.scaling.type = longrope"),
        ({"rope.scaling.attn_factor": 0.5}, "llama.rope.scaling.attn_factor = 0.5"),
        ({"logit_scale": 0.5}, "llama.logit_scale = 0.5"),
        ({"attention.scale": 0.25}, "llama.attention.scale = 0.25"),
        ({"attention.sliding_window": 128}, "llama.attention.sliding_window = 128"),
        ({"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping = 30.0"),
        ({"embedding_scale": 12.0}, "llama.embedding_scale = 12.0"),
    ],
)
def test_settings_that_would_be_lost_are_refused_by_name(tmp_path, keys, setting):
    with pytest.raises(ModelError, match="does not read from GGUF files") as caught:
        gguf.convert(write_gguf(tmp_path / "m.gguf", tiny_llama(), keys))
    assert setting in str(caught.value)
    with pytest.raises(ModelError):  # the cache holds no folder of this file
        gguf.convert(tmp_path / "m.gguf")


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("factors", [np.ones(3), np.ones(HEAD), np.zeros(HEAD // 2)])
def test_rotary_frequencies_of_the_wrong_number_or_value_are_refused(tmp_path, factors):
    with pytest.raises(ModelError, match=f"rope_freqs.weight must hold {HEAD // 2} numbers above 0"):
        gguf.convert(write_gguf(tmp_path / "m.gguf", tiny_llama(), tensors={"rope_freqs.weight": factors}))


@pytest.mark.usefixtures("empty_cache")
def test_a_model_that_looks_at_later_tokens_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"llama.attention.causal = false"):
        gguf.convert(write_gguf(tmp_path / "m.gguf", tiny_llama(), {"attention.causal": False}))


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(("rule", "count"), [("deepseek-llm", 1), ("starcoder", 1), ("llama-bpe", 0), ("default", 0)])
def test_an_unknown_rule_for_splitting_words_leads_to_a_warning_at_every_load(tmp_path, rule, count):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), splitting=rule)
    for _ in range(2):  # the first load converts, the second uses the cache
        warnings: list[str] = []
        loading.load(loading.resolve(str(path)), warnings=warnings)
        assert len([message for message in warnings if f"{rule!r}" in message]) == count


@pytest.mark.usefixtures("empty_cache")
def test_rotary_frequencies_together_with_another_scaling_are_refused(tmp_path):
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    tensors = {"rope_freqs.weight": np.full(HEAD // 2, 2.0)}
    with pytest.raises(ModelError, match="yarn"):
        gguf.convert(write_gguf(tmp_path / "m.gguf", tiny_llama(), keys, tensors))


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q.bias",
        "blk.1.attn_sinks.weight",
        "output.bias",
        "rope_factors_long.weight",
        f"blk.{BLOCKS}.attn_q.weight",
    ],
)
def test_tensors_that_would_be_lost_are_refused_by_name(tmp_path, name):
    with pytest.raises(ModelError, match="holds tensors that transformers does not read") as caught:
        gguf.convert(write_gguf(tmp_path / "m.gguf", tiny_llama(), tensors={name: np.ones(WIDTH)}))
    assert name in str(caught.value)


@pytest.mark.usefixtures("empty_cache")
def test_a_file_without_one_of_its_tensors_is_refused(tmp_path):
    model = tiny_llama()
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(ModelError, match=r"lacks 1 tensor of LlamaForCausalLM \(model.layers.1.mlp.up_proj.weight\)"):
        gguf.convert(write_gguf(tmp_path / "m.gguf", model))
