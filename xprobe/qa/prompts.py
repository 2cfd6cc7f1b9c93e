"""Prompts as token ids, with exact token spans for context, question, gold answer and template.

The tokenizer's character offsets give a span, and decoding verifies it. So the spans are right for byte-level BPE that
splits a Thai letter into three tokens, for SentencePiece that normalises its input, and for tokenizers that join a
space to the next word. A span holds its text and no further token. An example that cannot be verified is skipped and
reported. Text from the data is tokenised as text, even if it looks like a control token of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xprobe.errors import ModelError, PromptError
from xprobe.qa.chat import PLAIN, ChangedMessageError, ChatFormat
from xprobe.qa.encoding import ControlTokenError, Span, Text, Tokens, encode_texts
from xprobe.qa.records import Example, printable
from xprobe.qa.templates import Template

TOO_LONG = "longer than the model's window"
NOT_VERIFIED = "token span could not be verified by decoding"
MESSAGE_CHANGED = "message changed by the chat template"
CONTROL_TOKEN = "text that the tokenizer takes for a control token"


@dataclass(frozen=True)
class Prompt:
    """An example as token ids: the prompt, then the gold answer (teacher forcing).

    Parameters
    ----------
    example : Example
        The example.
    ids : tuple of int
        Token ids of the prompt and of the answer.
    length : int
        Number of tokens of the prompt. ``ids[length:]`` is the answer.
    spans : dict of str to (int, int)
        Token positions (start, stop) of ``context``, ``question`` and ``answer_in_context``. The other positions of the
        prompt belong to the template.
    context_offsets : tuple of (int, int)
        Characters (start, stop) of ``example.context`` that each token of the context holds.

    Examples
    --------
    >>> example = Example("en-x", "en", "q1", "p1", "en", "Ada sold 40 boats", "How many", "40", 9)
    >>> spans = {"context": (0, 4), "question": (4, 6), "answer_in_context": (2, 3)}
    >>> prompt = Prompt(example, (11, 12, 13, 14, 15, 16, 17, 13), 7, spans)
    >>> prompt.targets, prompt.answer_positions, prompt.template_positions
    ((13,), range(6, 7), [6])
    """

    example: Example
    ids: tuple[int, ...]
    length: int
    spans: dict[str, Span]
    context_offsets: tuple[Span, ...] = ()

    @property
    def targets(self) -> tuple[int, ...]:
        """The token ids y_1..y_n of the gold answer."""
        return self.ids[self.length :]

    @property
    def answer_positions(self) -> range:
        """The positions whose *next* token is y_t. The first one is the last prompt token."""
        return range(self.length - 1, len(self.ids) - 1)

    @property
    def template_positions(self) -> list[int]:
        """The positions of the prompt outside context and question."""
        data = {position for name in ("context", "question") for position in range(*self.spans[name])}
        return [position for position in range(self.length) if position not in data]


@dataclass(frozen=True)
class Skipped:
    """An example without a prompt, and why.

    Examples
    --------
    >>> example = Example("en-x", "en", "q1", "p1", "en", "Ada sold 40 boats", "How many", "40", 9)
    >>> print(Skipped(example, TOO_LONG, "900 tokens, window 512"))
    en-x/en/q1: longer than the model's window (900 tokens, window 512)
    """

    example: Example
    reason: str  # TOO_LONG, NOT_VERIFIED, MESSAGE_CHANGED or CONTROL_TOKEN, so that they can be counted
    detail: str

    def __str__(self) -> str:
        return printable(f"{self.example.id}: {self.reason} ({self.detail})")


def is_chat(template: Template, tokenizer: Any) -> bool:
    """Whether ``template`` goes through the tokenizer's chat template.

    Raises
    ------
    PromptError
        The template demands ``chat`` and the tokenizer has no chat template.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from xprobe.qa.templates import load_template
    >>> is_chat(load_template("auto"), SimpleNamespace(chat_template=None))
    False
    >>> is_chat(load_template("auto"), SimpleNamespace(chat_template="{{ messages[0].content }}"))
    True
    """
    has_one = bool(getattr(tokenizer, "chat_template", None))
    if template.format == "chat" and not has_one:
        raise PromptError("the tokenizer has no chat template: use template='plain' (--template plain), or 'auto'")
    return has_one and template.format != "plain"


def describe_format(template: Template, tokenizer: Any) -> dict[str, Any]:
    """The manifest's entries on the form of the prompts: ``chat``, and for a chat ``reasoning`` and ``date``.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from xprobe.qa.templates import load_template
    >>> describe_format(load_template("auto"), SimpleNamespace(chat_template=None))
    {'chat': False}
    """
    if not is_chat(template, tokenizer):
        return {"chat": False}
    chat = ChatFormat.from_tokenizer(tokenizer)
    return {"chat": True, "reasoning": chat.reasoning, "date": chat.date}


def build_prompts(
    examples: Sequence[Example], tokenizer: Any, template: Template, window: int | None
) -> tuple[list[Prompt], list[Skipped]]:
    """The prompts of all examples, with verified spans.

    Parameters
    ----------
    examples : sequence of Example
        What to ask.
    tokenizer : transformers tokenizer
        A fast one, which gives character offsets.
    template : Template
        The wording.
    window : int, optional
        Longest input of the model, in tokens. None if there is no bound.

    Returns
    -------
    prompts : list of Prompt
        In the order of the examples.
    skipped : list of Skipped
        The examples that are too long or cannot be verified.

    Raises
    ------
    ModelError
        The tokenizer gives no character offsets.
    PromptError
        The chat template fails, does not show where the answer begins, or changes every message.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = "[UNK] Ada sold 40 boats . How many ?".split()
    >>> backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    >>> template = Template("plain", {"en": "{context} {question}"}, {"en": ""}, {"en": " "})
    >>> example = Example("en-x", "en", "q1", "p1", "en", "Ada sold 40 boats.", "How many?", "40", 9)
    >>> (prompt,), skipped = build_prompts([example], tokenizer, template, window=None)
    >>> prompt.ids, prompt.length
    ((1, 2, 3, 4, 5, 6, 7, 8, 3), 8)
    >>> prompt.spans["question"], prompt.spans["answer_in_context"]
    ((5, 8), (2, 3))
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
            texts[index] = _prompt_text(example, template, chat)
        except ChangedMessageError as error:
            outcomes[index] = Skipped(example, MESSAGE_CHANGED, str(error))
    if not texts:
        raise PromptError(f"the chat template changes every message, the first is {outcomes[0]}: {PLAIN}")

    for index, result in zip(texts, encode_texts(list(texts.values()), tokenizer, chat=chat is not None), strict=True):
        example = examples[index]
        if isinstance(result, Tokens):
            if window is not None and len(result.ids) > window:
                outcomes[index] = Skipped(example, TOO_LONG, f"{len(result.ids)} tokens, window {window}")
            else:
                offsets = _in_context(result.context_offsets, texts[index], example.context)
                outcomes[index] = Prompt(example, result.ids, result.length, result.spans, offsets)
        else:
            reason = CONTROL_TOKEN if isinstance(result, ControlTokenError) else NOT_VERIFIED
            outcomes[index] = Skipped(example, reason, str(result))
    in_order = [outcomes[index] for index in range(len(examples))]
    prompts = [outcome for outcome in in_order if isinstance(outcome, Prompt)]
    return prompts, [outcome for outcome in in_order if isinstance(outcome, Skipped)]


def _prompt_text(example: Example, template: Template, chat: ChatFormat | None) -> Text:
    """The prompt and the gold answer as text.

    Raises
    ------
    ChangedMessageError
        The chat template changes the message.
    """
    language, answer_start = example.context_language, example.answer_start
    pieces = template.pieces(language, example.context, example.question)
    if chat is None:
        cue = template.cue_for(language)
        if cue:
            pieces.append(("template", f"\n{cue}"))
        return Text(tuple(pieces), template.separator_for(language), example.answer, answer_start)
    message = "".join(text for _, text in pieces)
    rendered = chat.rendered_message(message)
    leading = message.index(rendered)
    pieces = _crop(pieces, leading, leading + len(rendered))
    if pieces[0][0] == "template" and not pieces[0][1]:
        answer_start -= leading  # the context comes first, and the template removed blanks before it
    pieces = [("template", chat.before), *pieces, ("template", chat.tail)]
    return Text(tuple(pieces), "", example.answer, answer_start)


def _in_context(offsets: tuple[Span, ...], text: Text, context: str) -> tuple[Span, ...]:
    """Characters of the context as the data has it; a chat template may have removed blanks before it."""
    removed = context.index(next(piece for name, piece in text.pieces if name == "context"))
    return tuple((start + removed, stop + removed) for start, stop in offsets) if removed else offsets


def _crop(pieces: list[tuple[str, str]], start: int, stop: int) -> list[tuple[str, str]]:
    """``pieces`` without the characters before ``start`` and from ``stop`` on."""
    cropped, position = [], 0
    for name, text in pieces:
        cropped.append((name, text[max(start - position, 0) : max(stop - position, 0)]))
        position += len(text)
    return cropped
