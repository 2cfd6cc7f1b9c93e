"""A tiny random model of any model type that the installed transformers knows, made from its default configuration.

``tiny_config`` replaces every size that it knows by name, also in nested configurations, and shortens lists that have
one entry per layer. ``EXTRAS`` holds what a family needs beyond that.
"""

from __future__ import annotations

from typing import Any

import torch

LAYERS = 4
VOCABULARY = 300

# name in a configuration -> value; applied where the default configuration has a number there
SIZES: dict[str, int] = {
    # width
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "hidden_size_global": 32, "dim": 32, "emb_dim": 32,
    "embed_dim": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "hidden_size_per_layer_input": 8, "lru_width": 32, "attention_hidden_size": 64,
    "adapter_out_dim": 32, "adapter_in_dim": 32, "backbone_hidden_size": 32, "altup_num_inputs": 2, "laurel_rank": 8,
    # depth
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS, "num_blocks": LAYERS,
    "decoder_layers": LAYERS, "encoder_layers": LAYERS,
    "num_decoder_layers": LAYERS, "num_encoder_layers": LAYERS, "num_layers_per_stack": 2,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "kv_n_heads": 2,
    "head_dim": 8, "attention_head_dim": 16, "kv_channels": 8, "dim_head": 8, "d_kv": 8, "rotary_dim": 4,
    "global_head_dim": 8, "num_global_key_value_heads": 2, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_head_dim": 8, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    # feed-forward
    "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "n_inner": 48,
    "ffn_hidden_size": 48, "dim_ff": 48, "dff": 48, "d_ff": 48, "d_inner": 48, "intermediate_size_mlp": 48,
    "block_ff_dim": 48, "block_multiple_of": 8, "mlp_dim": 48, "feed_forward_size": 48, "encoder_ffn_size": 48,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "top_k_experts": 2,
    "moe_intermediate_size": 16, "expert_ffn_hidden_size": 16, "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16, "shared_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "zero_expert_num": 2, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_layer_start_index": 1, "moe_layer_end_index": LAYERS - 1, "moe_latent_size": 16,
    # latent attention, and indexers: with few heads many keys score exactly 0, and the choice among ties is arbitrary
    "q_lora_rank": 16, "kv_lora_rank": 16, "o_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_head_dim": 16, "v_head_dim": 8, "index_head_dim": 16, "index_n_heads": 16, "index_topk": 8, "o_groups": 2,
    "gated_norm_rank": 8,
    # recurrence and convolution
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_dt_rank": 4, "time_step_rank": 4,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_chunk_size": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "n_mamba_heads": 2, "mamba_ngroups": 1, "mamba_headdim": 8,
    "n_groups": 1, "chunk_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4, "d_rel": 4, "rel_extent": 16,
    # windows and lengths
    "sliding_window": 8, "sliding_window_size": 8, "window_size": 8, "attention_window_size": 8, "block_size": 8,
    "attention_chunk_size": 8, "local_attention_window_len": 8, "local_attention": 8, "keep_window_size": 2048,
    "max_position_embeddings": 4096, "n_positions": 4096, "n_ctx": 4096, "max_seq_len": 4096,
    "max_sequence_length": 4096, "seq_length": 4096, "max_source_positions": 64, "max_target_positions": 4096,
    "model_max_length": 4096,
    # vocabulary
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "decoder_vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY, "num_kv_shared_layers": 2, "ngram_vocab_size_base": 64,
    "ple_embed_dim": 16, "hc_lowrank": 8, "depth": 2, "projection_dim": 32, "image_size": 28,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "eod_token_id": 2}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SPLIT_IN_HALVES = ("mlp_layer_types",)  # other lists alternate between kinds, so that all pairs of kinds occur

# models that cannot predict tokens without another model
NEED_ANOTHER_MODEL = {
    "gemma4_assistant": "a drafter: it needs the key/value cache of the model that it assists",
    "gemma4_unified_assistant": "a drafter: it needs the key/value cache of the model that it assists",
}

# model type -> further entries; a dict for a nested configuration
EXTRAS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4,
                                                                   "mrope_section": [2, 1, 1]}}},
    "blenderbot": {"encoder_layers": 2},  # fewer than decoder layers, as in the published models
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"audio_config": {"adapter_input_size": 32}},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, "<|visual token 000000|>": 7},
             "vq_config": {"base_channels": 32}},
    "llama4_vision_model": {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 16, "swa_num_attention_heads": 4,
                        "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
                        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
                        "layer_types": ["full_attention", "sliding_attention"] * 2,
                        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
    "gemma3n_text": {"intermediate_size": [48] * LAYERS},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                         "vocab_size_per_layer_input": 0, "num_kv_shared_layers": LAYERS}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": LAYERS}},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "prophetnet": {"max_position_embeddings": 512},  # it fills tables of this size squared entry by entry
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 4},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"] * 2},
    "roc_bert": {"shape_embed_dim": 16, "shape_vocab_size": 20, "pronunciation_embed_dim": 16,
                 "pronunciation_vocab_size": 20},
    "rwkv": {"attention_hidden_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"n_mamba_heads": 8, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str, **more: Any) -> Any:
    """The tiny configuration of a model type; ``more`` overrides all other entries."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], {**EXTRAS.get(model_type, {}), **more})


def tiny_model(config: Any, auto_class: Any, seed: int = 0) -> Any:
    """A random fp32 model whose norms, biases and other parameters are moved away from their neutral values."""
    torch.manual_seed(seed)
    model = auto_class.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    return model


def _shrunk(cls: Any, extras: dict[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        default = cls()
    except Exception:  # its defaults contradict each other, or it needs nested configurations
        default = None
    known = default.to_dict() if default is not None else {}
    parts = vars(default) if default is not None else {}
    chosen: dict[str, Any] = {}
    for name, value in known.items():
        if isinstance(value, bool) or name in cls.sub_configs:
            continue
        if name in SIZES and isinstance(value, int) and (value > 0 or name == "hidden_size"):
            chosen[name] = SIZES[name]
        elif name in TOKENS and isinstance(value, int | list):
            chosen[name] = TOKENS[name]
    if {"kv_lora_rank", "num_key_value_heads"} <= chosen.keys():
        chosen["num_key_value_heads"] = SIZES["num_attention_heads"]  # latent attention has no grouped keys
    for name in cls.sub_configs:
        part = parts.get(name)
        if part is None or not hasattr(part, "sub_configs") or name in extras:
            continue
        chosen[name] = _shrunk(type(part), EXTRAS.get(part.model_type, {})).to_dict()
    for name, value in extras.items():
        nested = name in cls.sub_configs and isinstance(value, dict)
        part = CONFIG_MAPPING[value["model_type"]] if nested and "model_type" in value else type(parts.get(name))
        chosen[name] = _shrunk(part, {**EXTRAS.get(part.model_type, {}), **value}).to_dict() if nested else value
    layers = next((chosen[name] for name in DEPTHS if name in chosen), LAYERS)
    before = next((known[name] for name in DEPTHS if name in known), None)
    for name, value in known.items():
        if name not in extras and isinstance(value, list | tuple) and len(value) == before and len(value) > 1:
            chosen[name] = _shortened(name, list(value), layers)
    return cls(**chosen)


def _shortened(name: str, values: list[Any], layers: int) -> list[Any]:
    """One entry per layer of the tiny model, with every kind of entry of the long list if there are enough layers."""
    kinds = list(dict.fromkeys(map(repr, values)))
    first = [values[[repr(v) for v in values].index(kind)] for kind in kinds]
    if name in SPLIT_IN_HALVES:
        return [first[index * len(first) // layers] for index in range(layers)]
    return [first[index % len(first)] for index in range(layers)]


def check_runs(model: Any) -> None:
    """Runs a few tokens. A contradictory configuration fails here, so it is not counted as a fault of xprobe."""
    with torch.inference_mode():
        logits = model(input_ids=torch.randint(10, VOCABULARY, (1, 12)), use_cache=False).logits
    if not bool(torch.isfinite(logits.clamp(-1, 1)).all()):
        raise ValueError("the tiny model gives NaN")
