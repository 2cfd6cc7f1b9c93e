"""A tiny Llama with planted phases: the question is gathered at one known layer, the answer appears at another.

The residual stream has one direction per token ("this token is here"), one per token again ("this token comes next")
and a constant. In the block of a language, the MLP reads which token is here and adds the direction of the token that
follows it in that language's answers; the head reads the "next" directions and gives decoy tokens a head start through
the constant. So every gold token has rank 1 + decoys below its language's layer and rank 1 from it on, without noise;
noise is added to the residual stream where a test asks for it. In one block, if asked for, every token attends to all
before it alike and adds what it saw, each word in a third direction of its own: from there on the last prompt token
knows the question. Attention is off elsewhere.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

from support.families import write_set

N_BLOCKS = 10
DECOYS = [f"decoy{i}" for i in range(12)]


def planted_set(folder: Path, languages: list[str], paragraphs: int = 4, questions: int = 3) -> Path:
    """A set in SQuAD format whose answers are the chains that ``planted_model`` knows: first, second, third word."""
    sets = {}
    for language in languages:
        answer = " ".join(f"{language}{step}" for step in ("first", "second", "third"))
        sets[language] = [
            (f"{' '.join(DECOYS[: 3 + p])} {answer} {DECOYS[p]}", f"{DECOYS[q]} {DECOYS[p]} ?", answer)
            for p in range(paragraphs)
            for q in range(questions)
        ]
    return write_set(folder, sets, "planted")


def planted_template(folder: Path, languages: list[str]) -> Path:
    """A plain template whose cue names the language, so that the model can know it at the answer."""
    path = folder / "planted.toml"
    cues = "\n".join(f'{language} = "{language}cue"' for language in languages)
    path.write_text(f'format = "plain"\nprompt = "{{context}} {{question}}"\n[cue]\n{cues}\n')
    return path


def planted_model(folder: Path, onset: dict[str, int], encoded: int | None = None) -> Path:
    """Saves the model: in language x the answer is readable from layer ``onset[x]`` on (1 to ``N_BLOCKS``), and the
    question is known at the last prompt token from layer ``encoded`` on (never if None)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    chains = {x: [f"{x}cue", *(f"{x}{step}" for step in ("first", "second", "third"))] for x in onset}
    words = ["<unk>", "?", *DECOYS, *(word for chain in chains.values() for word in chain)]
    vocabulary = {word: at for at, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")

    n = len(words)
    width = -(-(3 * n + 1) // 4) * 4  # here: 0..n-1, next: n..2n-1, constant: 2n, seen: 2n+1..3n
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=N_BLOCKS, num_attention_heads=1, num_key_value_heads=1, head_dim=width,
        intermediate_size=n, vocab_size=n, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :n] = torch.eye(n)
        model.model.embed_tokens.weight[:, 2 * n] = 1.0
        for language, chain in chains.items():
            mlp = model.model.layers[onset[language] - 1].mlp
            mlp.gate_proj.weight[:, :n] = torch.eye(n)
            mlp.up_proj.weight[:, :n] = torch.eye(n)
            for here, following in pairwise(chain):
                mlp.down_proj.weight[n + vocabulary[following], vocabulary[here]] = 1.0
        if encoded is not None:  # queries and keys of 0 attend to all alike
            attention = model.model.layers[encoded - 1].self_attn
            attention.v_proj.weight[:n, :n] = torch.eye(n)
            attention.o_proj.weight[2 * n + 1 : 3 * n + 1, :n] = torch.eye(n)
        model.lm_head.weight[:, n : 2 * n] = torch.eye(n)
        for decoy in DECOYS:
            model.lm_head.weight[vocabulary[decoy], 2 * n] = 0.1
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
