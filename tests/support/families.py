"""Tiny random models, one per family of decoders, and tiny tokenizers of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

COMMON = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 160, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLD = {
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "vocab_size": 160,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 160,
       "max_position_embeddings": 64}  # fmt: skip

# name -> (model_type, configuration): heads with bias, scale, soft-cap, gamma offset, tied weights, no norm, projection
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", COMMON),
    "llama_tied": ("llama", {**COMMON, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", COMMON),
    "qwen3": ("qwen3", {**COMMON, "head_dim": 8}),
    "gemma2": ("gemma2", {**COMMON, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**COMMON, "head_dim": 8, "sliding_window": 8}),
    "mistral": ("mistral", {**COMMON, "sliding_window": 8}),
    "phi": ("phi", COMMON),
    "phi3": ("phi3", COMMON),
    "gpt2": ("gpt2", OLD),
    "gptj": ("gptj", {**OLD, "rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "vocab_size": 160,
                            "max_position_embeddings": 64, "attention_types": [[["global", "local"], 2]],
                            "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("gpt_neox", COMMON),
    "olmo": ("olmo", COMMON),
    "olmo2": ("olmo2", COMMON),
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 160}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4, "vocab_size": 160}),
    "opt": ("opt", {**OPT, "word_embed_proj_dim": 32}),
    "opt_projected": ("opt", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 160, "max_seq_len": 64}),
    "cohere": ("cohere", {**COMMON, "logit_scale": 0.0625}),
    "granite": ("granite", {**COMMON, "logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "mixtral": ("mixtral", {**COMMON, "num_local_experts": 4}),
    "stablelm": ("stablelm", COMMON),
    "smollm3": ("smollm3", COMMON),
    "gemma": ("gemma", {**COMMON, "head_dim": 8}),
    "glm4": ("glm4", {**COMMON, "head_dim": 8}),
    "gpt_oss": ("gpt_oss", {**COMMON, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                            "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "exaone4": ("exaone4", {**COMMON, "sliding_window": 8, "sliding_window_pattern": 4}),
    "cohere2": ("cohere2", {**COMMON, "logit_scale": 0.0625, "sliding_window": 8}),
    "qwen3_moe": ("qwen3_moe", {**COMMON, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 16}),
    "internlm3": ("internlm3", COMMON),
    "deepseek_v3": ("deepseek_v3", {**COMMON, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1,
                                    "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
                                    "moe_intermediate_size": 16, "first_k_dense_replace": 2}),
    "lfm2": ("lfm2", {**COMMON, "block_ff_dim": 48, "block_multiple_of": 8, "full_attn_idxs": [1, 3]}),
}  # fmt: skip
# those that the installed transformers knows: the oldest that xprobe takes lacks some
FAMILIES = {name: family for name, family in FAMILIES.items() if family[0] in CONFIG_MAPPING_NAMES}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """A random model of a family, with norms, biases and every other parameter moved away from its neutral value.

    ``sizes`` replace entries of its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model_type, options = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**options, **sizes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the fused experts know no fp64
    return model.to(dtype)


def random_ids(rows: int, length: int, seed: int = 0, vocab_size: int = 160) -> torch.Tensor:
    return torch.randint(10, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def training_texts() -> list[str]:
    """The built-in set's contexts and questions in all languages: what the tiny tokenizers are trained on."""
    from xprobe.qa.parallel import load_data

    records = load_data("builtin").records
    return [text for by_id in records.values() for r in by_id.values() for text in (r.context, r.question)]


def tiny_tokenizer(kind: str) -> Any:
    """A tokenizer trained on the built-in set.

    ``byte_bpe``: byte-level BPE with few merges (splits Thai and Hindi letters); ``byte_bpe_large``: with merges
    across letters; ``metaspace_bpe``: BPE with a glued space and byte fallback, as SentencePiece BPE; ``unigram``:
    SentencePiece Unigram with NFKC normalisation; ``words``: whole words, unknown ones lost.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    texts = training_texts()
    if kind.startswith("byte_bpe"):
        size = 300 if kind == "byte_bpe" else 6000
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "metaspace_bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        ])  # fmt: skip
        bytes_ = [f"<0x{value:02X}>" for value in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special + bytes_, limit_alphabet=80)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(vocab_size=3000, special_tokens=special, unk_token="<unk>")
    elif kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=2000, special_tokens=special)
    else:
        raise ValueError(kind)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_tiny_model(folder: Path, family: str = "llama", *, window: int = 4096, seed: int = 0) -> Path:
    """A folder with a tiny random model and a byte-level tokenizer, as ``save_pretrained`` writes them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer("byte_bpe")
    torch.manual_seed(seed)
    model_type, options = FAMILIES[family]
    options = {**options, "vocab_size": len(tokenizer), "max_position_embeddings": window}
    options |= {"max_seq_len": window} if "max_seq_len" in options else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_set(folder: Path, languages: dict[str, list[tuple[str, str, str]]], name: str = "toy") -> Path:
    """A parallel set in SQuAD format: per language a list of (context, question, answer), ids by position."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, items in languages.items():
        paragraphs: dict[str, list[dict]] = {}
        for at, (context, question, answer) in enumerate(items):
            answers = [{"text": answer, "answer_start": context.index(answer)}]
            paragraphs.setdefault(context, []).append({"id": f"q{at}", "question": question, "answers": answers})
        data = [{"title": "t", "paragraphs": [{"context": c, "qas": qas} for c, qas in paragraphs.items()]}]
        text = json.dumps({"version": "1.1", "data": data}, ensure_ascii=False)
        (folder / f"{name}.{language}.json").write_text(text, encoding="utf-8")
    return folder
