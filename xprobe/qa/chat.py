"""The text that a tokenizer's chat template writes before and after a message, up to the first word of the answer.

The template is rendered with placeholders for the message and for the answer. This shows what it writes before, between
and after them. Everything before the answer is part of the prompt: the header of the assistant, a line break or a
channel after it, and the empty reasoning block of a model that would reason first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from jinja2 import nodes

from xprobe.errors import PromptError
from xprobe.qa.reasoning import (
    close_block,
    constants,
    date_variables,
    find_block,
    is_no_reasoning_tag,
    parse,
    switches,
)

DATE = "26 Jul 2024"  # the date that every template is given, so that prompts do not change from day to day
PLAIN = "use template='plain' (--template plain)"

NO_REASONING = "none"
SWITCHED_OFF = "switched off"
CLOSED_BY_TEMPLATE = "closed by the template"
CLOSED_BY_XPROBE = "closed by xprobe"

# what strftime gives for DATE, a Friday, at midnight; in English, whatever the locale
_DIRECTIVES = {
    "%Y": "2024", "%y": "24", "%m": "07", "%-m": "7", "%B": "July", "%b": "Jul", "%h": "Jul", "%d": "26", "%-d": "26",
    "%e": "26", "%j": "208", "%-j": "208", "%A": "Friday", "%a": "Fri", "%w": "5", "%u": "5", "%U": "29", "%W": "30",
    "%V": "30", "%G": "2024", "%H": "00", "%-H": "0", "%I": "12", "%-I": "12", "%M": "00", "%-M": "0", "%S": "00",
    "%-S": "0", "%f": "000000", "%p": "AM", "%z": "", "%Z": "", "%F": "2024-07-26", "%T": "00:00:00", "%R": "00:00",
    "%D": "07/26/24", "%x": "07/26/24", "%X": "00:00:00", "%c": "Fri Jul 26 00:00:00 2024", "%s": "1721952000",
}  # fmt: skip
_FILTERS = " | ".join(f"replace({directive!r}, {text!r})" for directive, text in _DIRECTIVES.items())
# This macro replaces strftime_now inside the template, because transformers turns a function argument into text. Jinja
# drops the line break after the tag.
_FIXED_DATE_MACRO = f"{{% macro strftime_now(format='%Y-%m-%d') %}}{{{{ format | {_FILTERS} }}}}{{% endmacro %}}\n"


class ChangedMessageError(Exception):
    """The chat template changes a message."""


@dataclass(frozen=True)
class _Renderer:
    """A call of the chat template: the arguments, and the form of the messages."""

    tokenizer: Any
    source: str | None  # a template to use instead of the tokenizer's own
    arguments: dict[str, Any]
    system: bool = False  # whether an empty system message comes first
    parts: bool = False  # whether contents are lists of parts

    def render(self, message: str, answer: str | None = None, *, parts: bool | None = None) -> str:
        messages = [{"role": "system", "content": self._content("", self.parts)}] if self.system else []
        messages.append({"role": "user", "content": self._content(message, self.parts)})
        if answer is not None:
            content = self._content(answer, self.parts if parts is None else parts)
            messages.append({"role": "assistant", "content": content})
        own = {} if self.source is None else {"chat_template": self.source}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer is None, **own, **self.arguments
            )
        except Exception as error:  # a template is a program and may raise anything
            reason = " ".join(str(error).split())[:300]
            raise PromptError(f"the tokenizer's chat template failed ({reason}): {PLAIN}") from error

    @staticmethod
    def _content(text: str, parts: bool) -> Any:
        return [{"type": "text", "text": text}] if parts else text


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template writes around a message. The prompt is ``before + message + tail``.

    Parameters
    ----------
    renderer : object
        Calls the template.
    before : str
        Text before the message.
    after : str
        Text after the message in the generation prompt of the template.
    tail : str
        Text after the message in the prompt of xprobe: up to the answer, without an open reasoning block.
    reasoning : str
        How the prompt keeps the model from reasoning first: ``NO_REASONING`` (there is nothing to do),
        ``SWITCHED_OFF``, ``CLOSED_BY_TEMPLATE`` or ``CLOSED_BY_XPROBE``.
    date : str or None
        The date that the template was given, if it uses one.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})), eos_token="</s>")
    >>> tokenizer.chat_template = (
    ...     "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    ...     "{% if add_generation_prompt %}<assistant>{% endif %}"
    ... )
    >>> chat = ChatFormat.from_tokenizer(tokenizer)
    >>> chat.before, chat.tail, chat.reasoning
    ('<user>', '</s><assistant>', 'none')
    """

    renderer: _Renderer
    before: str
    after: str
    tail: str
    reasoning: str
    date: str | None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> ChatFormat:
        """Renders the tokenizer's chat template and reads the texts from the result.

        Raises
        ------
        PromptError
            The template fails, loses or repeats a message, or does not show where the answer begins.
        """
        try:
            source = tokenizer.get_chat_template()
            if not isinstance(source, str):
                raise TypeError(f"it is not text but {type(source).__name__}")
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise PromptError(f"the tokenizer has no usable chat template ({reason}): {PLAIN}") from error
        tree = parse(source)
        message, answer = _placeholders(source)
        renderer, rendered = _find_renderer(tokenizer, source, tree, message)
        before, after = rendered.split(message)
        added_tokens = [str(token.content) for token in tokenizer.added_tokens_decoder.values()]
        dialogue = _text_between(renderer, message, answer)
        tail = _text_before_answer(after, dialogue, lambda text: _close_blocks(text, constants(tree), added_tokens))
        blocks = [find_block(text) for text in (after, dialogue or "")]
        if any(block is not None and block.is_open for block in blocks) and tail not in (after, dialogue):
            reasoning = CLOSED_BY_XPROBE
        elif rendered != _without_switches(renderer, switches(tree), message):
            reasoning = SWITCHED_OFF
        else:
            reasoning = NO_REASONING if find_block(tail) is None else CLOSED_BY_TEMPLATE
        uses_date = "strftime_now" in source or bool(date_variables(tree))
        return cls(renderer, before, after, tail, reasoning, DATE if uses_date else None)

    def rendered_message(self, message: str) -> str:
        """``message`` as the template writes it: unchanged, or without surrounding blanks.

        Raises
        ------
        ChangedMessageError
            The template changes it in another way, or does not write the usual text around it.
        """
        try:
            rendered = self.renderer.render(message)
        except PromptError as error:
            raise ChangedMessageError(str(error)) from error
        for candidate in (message, message.strip()):
            if rendered == self.before + candidate + self.after:
                return candidate
        raise ChangedMessageError("the text that it writes is not the message between its usual header and end")


def _placeholders(source: str) -> tuple[str, str]:
    """A message and an answer that do not occur in the template and that it does not change: digits have no case."""
    message, answer = "4815162342", "2718281828"
    while message in source or answer in source:
        message, answer = f"{message}40", f"{answer}31"
    return message, answer


def _find_renderer(tokenizer: Any, source: str, tree: nodes.Template | None, message: str) -> tuple[_Renderer, str]:
    """A call that the template accepts, and the text that it gives. If possible, one without an open reasoning block.

    Raises
    ------
    PromptError
        No call gives a text with the message exactly once.
    """
    off, dates = switches(tree), dict.fromkeys(date_variables(tree), DATE)
    choices = [{**reasoning, **date} for date in (dates, {}) for reasoning in (off, {})]
    choices = [choice for index, choice in enumerate(choices) if choice not in choices[:index]]
    fixed_source = _FIXED_DATE_MACRO + source if "strftime_now" in source else None
    first_error: PromptError | None = None
    for parts, system in product((False, True), repeat=2):
        usable = []
        for arguments in choices:
            renderer = _Renderer(tokenizer, fixed_source, arguments, system, parts)
            try:
                rendered = renderer.render(message)
            except PromptError as error:
                first_error = first_error or error
                continue
            if rendered.count(message) == 1:
                usable.append((renderer, rendered))
        for renderer, rendered in usable:
            block = find_block(rendered.split(message)[1])
            if block is None or not block.is_open:
                return renderer, rendered
        if usable:
            return usable[0]
    raise first_error or PromptError(
        f"the chat template does not write the message exactly once and unchanged: {PLAIN}"
    )


def _text_between(renderer: _Renderer, message: str, answer: str) -> str | None:
    """What the template writes between a message and its answer in a dialogue; None if it cannot render a dialogue."""
    for parts in (renderer.parts, not renderer.parts):
        try:
            rendered = renderer.render(message, answer, parts=parts)
        except PromptError:
            continue  # a template without dialogues: only its generation prompt counts
        if rendered.count(message) == rendered.count(answer) == 1:
            start, stop = rendered.index(message) + len(message), rendered.index(answer)
            if start <= stop:
                return rendered[start:stop]
    return None


def _text_before_answer(after: str, dialogue: str | None, close: Callable[[str], str]) -> str:
    """The text between message and answer, from the generation prompt and from a dialogue.

    The generation prompt is what the model sees when it has to answer. A dialogue may have more text before the
    answer, which belongs to the prompt as well. It may also lack a reasoning block that the generation prompt opens.

    Parameters
    ----------
    after : str
        Text after the message in the generation prompt.
    dialogue : str, optional
        Text between message and answer in a dialogue.
    close : callable
        Closes an open reasoning block.

    Raises
    ------
    PromptError
        The two texts contradict each other, or a block cannot be closed.
    """
    if dialogue is None:
        return close(after)
    if dialogue.startswith(after):
        return close(dialogue)
    block = find_block(after)
    header = after[: block.start] if block is not None else ""
    if not dialogue.startswith(header):
        header = header.rstrip()  # the dialogue may have the line break elsewhere
    if block is not None and dialogue.startswith(header):
        rest = dialogue[len(header) :]
        own = find_block(rest)
        if block.is_open and own is not None and not own.is_open:
            return close(dialogue)
        if own is not None:
            return close(after)
        closed = close(after)
        return closed if rest.isspace() and closed[-1].isspace() else closed + rest
    extra = after.removeprefix(dialogue) if after.startswith(dialogue) else None
    # Words or tags that only the generation prompt has may open a block of an unknown name. They are accepted if they
    # turn reasoning off, or if the dialogue has no header and so shows nothing.
    harmless = extra is not None and (not extra.strip() or not dialogue.strip() or is_no_reasoning_tag(extra))
    if after.rstrip() == dialogue.rstrip() or harmless:
        return close(after)
    raise PromptError(
        f"the chat template ends its prompt with {after[-40:]!r} and begins an answer after {dialogue[-40:]!r}, so "
        f"where the answer begins is not known: {PLAIN}"
    )


def _close_blocks(text: str, texts: Collection[str], added_tokens: Collection[str]) -> str:
    """``text`` without an open reasoning block."""
    while (block := find_block(text)) is not None and block.is_open:
        closed = close_block(text, block, texts, added_tokens)
        if closed is None:
            raise PromptError(
                f"the chat template opens a reasoning block ({block.tag}) before the answer, and xprobe does not know "
                f"how to close it: {PLAIN}"
            )
        text = closed
    return text


def _without_switches(renderer: _Renderer, off: Collection[str], message: str) -> str | None:
    """What the template writes if the switches in ``off`` are not set; None if it fails then."""
    arguments = {name: value for name, value in renderer.arguments.items() if name not in off}
    try:
        return replace(renderer, arguments=arguments).render(message)
    except PromptError:
        return None
