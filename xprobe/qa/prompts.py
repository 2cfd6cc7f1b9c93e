"""Prompts as token ids, with exact token spans for context, question, gold answer and template.

A span is found through the tokenizer's character offsets and believed only after decoding it again: byte-level BPE
that splits a Thai letter in three, SentencePiece that normalises, tokenizers that glue a space to the next word all
give spans that hold the text and no whole token more. An example that cannot be verified is skipped and reported.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xprobe.errors import ModelError, PromptError
from xprobe.qa.records import Example, printable
from xprobe.qa.templates import Template

TOO_LONG = "longer than the model's window"
NOT_VERIFIED = "token span could not be verified by decoding"
# arguments for chat templates that would otherwise change with the day, or open a "thinking" block before the answer
CHAT_ARGUMENTS = {"date_string": "26 Jul 2024", "enable_thinking": False}

Span = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """An example as token ids: prompt, then the gold answer, teacher-forced.

    ``spans`` maps ``context``, ``answer_in_context`` and ``question`` to (start, stop) token positions; positions of
    the prompt outside context and question belong to the template. ``ids[length:]`` are the answer's tokens.
    """

    example: Example
    ids: tuple[int, ...]
    length: int  # tokens of the prompt, without the answer
    spans: dict[str, Span]

    @property
    def targets(self) -> tuple[int, ...]:
        """The gold answer's token ids y_1..y_n."""
        return self.ids[self.length :]

    @property
    def answer_positions(self) -> range:
        """Positions whose *next* token is y_t; the first one is the last prompt token."""
        return range(self.length - 1, len(self.ids) - 1)

    @property
    def template_positions(self) -> list[int]:
        taken = {at for name in ("context", "question") for at in range(*self.spans[name])}
        return [at for at in range(self.length) if at not in taken]


@dataclass(frozen=True)
class Skipped:
    """An example that no prompt could be made of, and why."""

    example: Example
    reason: str  # one of TOO_LONG, NOT_VERIFIED: what is counted
    detail: str

    def __str__(self) -> str:
        return printable(f"{self.example.id}: {self.reason} ({self.detail})")


def is_chat(template: Template, tokenizer: Any) -> bool:
    """Whether ``template`` goes through the tokenizer's chat template.

    Raises
    ------
    PromptError
        ``chat`` is asked for and the tokenizer has no chat template.
    """
    has_one = bool(getattr(tokenizer, "chat_template", None))
    if template.format == "chat" and not has_one:
        raise PromptError("the tokenizer has no chat template: use --template plain, or auto")
    return has_one and template.format != "plain"


def build_prompts(
    examples: Sequence[Example], tokenizer: Any, template: Template, window: int | None
) -> tuple[list[Prompt], list[Skipped]]:
    """Token ids and verified spans of every example; examples that do not fit or cannot be verified are set aside.

    Parameters
    ----------
    window : int, optional
        Longest input of the model, in tokens; None if it has no bound.

    Raises
    ------
    ModelError
        The tokenizer gives no character offsets.
    PromptError
        The chat template fails, or does not hold the message as it was given.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "the tokenizer gives no character offsets, so token spans cannot be found: "
            "save it in the fast format (tokenizer.json) first"
        )
    if not examples:
        return [], []
    chat = is_chat(template, tokenizer)
    between = _chat_separator(tokenizer) if chat else None
    rendered = [_render(example, tokenizer, template, chat) for example in examples]
    answers = [
        (template.separator_for(example.context_language) if between is None else between) + example.answer
        for example in examples
    ]
    heads = _encode(tokenizer, [text for text, _ in rendered], special=not chat)
    texts = [text + answer for (text, _), answer in zip(rendered, answers, strict=True)]
    wholes = _encode(tokenizer, texts, special=not chat)
    prompts: list[Prompt] = []
    skipped: list[Skipped] = []
    for example, (text, places), (ids, offsets), (whole, _), words in zip(
        examples, rendered, heads, wholes, answers, strict=True
    ):
        answer = _answer_ids(tokenizer, ids, whole, words)
        try:
            spans = {name: _find_span(tokenizer, ids, offsets, text, place) for name, place in places.items()}
            _verify_answer(tokenizer, answer, example.answer)
        except _Unverified as why:
            skipped.append(Skipped(example, NOT_VERIFIED, str(why)))
            continue
        if window is not None and len(ids) + len(answer) > window:
            skipped.append(Skipped(example, TOO_LONG, f"{len(ids) + len(answer)} tokens, window {window}"))
            continue
        prompts.append(Prompt(example, (*ids, *answer), len(ids), spans))
    return prompts, skipped


class _Unverified(Exception):
    """What did not decode to what."""


def _render(example: Example, tokenizer: Any, template: Template, chat: bool) -> tuple[str, dict[str, Span]]:
    """The prompt's text, and the character spans of context, question and gold answer in it."""
    pieces = template.pieces(example.context_language, example.context, example.question)
    message = "".join(text for _, text in pieces)
    if chat:
        prompt = _apply_chat(tokenizer, [{"role": "user", "content": message}], add_generation_prompt=True)
        if prompt.count(message) != 1:
            raise PromptError(
                f"the chat template does not hold the message of {example.id} exactly once as given, "
                "so spans cannot be found: use --template plain"
            )
        at = prompt.index(message)
    else:
        cue = template.cue_for(example.context_language)
        prompt, at = f"{message}\n{cue}" if cue else message, 0
    places: dict[str, Span] = {}
    for name, text in pieces:
        if name != "template":
            places[name] = (at, at + len(text))
        at += len(text)
    start = places["context"][0] + example.answer_start
    places["answer_in_context"] = (start, start + len(example.answer))
    return prompt, places


def _apply_chat(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **CHAT_ARGUMENTS
        )
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise PromptError(f"the tokenizer's chat template failed ({error}): use --template plain") from error


def _chat_separator(tokenizer: Any) -> str:
    """The blanks that the chat template puts between the generation prompt and the assistant's words."""
    user, marker = {"role": "user", "content": "a"}, "answer"
    prompt = _apply_chat(tokenizer, [user], add_generation_prompt=True)
    try:
        whole = _apply_chat(tokenizer, [user, {"role": "assistant", "content": marker}], add_generation_prompt=False)
    except PromptError:
        return ""
    if not whole.startswith(prompt):
        return ""
    between = whole[len(prompt) :].split(marker)[0]
    return between if between.isspace() else ""


def _encode(tokenizer: Any, texts: list[str], *, special: bool) -> list[tuple[list[int], list[Span]]]:
    """(ids, character offsets) of every text, without the special tokens that a tokenizer may put at the end."""
    encoded = tokenizer(
        texts, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True, padding=False
    )
    result = []
    for ids, offsets, mask in zip(
        encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
    ):
        stop = len(ids)
        while special and stop and mask[stop - 1] and offsets[stop - 1][0] == offsets[stop - 1][1]:
            stop -= 1
        result.append((list(ids[:stop]), [(int(a), int(b)) for a, b in offsets[:stop]]))
    return result


def _answer_ids(tokenizer: Any, prompt: list[int], whole: list[int], answer: str) -> list[int]:
    """The answer's tokens as they follow the prompt: tokenised together, or alone where the two would be merged."""
    if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
        return whole[len(prompt) :]
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])


def _find_span(tokenizer: Any, ids: list[int], offsets: list[Span], text: str, place: Span) -> Span:
    """Tokens that hold a character of ``text[place]``, verified by decoding."""
    start, stop = place
    inside = [at for at, (a, b) in enumerate(offsets) if a < stop and b > start and a < b]
    if not inside:
        raise _Unverified(f"no token holds {_short(text[start:stop])}")
    first, last = inside[0], inside[-1] + 1
    decoded = _plain(tokenizer.decode(ids[first:last], clean_up_tokenization_spaces=False)).strip("\ufffd")
    covered = text[min(offsets[at][0] for at in inside) : max(offsets[at][1] for at in inside)]
    if _plain(text[start:stop]) not in decoded or decoded not in _plain(covered):
        raise _Unverified(f"{_short(text[start:stop])} decodes to {_short(decoded)}")
    return first, last


def _verify_answer(tokenizer: Any, ids: list[int], answer: str) -> None:
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""
    if not ids or _plain(decoded) != _plain(answer):
        raise _Unverified(f"answer {_short(answer)} decodes to {_short(decoded)}")


def _plain(text: str) -> str:
    """Text without what tokenizers may change and give back: blanks, case, compatibility forms, format characters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if not c.isspace() and unicodedata.category(c) != "Cf")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:18]} … {text[-18:]}")
