"""Prompts as token ids, with exact token spans for context, question, gold answer and template.

A span is found through the tokenizer's character offsets and believed only after decoding it again: byte-level BPE
that splits a Thai letter in three, SentencePiece that normalises, tokenizers that glue a space to the next word all
give spans that hold the text and no whole token more. An example that cannot be verified is skipped and reported.
Text of the data is tokenised as text, also where it looks like a control token of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xprobe.errors import ModelError, PromptError
from xprobe.qa.chat import ChangedMessageError, ChatFormat
from xprobe.qa.encoding import ControlTokenError, Span, Text, Tokens, encode_texts
from xprobe.qa.records import Example, printable
from xprobe.qa.templates import Template

TOO_LONG = "longer than the model's window"
NOT_VERIFIED = "token span could not be verified by decoding"
MESSAGE_CHANGED = "message changed by the chat template"
CONTROL_TOKEN = "text that the tokenizer takes for a control token"


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
    reason: str  # one of TOO_LONG, NOT_VERIFIED, MESSAGE_CHANGED, CONTROL_TOKEN: what is counted
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


def describe_format(template: Template, tokenizer: Any) -> dict[str, Any]:
    """What the manifest says of the prompts' form: ``chat``, and for a chat ``reasoning`` and ``date``."""
    if not is_chat(template, tokenizer):
        return {"chat": False}
    chat = ChatFormat.from_tokenizer(tokenizer)
    return {"chat": True, "reasoning": chat.reasoning, "date": chat.date}


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
        The chat template fails, leaves open where the answer begins, or changes every message.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "the tokenizer gives no character offsets, so token spans cannot be found: "
            "save it in the fast format (tokenizer.json) first"
        )
    if not examples:
        return [], []
    chat = ChatFormat.from_tokenizer(tokenizer) if is_chat(template, tokenizer) else None
    outcomes: dict[int, Prompt | Skipped] = {}
    texts: dict[int, Text] = {}
    for index, example in enumerate(examples):
        try:
            texts[index] = _text_of(example, template, chat)
        except ChangedMessageError as error:
            outcomes[index] = Skipped(example, MESSAGE_CHANGED, str(error))
    if not texts:
        raise PromptError(f"the chat template changes every message, the first is {outcomes[0]}: use --template plain")

    for index, result in zip(texts, encode_texts(list(texts.values()), tokenizer, chat=chat is not None), strict=True):
        example = examples[index]
        if isinstance(result, Tokens):
            if window is not None and len(result.ids) > window:
                outcomes[index] = Skipped(example, TOO_LONG, f"{len(result.ids)} tokens, window {window}")
            else:
                outcomes[index] = Prompt(example, result.ids, result.length, result.spans)
        else:
            reason = CONTROL_TOKEN if isinstance(result, ControlTokenError) else NOT_VERIFIED
            outcomes[index] = Skipped(example, reason, str(result))
    in_order = [outcomes[index] for index in range(len(examples))]
    prompts = [outcome for outcome in in_order if isinstance(outcome, Prompt)]
    return prompts, [outcome for outcome in in_order if isinstance(outcome, Skipped)]


def _text_of(example: Example, template: Template, chat: ChatFormat | None) -> Text:
    """The prompt and the gold answer as text.

    Raises
    ------
    ChangedMessageError
        The chat template does not hold the message as it was given.
    """
    language, answer_start = example.context_language, example.answer_start
    pieces = template.pieces(language, example.context, example.question)
    if chat is None:
        cue = template.cue_for(language)
        if cue:
            pieces.append(("template", f"\n{cue}"))
        return Text(tuple(pieces), template.separator_for(language), example.answer, answer_start)
    message = "".join(text for _, text in pieces)
    held = chat.held_message(message)
    leading = message.index(held)
    pieces = _cut(pieces, leading, leading + len(held))
    if pieces[0][0] == "template" and not pieces[0][1]:
        answer_start -= leading  # the context comes first, and the template took blanks away from it
    pieces = [("template", chat.before), *pieces, ("template", chat.tail)]
    return Text(tuple(pieces), "", example.answer, answer_start)


def _cut(pieces: list[tuple[str, str]], start: int, stop: int) -> list[tuple[str, str]]:
    """``pieces`` without the characters outside of ``start`` to ``stop``."""
    cut, at = [], 0
    for name, text in pieces:
        cut.append((name, text[max(start - at, 0) : max(stop - at, 0)]))
        at += len(text)
    return cut
