"""Prompts: spans hold their text and nothing more, answers follow, examples that do not fit are skipped."""

from __future__ import annotations

import copy
import unicodedata
from dataclasses import replace
from functools import lru_cache

import pytest
from support.families import tiny_tokenizer

from xprobe.errors import ModelError, PromptError
from xprobe.qa.parallel import load_data
from xprobe.qa.prompts import MESSAGE_CHANGED, NOT_VERIFIED, TOO_LONG, Prompt, build_prompts
from xprobe.qa.templates import Template, load_template

KINDS = ("byte_bpe", "byte_bpe_large", "metaspace_bpe", "unigram")
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
BRACKETS = (  # strips the message and puts a blank before the assistant's words, as Llama 2 does
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' </s>' }}{% endif %}{% endfor %}"
)


trained_tokenizer = lru_cache(tiny_tokenizer)


def new_tokenizer(kind: str):
    """A copy that a test may change; training one takes a quarter of a second."""
    return copy.deepcopy(trained_tokenizer(kind))


def in_brackets(example) -> str:
    pieces = load_template("chat").pieces(example.context_language, example.context, example.question)
    return f"<s>[INST] {''.join(text for _, text in pieces)} [/INST]"


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return new_tokenizer(request.param)


@pytest.fixture(scope="module")
def examples():
    return load_data("builtin").examples(["en-x", "x-x"])


@pytest.fixture(scope="module")
def plain_prompts(tokenizer, examples):
    """The prompts of all examples in plain text."""
    prompts, skipped = build_prompts(examples, tokenizer, load_template("plain"), None)
    assert not skipped
    return prompts


@pytest.fixture(scope="module")
def chat_prompts(tokenizer, examples):
    """The prompts of all examples through a chat template."""
    tokenizer.chat_template = CHATML
    prompts, skipped = build_prompts(examples, tokenizer, load_template("chat"), None)
    assert not skipped
    return prompts


def squeeze(text: str) -> str:
    """Without blanks, and in the compatibility form that SentencePiece models store."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def decoded(tokenizer, prompt: Prompt, name: str) -> str:
    return tokenizer.decode(prompt.ids[slice(*prompt.spans[name])], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_every_span_of_every_language_decodes_to_its_text(tokenizer, examples, template, request):
    prompts = request.getfixturevalue(f"{template}_prompts")
    assert [p.example for p in prompts] == examples
    for prompt in prompts:
        example = prompt.example
        wanted = {"context": example.context, "question": example.question, "answer_in_context": example.answer}
        for name, text in wanted.items():
            assert squeeze(text) in squeeze(decoded(tokenizer, prompt, name)), (example.id, name)
        assert squeeze(tokenizer.decode(prompt.targets)) == squeeze(example.answer)


def test_no_token_of_a_span_could_be_left_out(tokenizer, plain_prompts):
    for prompt in plain_prompts:
        if prompt.example.setting == "en-x":
            continue  # its questions and answers are those of x-x
        for name, text in (("question", prompt.example.question), ("answer_in_context", prompt.example.answer)):
            start, stop = prompt.spans[name]
            for shorter in (prompt.ids[start + 1 : stop], prompt.ids[start : stop - 1]):
                left = tokenizer.decode(shorter, clean_up_tokenization_spaces=False)
                assert squeeze(text) not in squeeze(left), (prompt.example.id, name)


def test_the_gold_answer_lies_inside_the_context_and_the_context_before_the_question(plain_prompts):
    for prompt in plain_prompts:
        (start, stop), (first, last) = prompt.spans["context"], prompt.spans["answer_in_context"]
        assert start <= first < last <= stop
        assert stop <= prompt.spans["question"][0] < prompt.length
        data = stop - start + prompt.spans["question"][1] - prompt.spans["question"][0]
        assert len(prompt.template_positions) == prompt.length - data


def test_each_answer_position_is_followed_by_its_target(plain_prompts):
    for prompt in plain_prompts:
        assert [prompt.ids[position + 1] for position in prompt.answer_positions] == list(prompt.targets)
        assert prompt.answer_positions[0] == prompt.length - 1


def test_prompt_tokens_are_what_the_model_would_see_without_the_answer(tokenizer, chat_prompts):
    for prompt in chat_prompts[:20]:
        text = tokenizer.decode(prompt.ids[: prompt.length], skip_special_tokens=False)
        assert squeeze(text).removesuffix("<unk>").endswith("<s>assistant")  # the unigram has no line break
        assert squeeze(prompt.example.question) in squeeze(text)


def test_prompts_on_one_context_share_their_beginning(plain_prompts):
    first = plain_prompts[0]
    stop = first.spans["context"][1]
    group = [prompt for prompt in plain_prompts if prompt.example.group == first.example.group]
    assert len(group) == 36  # three questions in twelve languages
    assert {prompt.ids[: stop - 1] for prompt in group} == {first.ids[: stop - 1]}


@pytest.mark.parametrize("kind", ["byte_bpe", "byte_bpe_large", "metaspace_bpe"])
def test_the_blank_that_a_chat_template_puts_before_the_answer_is_kept_and_is_no_target_of_its_own(kind):
    tokenizer = new_tokenizer(kind)
    tokenizer.chat_template = BRACKETS
    examples = load_data("builtin", ["en", "de"]).examples(["x-x"])
    prompts, skipped = build_prompts(examples, tokenizer, load_template("chat"), None)
    assert not skipped
    for example, prompt in zip(examples, prompts, strict=True):
        seen = tokenizer(f"{in_brackets(example)} {example.answer}", add_special_tokens=False)["input_ids"]
        assert list(prompt.ids) == seen
        assert tokenizer.decode(prompt.targets[:1]).strip()  # a blank alone, or glued to the answer's first word


def test_a_blank_that_is_a_token_of_its_own_belongs_to_the_prompt():
    tokenizer = new_tokenizer("byte_bpe")  # knows no merge of a blank and a capital M
    tokenizer.chat_template = BRACKETS
    example = load_data("builtin", ["en"]).examples(["en-x"], limit=1)[0]
    (prompt,), _ = build_prompts([example], tokenizer, load_template("chat"), None)
    assert tokenizer.decode(prompt.targets) == example.answer == "Marta Velin"
    assert tokenizer.decode(prompt.ids[: prompt.length]).endswith("[/INST] ")


def test_examples_longer_than_the_window_are_set_aside_and_never_cut():
    tokenizer = new_tokenizer("byte_bpe")
    examples = load_data("builtin", ["en", "th"]).examples(["x-x"], limit=3)
    whole, none = build_prompts(examples, tokenizer, load_template("plain"), None)
    assert not none
    window = max(len(p.ids) for p in whole) - 1
    kept, skipped = build_prompts(examples, tokenizer, load_template("plain"), window)
    assert {s.reason for s in skipped} == {TOO_LONG}
    assert [p.ids for p in kept] == [p.ids for p in whole if len(p.ids) <= window]
    assert str(window) in skipped[0].detail
    exact, skipped = build_prompts(examples, tokenizer, load_template("plain"), window + 1)
    assert len(exact) == len(examples)
    assert not skipped


def test_a_span_that_does_not_decode_to_its_text_is_reported_and_the_rest_goes_on():
    tokenizer = new_tokenizer("words")  # loses words it has not seen
    examples = load_data("builtin").examples(["x-x"])
    prompts, skipped = build_prompts(examples, tokenizer, load_template("plain"), None)
    assert len(prompts) + len(skipped) == len(examples)
    assert skipped
    assert {s.reason for s in skipped} == {NOT_VERIFIED}
    assert all("decodes to" in s.detail or "no token" in s.detail for s in skipped)


def test_end_of_text_tokens_of_the_tokenizer_do_not_end_the_prompt():
    from tokenizers.processors import TemplateProcessing

    tokenizer = new_tokenizer("byte_bpe")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    example = load_data("builtin", ["en"]).examples(["en-x"], limit=1)[0]
    (prompt,), _ = build_prompts([example], tokenizer, load_template("plain"), None)
    assert prompt.ids[0] == 1
    assert 2 not in prompt.ids


def test_chat_format_without_a_chat_template_says_what_to_do():
    tokenizer = new_tokenizer("byte_bpe")
    example = load_data("builtin", ["en"]).examples(["en-x"], limit=1)
    with pytest.raises(PromptError, match="--template plain"):
        build_prompts(example, tokenizer, load_template("chat"), None)


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0]['content'] | upper }}"])
def test_a_chat_template_that_fails_or_changes_the_message_is_refused(template):
    tokenizer = new_tokenizer("byte_bpe")
    tokenizer.chat_template = template
    example = load_data("builtin", ["en"]).examples(["en-x"], limit=1)
    with pytest.raises(PromptError, match="--template plain"):
        build_prompts(example, tokenizer, load_template("chat"), None)


NO_DIGITS = (
    "{% if '1874' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}<u>{{ messages[0]['content'] }}"
)
ESCAPED = "<u>{{ messages[0]['content'] | replace('\u00e4', 'ae') }}</u>"


@pytest.mark.parametrize(("template", "broken"), [(NO_DIGITS, "1874"), (ESCAPED, "\u00e4")])
def test_one_message_that_the_chat_template_changes_or_refuses_is_skipped_and_the_rest_goes_on(template, broken):
    tokenizer = new_tokenizer("byte_bpe")
    tokenizer.chat_template = template
    examples = load_data("builtin", ["en", "de"]).examples(["x-x"])
    wording = load_template("chat")
    changed = [
        e for e in examples if broken in "".join(t for _, t in wording.pieces(e.language, e.context, e.question))
    ]
    assert 0 < len(changed) < len(examples)
    prompts, skipped = build_prompts(examples, tokenizer, wording, None)
    assert [s.example for s in skipped] == changed
    assert {s.reason for s in skipped} == {MESSAGE_CHANGED}
    assert [p.example for p in prompts] == [e for e in examples if e not in changed]


def test_a_message_that_holds_the_templates_own_words_is_still_found():
    tokenizer = new_tokenizer("byte_bpe")
    tokenizer.chat_template = "Text: Q<{% for m in messages %}{{ m['content'] }}{% endfor %}>Text: Q"
    example = replace(load_data("builtin", ["en"]).examples(["en-x"], limit=1)[0], question="Text: Q")
    wording = Template("auto", {"en": "{context}{question}"}, {"en": ""}, {"en": ""})
    example = replace(example, context="Text: Q", answer="Q", answer_start=6)
    (prompt,), _ = build_prompts([example], tokenizer, wording, None)
    assert tokenizer.decode(prompt.ids[: prompt.spans["context"][0]]) == "Text: Q<"
    assert decoded(tokenizer, prompt, "context") == decoded(tokenizer, prompt, "question") == "Text: Q"
    assert tokenizer.decode(prompt.ids[prompt.spans["question"][1] : prompt.length]) == ">Text: Q"


def test_blanks_around_a_message_that_the_template_trims_do_not_move_the_spans():
    tokenizer = new_tokenizer("byte_bpe")
    tokenizer.chat_template = BRACKETS
    wording = Template("auto", {"en": "{context}\n{question}"}, {"en": ""}, {"en": ""})
    example = load_data("builtin", ["en"]).examples(["en-x"], limit=1)[0]
    padded = replace(
        example,
        context=f"  {example.context}",
        question=f"{example.question} \n",
        answer_start=example.answer_start + 2,
    )
    (trimmed, plain), _ = build_prompts([padded, example], tokenizer, wording, None)
    assert trimmed.ids == plain.ids
    assert trimmed.spans == plain.spans


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="offsets"):
        build_prompts([], Slow(), load_template("plain"), None)
