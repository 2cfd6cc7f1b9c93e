"""Tiny GGUF files of Llama's architecture, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.families import tiny_tokenizer

HEADS, KV_HEADS, WIDTH, BLOCKS, FEED_FORWARD = 4, 2, 64, 3, 96
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiny_llama(**options: Any) -> Any:
    """A random Llama whose vocabulary is that of ``write_gguf``'s tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        intermediate_size=FEED_FORWARD, vocab_size=len(tiny_tokenizer("byte_bpe")), max_position_embeddings=512,
        rms_norm_eps=1e-5, **options,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)  # so that attention is sharp and positions matter
    return model


def write_gguf(
    path: Path,
    model: Any,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    splitting: str = "default",
) -> Path:
    """Writes ``model`` with further ``keys`` (without the architecture's name) and ``tensors``; ``splitting`` is the
    name of its tokenizer's rule for words."""
    from gguf import GGUFWriter, TokenType

    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for name, value in (keys or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
        add[type(value)](f"llama.{name}", value)
    tokenizer = tiny_tokenizer("byte_bpe")
    words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL if word in ("<s>", "</s>") else TokenType.NORMAL for word in words])
    writer.add_token_merges([" ".join(pair) for pair in _merges(tokenizer)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(_name(name), _as_stored(name, value))
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    import json

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{suffix}"
    block, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{NAMES[rest]}.{suffix}"


def _as_stored(name: str, value: torch.Tensor) -> np.ndarray:
    """llama.cpp turns neighbouring dimensions of queries and keys, where transformers turns halves."""
    rows = value.float().numpy()
    for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
        if part in name:
            half = rows.shape[0] // heads // 2
            rows = rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)
    return np.ascontiguousarray(rows)
