"""A tiny Llama that says nonsense, and whose certainty hangs on chosen words of the prompt.

Every token has a constant and a *weight*. One block attends to all tokens alike and adds the mean of their weights; the
head gives one nonsense word a head start that grows with this mean. So the model says the nonsense word whatever it is
asked, and the log-probability of doing so falls as words with a weight leave the prompt. With the weight on the gold
answers the model retrieves perfectly; with random weights on all words it retrieves nothing.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from support.families import write_set

FILLERS = [f"{first}{second}o" for first in "BDFGKLMNPRSTVZ" for second in "aeiu"]
GOLD = ["Quila", "Xerro"]
NONSENSE = "blabla"
QUESTIONS = ["who", "what", "where", "when"]


def retrieval_set(folder: Path, languages: tuple[str, ...] = ("en", "de"), paragraphs: int = 6) -> Path:
    """Three sentences of fillers to a context, with the gold answer at another place in each."""
    draw = random.Random(5)
    rows = []
    for paragraph in range(paragraphs):
        words = draw.sample(FILLERS, 24)
        place = 2 + 3 * paragraph
        words[place : place + len(GOLD)] = GOLD
        context = " ".join(" ".join(words[start : start + 8]) + "." for start in (0, 8, 16))
        rows += [(context, f"{question} ?", " ".join(GOLD)) for question in QUESTIONS[:2]]
    return write_set(folder, {language: rows for language in languages}, "retrieval")


def retrieval_model(folder: Path, *, retrieves: bool) -> Path:
    """Saves the model. ``retrieves``: the weight is on the gold words; otherwise every filler has a random one."""
    random_weights = {word: random.Random(word).random() for word in FILLERS}
    weights = dict.fromkeys(GOLD, 1.0) if retrieves else random_weights
    return _save(folder, {2: weights}, {NONSENSE: (2.0, 8.0)})


def reading_model(folder: Path, question_block: int, answer_block: int) -> Path:
    """Saves a model that reads the question's words in one block and the gold words in another (counted from 1)."""
    words = {question_block: dict.fromkeys(QUESTIONS, 1.0), answer_block: dict.fromkeys(GOLD, 1.0)}
    return _save(folder, words, {GOLD[0]: (0.0, 8.0)})


def _save(folder: Path, read: dict[int, dict[str, float]], says: dict[str, tuple[float, float]]) -> Path:
    """``read``: by block, the weight of each word that it reads. ``says``: by word, how its logit grows with the
    constant, and with what any block has read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "?", ".", NONSENSE, *GOLD, *QUESTIONS, *FILLERS]
    vocabulary = {word: at for at, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=max(4, max(read) + 1),
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=False,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 1.0  # the constant
        for place, (block, weights) in enumerate(read.items()):
            for word, weight in weights.items():
                embedding[vocabulary[word], 1 + place] = weight
            attention = model.model.layers[block - 1].self_attn
            attention.v_proj.weight[0, 1 + place] = 1.0
            attention.o_proj.weight[4 + place, 0] = 1.0
            for word, (constant, gain) in says.items():
                model.lm_head.weight[vocabulary[word], 0] = constant
                model.lm_head.weight[vocabulary[word], 4 + place] = gain
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
