"""A tiny Llama whose causes are known: one block reads the question, another one answers.

In block ``a`` the token "Answer" after the question reads which question word stands in it. In block ``b`` the last
token of the prompt reads this from "Answer", and from then on holds the answer. Each block's attention looks at one
marked token alone, and nothing else is computed. So the question's states matter below layer ``a`` only, and the state
of the last token decides the answer from layer ``b`` on.
"""

from __future__ import annotations

from pathlib import Path

import torch

from support.families import write_set

FILLERS = [f"{first}{second}o" for first in "BDFGKLMNPRSTVZ" for second in "aeiu"]
WORDS = {"en": ["who", "what", "where", "when"], "de": ["wer", "was", "wo", "wann"]}
GOLD = ["Quila", "Xerro", "Yanto", "Zumba"]
CUE = ["Answer", ":"]
COUNT = len(GOLD)
CONSTANT, ASKED, CUED = 0, 1, 2  # dimensions: of every token, of question words, of "Answer"
QUESTION, READ, ANSWER = (3 + step * COUNT for step in range(3))  # first of COUNT dimensions each
WIDTH = 16
SHARP = 1e4


def causes_set(folder: Path, languages: tuple[str, ...] = ("en", "de"), paragraphs: int = 4) -> Path:
    """Four questions to a context of fillers, with the four answers at other places in each."""
    rows: dict[str, list[tuple[str, str, str]]] = {language: [] for language in languages}
    for paragraph in range(paragraphs):
        words = FILLERS[5 * paragraph : 5 * paragraph + 16]
        for place, gold in enumerate(GOLD):
            words.insert((3 * place + paragraph) % 16, gold)
        for language in languages:
            rows[language] += [
                (" ".join(words) + " .", f"{word} ?", gold) for word, gold in zip(WORDS[language], GOLD, strict=True)
            ]
    return write_set(folder, rows, "causes")


def causes_model(folder: Path, question_block: int, answer_block: int, *, reads: bool = True) -> Path:
    """Saves the model. Blocks are counted from 1. ``reads``: whether "Answer" reads the question at all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "?", ".", *CUE, *GOLD, *WORDS["en"], *WORDS["de"], *FILLERS]
    vocabulary = {word: at for at, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=answer_block + 1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=WIDTH, max_position_embeddings=512,
        tie_word_embeddings=False, eos_token_id=1, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},  # the last pair of dimensions does not rotate
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        embedding = model.get_input_embeddings().weight
        embedding[:, CONSTANT] = 1.0
        embedding[vocabulary[CUE[0]], CUED] = 1.0
        for own in WORDS.values():
            for k, word in enumerate(own):
                embedding[vocabulary[word], ASKED] = 1.0
                embedding[vocabulary[word], QUESTION + k] = 1.0
        if reads:
            _looks(model.model.layers[question_block - 1].self_attn, ASKED, QUESTION, READ)
        _looks(model.model.layers[answer_block - 1].self_attn, CUED, READ, ANSWER)
        for k, word in enumerate(GOLD):
            model.lm_head.weight[vocabulary[word], ANSWER + k] = 8.0
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def _looks(attention: torch.nn.Module, marker: int, reads: int, writes: int) -> None:
    """Attention on the tokens with a marker alone, which copies COUNT dimensions to others."""
    still = WIDTH // 2 - 1
    attention.q_proj.weight[still, CONSTANT] = SHARP
    attention.k_proj.weight[still, marker] = SHARP
    for k in range(COUNT):
        attention.v_proj.weight[k, reads + k] = 1.0
        attention.o_proj.weight[writes + k, k] = 1.0
