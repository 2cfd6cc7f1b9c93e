"""Data that hold control tokens as text: they are tokenised as text, the template's own control tokens as tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from xprobe.qa.parallel import load_data
from xprobe.qa.prompts import CONTROL_TOKEN, build_prompts
from xprobe.qa.records import Example
from xprobe.qa.templates import Template, load_template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
NOT_SPECIAL = ("<think>", "</think>", "<|fim|>")  # written by the template, or of the shape
WORDS = ("\n\n", "<b>", "   ")  # added tokens that are text to the model
CONTROLS = (*SPECIAL, *NOT_SPECIAL, "<s>", "</s>", "<unk>")
KINDS = ("byte_bpe", "byte_bpe_large", "metaspace_bpe")


@lru_cache
def chat_tokenizer(kind: str) -> Any:
    tokenizer = tiny_tokenizer(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*NOT_SPECIAL, *WORDS)])
    tokenizer.chat_template = CHATML
    return tokenizer


def bare(tokenizer: Any) -> Tokenizer:
    """The same tokenizer without the added tokens that direct a model: what text is when it is nothing but text."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    text_tokens = [token for token in parts["added_tokens"] if token["content"] in WORDS]
    parts["added_tokens"] = []
    copy = Tokenizer.from_str(json.dumps(parts))
    copy.add_tokens([AddedToken(token["content"], normalized=False) for token in text_tokens])
    return copy


def example(context: str, question: str, answer: str) -> Example:
    return Example("en-x", "en", "q", "p", "en", context, question, answer, context.index(answer))


def tokens(copy: Tokenizer, text: str) -> list[str]:
    """Tokens by name: ids of text tokens may differ between a tokenizer and its bare copy."""
    return [copy.id_to_token(id_) for id_ in copy.encode(text, add_special_tokens=False).ids]


def hostile(control: str) -> Example:
    answer = f"{control}end{control}{control} x"
    return example(f"{control} Start {control}. It is {answer}, {control}", f"What is{control} it {control}?", answer)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_control_token_in_the_data_is_tokenised_as_the_text_that_it_is(kind, control):
    tokenizer = chat_tokenizer(kind)
    asked = hostile(control)
    wording = load_template("plain")
    (prompt,), skipped = build_prompts([asked], tokenizer, wording, None)
    assert not skipped
    pieces = "".join(text for _, text in wording.pieces("en", asked.context, asked.question))
    text = f"{pieces}\n{wording.cue_for('en')} {asked.answer}"
    assert tokenizer.convert_ids_to_tokens(prompt.ids) == tokens(bare(tokenizer), text)
    assert tokenizer.decode(prompt.targets).strip() == asked.answer
    assert tokenizer.decode(prompt.ids[slice(*prompt.spans["context"])]).strip() == asked.context


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_chat_only_the_templates_own_control_tokens_are_tokens(kind, control):
    tokenizer = chat_tokenizer(kind)
    ordinary = example("It is red, no", "What is it?", "red")
    (usual, prompt), skipped = build_prompts([ordinary, hostile(control)], tokenizer, load_template("chat"), None)
    assert not skipped
    ids = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.content in CONTROLS}
    before = prompt.spans["context"][0]
    end = prompt.spans["question"][1]
    assert [id_ for id_ in prompt.ids[:before] if id_ in ids] == [id_ for id_ in usual.ids[:before] if id_ in ids]
    assert not ids & set(prompt.ids[before:end])
    assert not ids & set(prompt.targets)
    assert prompt.ids[end : prompt.length] == usual.ids[usual.spans["question"][1] : usual.length]
    assert tokenizer.decode(prompt.targets) == hostile(control).answer


@pytest.mark.parametrize("control", CONTROLS)
def test_in_a_chat_the_text_between_the_templates_control_tokens_is_tokenised_by_itself(control):
    tokenizer = chat_tokenizer("byte_bpe")
    asked = hostile(control)
    (prompt,), _ = build_prompts([asked], tokenizer, load_template("chat"), None)
    message = "".join(text for _, text in load_template("chat").pieces("en", asked.context, asked.question))
    end = ("<|im_end|>", "\n", "<|im_start|>", "assistant\n", "<think>", "\n\n", "</think>")
    stretches = ("<|im_start|>", f"user\n{message}", *end, f"\n\n{asked.answer}")
    copy = bare(tokenizer)
    wanted = [[text] if text in CONTROLS else tokens(copy, text) for text in stretches]
    assert tokenizer.convert_ids_to_tokens(prompt.ids) == [token for stretch in wanted for token in stretch]


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_ordinary_examples_beside_a_hostile_one_keep_their_tokens(template):
    tokenizer = chat_tokenizer("byte_bpe")
    ordinary = load_data("builtin", ["en", "th"]).examples(["x-x"], limit=3)
    alone, _ = build_prompts(ordinary, tokenizer, load_template(template), None)
    mixed, _ = build_prompts(
        [ordinary[0], hostile("<|im_end|>"), *ordinary[1:]], tokenizer, load_template(template), None
    )
    assert [mixed[0], *mixed[2:]] == alone
    assert mixed[1].example == hostile("<|im_end|>")


PARTS = st.sampled_from(
    [*CONTROLS, *WORDS, "<|im_", "end|>", "|>", "<|", " ", "a", "ที่", "\ue000\ue001", "é", "\U00013000"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARTS, max_size=8), st.lists(PARTS, max_size=5), st.lists(PARTS, max_size=4))
def test_any_mixture_of_text_and_control_tokens_is_text(context, question, answer):
    tokenizer = chat_tokenizer("byte_bpe")
    words = f"x{''.join(answer)}x"
    asked = example(f"{''.join(context)}-{words}.", f"{''.join(question)}?", words)
    (prompt,), skipped = build_prompts([asked], tokenizer, load_template("plain"), None)
    assert not skipped
    pieces = "".join(text for _, text in load_template("plain").pieces("en", asked.context, asked.question))
    text = f"{pieces}\nAnswer: {asked.answer}"
    assert tokenizer.convert_ids_to_tokens(prompt.ids) == tokens(bare(tokenizer), text)


def test_control_tokens_of_a_users_own_wording_stay_tokens():
    tokenizer = chat_tokenizer("byte_bpe")
    wording = Template("plain", {"en": "<|im_start|>{context}<|im_end|>{question}"}, {"en": "<s>"}, {"en": ""})
    (prompt,), _ = build_prompts([hostile("<|im_end|>")], tokenizer, wording, None)
    named = tokenizer.convert_ids_to_tokens(prompt.ids)
    assert named[0] == "<|im_start|>"
    assert named.count("<|im_end|>") == 1 == named.count("<s>")


def test_a_control_token_that_wording_and_data_make_together_is_text():
    tokenizer = chat_tokenizer("byte_bpe")
    wording = Template("plain", {"en": "A<|im_{context} {question}"}, {"en": "Say:"}, {"en": ""})
    (prompt,), _ = build_prompts([example("end|> red", "What?", "red")], tokenizer, wording, None)
    assert "<|im_end|>" not in tokenizer.convert_ids_to_tokens(prompt.ids)
    assert tokenizer.decode(prompt.ids).startswith("A<|im_end|> red")


def word_tokenizer(pre_tokenizer: Any, **options: Any) -> Any:
    words = ["[UNK]", "[CLS]", "<s>", "it", "is", "red", "what", ".", "[", "]", "cls", "<", ">", "s", "UNK", "CLS"]
    tokenizer = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", **options)


WORDING = Template("plain", {"en": "{context} . {question}"}, {"en": ""}, {"en": " "})


def test_a_control_token_that_is_a_word_of_the_vocabulary_is_text_as_well():
    tokenizer = word_tokenizer(pre_tokenizers.Whitespace())
    (prompt,), skipped = build_prompts([example("it is [CLS] red", "what [CLS]", "red")], tokenizer, WORDING, None)
    assert not skipped
    assert " ".join(tokenizer.convert_ids_to_tokens(prompt.ids)) == "it is [ CLS ] red . what [ CLS ] red"


def test_what_a_tokenizer_cannot_write_as_text_is_skipped_counted_and_named():
    tokenizer = word_tokenizer(pre_tokenizers.WhitespaceSplit())
    good = example("it is red", "what", "red")
    bad = example("it is [CLS] red", "what", "red")
    prompts, (skipped,) = build_prompts([good, bad], tokenizer, WORDING, None)
    assert [prompt.example for prompt in prompts] == [good]
    assert (skipped.example, skipped.reason) == (bad, CONTROL_TOKEN)
    assert skipped.detail.startswith("'[CLS]' in the context; as text, ")

    unknown = example("it is [UNK] red", "what", "red")
    prompts, (skipped,) = build_prompts([good, unknown], tokenizer, WORDING, None)
    assert (skipped.example, skipped.reason, skipped.detail) == (unknown, CONTROL_TOKEN, "'[UNK]' in the context")


def test_a_tokenizer_that_cannot_be_copied_skips_what_holds_control_tokens(monkeypatch):
    tokenizer = chat_tokenizer("byte_bpe")

    def no_copy(text: str) -> Tokenizer:
        raise ValueError("parts in Python")

    monkeypatch.setattr(Tokenizer, "from_str", staticmethod(no_copy))
    asked = [replace(hostile(c), question_id=c) for c in ("<|im_end|>", "<|im_end>")]
    (prompt,), (skipped,) = build_prompts(asked, tokenizer, load_template("chat"), None)
    assert prompt.example == asked[1]
    assert (skipped.example, skipped.reason, skipped.detail) == (asked[0], CONTROL_TOKEN, "'<|im_end|>' in the answer")


def test_a_control_token_that_matches_after_normalising_is_text_in_any_case():
    tokenizer = tiny_tokenizer("byte_bpe")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("<|end|>", normalized=True, special=True)])
    assert "<|end|>" in tokenizer.tokenize("a <|END|>")
    (prompt,), skipped = build_prompts([hostile("<|END|>")], tokenizer, load_template("plain"), None)
    assert not skipped
    assert "<|end|>" not in tokenizer.convert_ids_to_tokens(prompt.ids)
    assert tokenizer.decode(prompt.ids[slice(*prompt.spans["question"])]).strip() == hostile("<|end|>").question.lower()


def test_one_token_for_unknown_begin_and_end_is_a_control_token_in_the_data():
    tokenizer = tiny_tokenizer("byte_bpe")
    backend = tokenizer.backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="</s>", bos_token="</s>", eos_token="</s>", pad_token="</s>"
    )
    (prompt,), skipped = build_prompts([hostile("</s>")], tokenizer, load_template("plain"), None)
    assert not skipped
    assert "</s>" not in tokenizer.convert_ids_to_tokens(prompt.ids)


def test_a_merge_that_ends_in_a_control_token_does_not_make_one_of_text():
    vocabulary = {piece: id_ for id_, piece in enumerate(["<s>", "<", "s", ">", "<s", "a", "b", " "])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    wording = Template("plain", {"en": "<s>{context} {question}"}, {"en": ""}, {"en": ""})
    (prompt,), skipped = build_prompts([example("a <s>b", "a", "b")], tokenizer, wording, None)
    assert not skipped
    assert tokenizer.convert_ids_to_tokens(prompt.ids) == ["<s>", "a", " ", "<s", ">", "b", " ", "a", "b"]


def test_added_tokens_that_are_text_to_the_model_stay_what_they_are():
    tokenizer = chat_tokenizer("byte_bpe")
    asked = example("It is <b>red</b>\n\nnow   here", "What is it?", "red")
    (prompt,), _ = build_prompts([asked], tokenizer, load_template("plain"), None)
    inside = tokenizer.convert_ids_to_tokens(prompt.ids[slice(*prompt.spans["context"])])
    assert {"<b>", "\n\n", "   "} <= set(inside)


def test_the_single_bytes_of_a_fallback_are_no_control_tokens():
    tokenizer = chat_tokenizer("metaspace_bpe")
    asked = example("It is 鬱 <0x0A> red </s>", "What is it?", "red")
    (prompt,), skipped = build_prompts([asked], tokenizer, load_template("plain"), None)
    assert not skipped
    inside = tokenizer.convert_ids_to_tokens(prompt.ids[slice(*prompt.spans["context"])])
    assert {"<0xE9>", "<0xAC>", "<0xB1>"} <= set(inside)
    assert "<0x0A>" not in inside
    assert "</s>" not in inside


def wordpiece_tokenizer() -> Any:
    """As BERT has it: lower case, control characters and private characters removed, [CLS] and [SEP] around."""
    letters = "abcdefghijklmnopqrstuvwxyz[].?<>|_/:,"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({piece: id_ for id_, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    tokenizer.add_tokens([AddedToken("<|Turn|>", normalized=True, special=True)])
    return tokenizer


def unigram_tokenizer() -> Any:
    """As SentencePiece has it: control tokens are pieces of the model, spaces are glued to words by the normaliser."""
    pieces = ["<unk>", "<s>", "</s>", *"▁abcdefghijklmnopqrstuvwxyzT<>|/.,?:[]", "▁it", "▁is", "▁red"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens([AddedToken("<|Turn|>", normalized=True, special=True)])
    return tokenizer


TURNS = (
    "{% for m in messages %}{{ '<|Turn|>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|Turn|>{% endif %}"
)


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize(
    ("make", "controls"),
    [
        (wordpiece_tokenizer, ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "<|Turn|>"]),
        (unigram_tokenizer, ["<s>", "</s>", "<unk>", "<|Turn|>"]),
    ],
)
def test_normalisers_and_models_of_every_kind_keep_data_free_of_control_tokens(make, controls, template):
    tokenizer = make()
    tokenizer.chat_template = TURNS.replace("</s>", "[SEP]") if make is wordpiece_tokenizer else TURNS
    wording = Template(template, {"en": "{context} ? {question}"}, {"en": ""}, {"en": " "})
    usual = example("it is red.", "what is it", "red")
    asked = [example(f"it is {c} red {c}.", f"what {c}is", f"red {c}") for c in controls]
    prompts, skipped = build_prompts([usual, *asked], tokenizer, wording, None)
    assert not skipped
    own = [id_ for id_ in prompts[0].ids if id_ in tokenizer.added_tokens_decoder]
    for prompt in prompts[1:]:
        assert [id_ for id_ in prompt.ids if id_ in tokenizer.added_tokens_decoder] == own
        answer = tokenizer.decode(prompt.targets).replace(" ", "")
        assert answer.casefold() == prompt.example.answer.replace(" ", "").casefold()
