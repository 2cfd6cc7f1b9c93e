"""A tiny Llama with a latent language: it first says the English answer, then the one in the language of the prompt.

The residual stream has one direction per token ("this token is here"), one per token again ("this token comes next")
and a constant. In block ``english`` the MLP reads the cue that ends the prompt and adds the English answer; in block
``own`` it adds more of the answer in the language that the cue names. The constant lets a number win where neither has
been added. Attention is off.
"""

from __future__ import annotations

from math import exp, sqrt
from pathlib import Path

import torch

from support.families import write_set

ANSWERS = {"en": "north", "de": "north", "ru": "север", "zh": "北"}  # de: the same token as in English
FILLERS = [f"filler{i}" for i in range(12)]
NUMBER = "40"
N_BLOCKS = 8
WORDS = ["<unk>", "?", NUMBER, *FILLERS, *dict.fromkeys(ANSWERS.values()), *(f"{language}cue" for language in ANSWERS)]
WIDTH = -(-(2 * len(WORDS) + 1) // 4) * 4  # here: 0..n-1, next: n..2n-1, constant: 2n
WEIGHTS = 0.2, 4.0  # of the English answer and of the own one


def latent_set(folder: Path, languages: tuple[str, ...] = tuple(ANSWERS), paragraphs: int = 4) -> Path:
    """Two questions on each paragraph; all have the same answer, in every language its own."""
    rows = {
        language: [
            (f"{' '.join(FILLERS[: 3 + paragraph])} {ANSWERS[language]} {FILLERS[paragraph]}", f"{question} ?",
             ANSWERS[language])
            for paragraph in range(paragraphs)
            for question in FILLERS[:2]
        ]
        for language in languages
    }  # fmt: skip
    return write_set(folder, rows, "latent")


def latent_template(folder: Path) -> Path:
    """A plain template whose cue names the language."""
    path = folder / "latent.toml"
    cues = "\n".join(f'{language} = "{language}cue"' for language in ANSWERS)
    path.write_text(f'format = "plain"\nprompt = "{{context}} {{question}}"\n[cue]\n{cues}\n')
    return path


def latent_model(folder: Path, english: int, own: int) -> Path:
    """Saves the model. Blocks are counted from 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    n = len(WORDS)
    config = LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=N_BLOCKS, num_attention_heads=1, num_key_value_heads=1, head_dim=WIDTH,
        intermediate_size=n, vocab_size=n, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :n] = torch.eye(n)
        model.model.embed_tokens.weight[:, 2 * n] = 1.0
        for block, weight in zip((english, own), WEIGHTS, strict=True):
            mlp = model.model.layers[block - 1].mlp
            mlp.gate_proj.weight[:, :n] = torch.eye(n)
            mlp.up_proj.weight[:, :n] = torch.eye(n)
            for language, answer in ANSWERS.items():
                following = ANSWERS["en"] if block == english else answer
                mlp.down_proj.weight[n + vocabulary[following], vocabulary[f"{language}cue"]] = weight
        model.lm_head.weight[:, n : 2 * n] = torch.eye(n)
        model.lm_head.weight[vocabulary[NUMBER], 2 * n] = 0.1
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def latent_shares() -> tuple[float, float, float]:
    """p(own) / (p(English) + p(own)) before both blocks, after the English one, and after both: in closed form."""
    stated = [0.0, 0.0]  # how far the state points to the English and to the own answer
    shares = [0.5]
    for place, weight in enumerate(WEIGHTS):
        gate = sqrt(WIDTH / (2 + sum(value**2 for value in stated)))  # the cue after the norm, beside the constant
        stated[place] = weight * gate**2 / (1 + exp(-gate))
        scale = sqrt(WIDTH / (2 + sum(value**2 for value in stated)))
        shares.append(1 / (1 + exp((stated[0] - stated[1]) * scale)))
    return shares[0], shares[1], shares[2]
