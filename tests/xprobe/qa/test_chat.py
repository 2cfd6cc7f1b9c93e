"""Chat templates: where the answer begins, how reasoning is kept from coming first, and that no prompt holds today."""

from __future__ import annotations

import datetime
from functools import lru_cache

import pytest
from support.families import tiny_tokenizer

from xprobe.errors import PromptError
from xprobe.qa.chat import CLOSED_BY_TEMPLATE, CLOSED_BY_XPROBE, DATE, NO_REASONING, SWITCHED_OFF, ChatFormat
from xprobe.qa.parallel import load_data
from xprobe.qa.prompts import build_prompts, describe_format
from xprobe.qa.templates import load_template

tokenizer_of = lru_cache(tiny_tokenizer)


def template(answer: str, prompt: str, before: str = "") -> str:
    """A chat template that writes ``answer`` for the assistant's turn and ``prompt`` to begin one."""
    return (
        before + "{% for m in messages %}{% if m.role == 'user' %}{{ '<u>' + m.content + '</u>' }}"
        "{% elif m.role == 'assistant' %}" + answer + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


def chat_format(source: str) -> ChatFormat:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = source
    return ChatFormat.from_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("answer", "prompt", "tail"),
    [
        (r"{{ '<a>\n' + m.content }}", r"{{ '<a>\n' }}", "<a>\n"),
        (r"{{ '<a>\n' + m.content }}", "{{ '<a>' }}", "<a>\n"),
        (r"{{ '<a>\n' + m.content | trim }}", "{{ '<a>' }}", "<a>\n"),
        ("{{ '<a> ' + m.content }}", "{{ '<a>' }}", "<a> "),
        ("{{ '<a><|channel|>final<|message|>' + m.content }}", "{{ '<a>' }}", "<a><|channel|>final<|message|>"),
        ("{{ '<a><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}", "{{ '<a>' }}", "<a><|START_RESPONSE|>"),
        ("{{ '<a>' + m.content }}", "", "<a>"),  # the template knows no generation prompt
        ("{{ raise_exception('no dialogues') }}", r"{{ '<a>\n' }}", "<a>\n"),
        ("{{ '<a>' + m.content + m.content }}", "{{ '<a>' }}", "<a>"),
        ("", "{{ '<a>' }}", "<a>"),
        ("{{ '<a>' + m.content[0].text }}", "{{ '<a>' }}", "<a>"),
        ("{{ '<a>\n' + m.content }}", "{{ '<a> ' }}", "<a> "),  # blanks that contradict: as the model is asked
    ],
)
def test_all_that_the_template_writes_up_to_the_answer_belongs_to_the_prompt(answer, prompt, tail):
    chat = chat_format(template(answer, prompt))
    assert (chat.before, chat.tail) == ("<u>", f"</u>{tail}")
    assert chat.date is None


@pytest.mark.parametrize("kind", ["byte_bpe", "byte_bpe_large", "metaspace_bpe"])
@pytest.mark.parametrize("end", ["\n", "<|channel|>final<|message|>\n"])
def test_the_answers_first_token_is_the_first_of_its_words(kind, end):
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = template(f"{{{{ '<s>assistant{end}' + m.content + '</s>' }}}}", "<s>assistant")
    examples = load_data("builtin", ["en", "th"]).examples(["x-x"])
    prompts, skipped = build_prompts(examples, tokenizer, load_template("chat"), None)
    assert not skipped
    for example, prompt in zip(examples, prompts, strict=True):
        assert tokenizer.decode(prompt.ids[: prompt.length]).endswith(f"assistant{end}")
        assert tokenizer.decode(prompt.targets) == example.answer
        assert tokenizer.decode(prompt.targets[:1]).strip()


def test_a_template_that_contradicts_itself_about_the_answers_place_is_refused():
    with pytest.raises(PromptError, match=r"'</u><a>'.*'</u><b>'.*--template plain"):
        chat_format(template("{{ '<b>' + m.content }}", "{{ '<a>' }}"))


@pytest.mark.parametrize(
    "opened", ["<analysis>", "<cot>", "<rationale>", "<思考>", "[unused16]", "<|reserved_7|>", "Plan:"]
)
def test_what_only_the_generation_prompt_opens_is_refused_whatever_its_name(opened):
    """A dialogue shows the answer without it, so the answer would stand inside of something that is not known."""
    with pytest.raises(PromptError, match=r"where the answer begins is not known.*--template plain|reasoning block"):
        chat_format(template(r"{{ '<a>\n' + m.content }}", "{{ '<a>\n" + opened + "\n' }}"))


@pytest.mark.parametrize("source", ["{{ messages[0].content }}{{ messages[0].content }}", "none", "{% if %}"])
def test_a_template_that_doubles_or_loses_the_message_or_is_none_is_refused(source):
    with pytest.raises(PromptError, match="--template plain"):
        chat_format(source)


def test_a_template_that_wants_a_system_message_or_contents_in_parts_gets_them():
    wants_system = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    assert chat_format(template("{{ '<a>' + m.content }}", "<a>", wants_system)).tail == "</u><a>"
    parts = template("{{ '<a>\n' + m.content[0].text }}", "<a>").replace(
        "'<u>' + m.content", "'<u>' + m.content[0].text"
    )
    assert chat_format(parts).tail == "</u><a>\n"


OFF = r"{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("answer", "prompt", "before", "tail", "reasoning"),
    [
        # a switch of any name and kind
        (r"{{ '<a>\n<think>\n\n</think>\n\n' + m.content }}", r"{{ '<a>\n' }}" + OFF, "",
         "<a>\n<think>\n\n</think>\n\n", SWITCHED_OFF),
        ("{{ '<a></think>' + m.content }}", "<a>{{ '<think>' if thinking else '</think>' }}",
         "{% if not thinking is defined %}{% set thinking = true %}{% endif %}", "<a></think>", SWITCHED_OFF),
        ("{{ '<a>' + m.content }}", "<a>{% if on %}<think>{% else %}<think></think>{% endif %}",
         "{% set on = enable_reasoning | default(true) %}", "<a><think></think>", SWITCHED_OFF),
        ("{{ '<a><|START_RESPONSE|>' + m.content }}",
         "<a>{% if reasoning is defined and not reasoning %}<|START_THINKING|><|END_THINKING|>{% else %}"
         "<|START_THINKING|>{% endif %}", "",
         "<a><|START_THINKING|><|END_THINKING|><|START_RESPONSE|>", SWITCHED_OFF),
        ("{{ '<a>' + m.content }}", "<a>{% if thinking_budget != 0 %}<think>{% endif %}", "", "<a>", SWITCHED_OFF),
        ("{{ '<a>' + m.content }}", "<a>{% if thinking_mode != 'off' %}<think>{% endif %}", "", "<a>", SWITCHED_OFF),
        ("{{ '<a>' + m.content }}", "<a>{% if not no_thinking %}<think>{% endif %}", "", "<a>", SWITCHED_OFF),
        ("{{ '<a>' + m.content }}", "{{ begin(thinking) }}{% if thinking %}{{ '<think>' }}{% endif %}",
         "{% if thinking is not defined %}{% set thinking = true %}{% endif %}"
         "{% macro begin(on) %}{{ '<a>' }}{% endmacro %}", "<a>", SWITCHED_OFF),
        ("{{ '<a>' + m.content }}", "<a>{{ '<think>' if enable_thinking else '' }}",
         "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}{{ enable_thinking }}",
         "<a>", SWITCHED_OFF),
        # no switch: the dialogue shows the empty block
        (r"{{ '<a>\n<think>\n' + '\n</think>\n\n' + m.content }}", r"{{ '<a>\n<think>\n' }}", "",
         "<a>\n<think>\n\n</think>\n\n", CLOSED_BY_TEMPLATE),
        ("{{ '<a><think></think>' + m.content }}", r"{{ '<a>\n<think>\n' }}", "", "<a><think></think>",
         CLOSED_BY_TEMPLATE),
        ("{{ '<a><|channel|>final<|message|>' + m.content }}", "<a><|channel|>analysis<|message|>", "",
         "<a><|channel|>final<|message|>", CLOSED_BY_TEMPLATE),
        # no switch, and the dialogue leaves the block out
        (r"{{ '<a>' + m.content }}", r"{{ '<a><think>\n' }}", "", "<a><think>\n\n</think>\n\n", CLOSED_BY_XPROBE),
        (r"{{ '<a>' + m.content }}", r"{{ '<a><think>' }}", "", "<a><think>\n\n</think>\n\n", CLOSED_BY_XPROBE),
        (r"{{ '<a>' + m.content }}", "{{ '<a><think>' }}", "{% if tools %}{{ '<think></think>' }}{% endif %}",
         "<a><think></think>", CLOSED_BY_XPROBE),  # the family's own empty block
        ("{{ '<a>' + m.content }}", "{{ '<a>[THINK]' }}", "", "<a>[THINK][/THINK]", CLOSED_BY_XPROBE),
        ("{{ '<a>' + m.content }}", "{{ '<a>◁think▷' }}", "", "<a>◁think▷◁/think▷", CLOSED_BY_XPROBE),
        ("{{ '<a>' + m.content }}", "{{ '<a><|begin_of_thought|>' }}", "{% if '<|end_of_thought|>' in '' %}{% endif %}",
         "<a><|begin_of_thought|><|end_of_thought|>", CLOSED_BY_XPROBE),
        ("{{ '<a>' + m.content }}", "{{ '<a><seed:think><seed:reflect>9</seed:reflect>\n' }}", "",
         "<a><seed:think><seed:reflect>9</seed:reflect>\n</seed:think>\n\n", CLOSED_BY_XPROBE),
        # inside of the block in the dialogue as well
        (r"{{ '<a><think>\n' + m.content }}", r"{{ '<a><think>\n' }}", "", "<a><think>\n\n</think>\n\n",
         CLOSED_BY_XPROBE),
        # nothing to close
        ("{{ '<a>' + m.content }}", "{{ '<a><|no_think|>' }}", "", "<a><|no_think|>", NO_REASONING),
        ("{{ '<a>' + m.content }}", "<a>", "Reason inside <think> </think> tags.", "<a>", NO_REASONING),
        ("{{ '<a>' + m.content }}", "<a>", "{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}", "<a>",
         NO_REASONING),
        ("{{ '<a>' + m.content }}", "<a>", "{% if thinking %}{{ raise_exception('x') }}{% endif %}", "<a>",
         NO_REASONING),
    ],
)  # fmt: skip
def test_the_answer_never_stands_inside_a_reasoning_block(answer, prompt, before, tail, reasoning):
    chat = chat_format(template(answer, prompt, before))
    assert chat.tail == f"</u>{tail}"
    assert chat.reasoning == reasoning


def test_a_switch_that_the_template_refuses_is_left_alone():
    refuses = "{% if thinking is defined and not thinking %}{{ raise_exception('always thinks') }}{% endif %}"
    chat = chat_format(template("{{ '<a>' + m.content }}", "<a>", refuses))
    assert (chat.tail, chat.reasoning) == ("</u><a>", NO_REASONING)


@pytest.mark.parametrize("prompt", ["<a><|thinking|>", "<a><|channel|>analysis<|message|>", "<a>Here are my thoughts:"])
def test_a_block_that_cannot_be_closed_is_refused(prompt):
    with pytest.raises(PromptError, match="--template plain"):
        chat_format(template("{{ '<a>' + m.content }}", prompt))


def test_an_added_token_shows_how_a_block_is_closed():
    tokenizer = tiny_tokenizer("byte_bpe")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|think_start|>", "<|think_end|>"]})
    tokenizer.chat_template = template("{{ '<a>' + m.content }}", "{{ '<a><|think_start|>' }}")
    assert ChatFormat.from_tokenizer(tokenizer).tail == "</u><a><|think_start|><|think_end|>"


DATED = "\n  {% if strftime_now is defined %}!{% endif %}{{ strftime_now('%d %B %Y, %A, week %V, %H:%M') }}"
UNLESS_GIVEN = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
IN_A_MACRO = "{% macro today_is() %}{{ 'Today: ' + strftime_now('%Y-%m-%d') }}{% endmacro %}[{{ today_is() }}]"


def on_day(monkeypatch, day: datetime.datetime, source: str) -> ChatFormat:
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return day

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return chat_format(source)


@pytest.mark.parametrize(
    ("before", "text"),
    [
        (DATED, "\n!26 July 2024, Friday, week 30, 00:00"),
        (IN_A_MACRO, "[Today: 2024-07-26]"),
        ("{{ date_string }} {{ current_date }} {{ today_date }}", "26 Jul 2024 26 Jul 2024 26 Jul 2024"),
        (UNLESS_GIVEN + "{{ date_string }}", "26 Jul 2024"),
        ("{{ today.strftime('%d') if today is defined else 'no day' }}", "no day"),
    ],
)  # fmt: skip
def test_a_prompt_is_the_same_on_every_day(monkeypatch, before, text):
    source = template("{{ '<a>' + m.content }}", "<a>", before)
    days = (datetime.datetime(2031, 1, 2, 3, 4), datetime.datetime(2032, 12, 30, 23, 59))
    first, second = (on_day(monkeypatch, day, source) for day in days)
    assert (first.before, first.tail) == (second.before, second.tail)
    assert first.before == f"{text}<u>"


@pytest.mark.parametrize(
    ("before", "text"),
    [
        ("Cutoff: {{ cutoff_date | default('December 2023') }}", "Cutoff: December 2023"),
        ("Cutoff: {{ knowledge_date }}", "Cutoff: "),
        ("{% if include_date %}Today is Friday.{% endif %}", ""),
        ("{% if date %}Today is {{ date }}.{% endif %}", ""),
        ("{{ date | default('1 May 2020') }}", "1 May 2020"),
        ("{% set cutoff_date = 'June 2024' %}{{ cutoff_date }}", "June 2024"),
    ],
)
def test_dates_that_do_not_change_are_left_to_the_template(before, text):
    chat = chat_format(template("{{ '<a>' + m.content }}", "{{ '<a>' }}", before))
    assert chat.before == f"{text}<u>"
    assert chat.date is None


def test_the_manifest_says_which_date_and_how_reasoning_was_kept_out():
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = template("{{ '<a>' + m.content }}", "<a><think>", "{{ strftime_now('%Y') }}")
    wording = load_template("auto")
    assert describe_format(wording, tokenizer) == {"chat": True, "reasoning": CLOSED_BY_XPROBE, "date": DATE}
    assert describe_format(load_template("plain"), tokenizer) == {"chat": False}
    tokenizer.chat_template = template("{{ '<a>' + m.content }}", "<a>")
    assert describe_format(wording, tokenizer) == {"chat": True, "reasoning": NO_REASONING, "date": None}
