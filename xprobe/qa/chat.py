"""A tokenizer's chat template as text before and after a message: what the model sees up to the answer's first word.

The template is rendered with stand-ins for the message and for the answer, so that it shows itself what it writes
before, between and after them. Everything up to the answer is the prompt: the assistant's header, a line break or a
channel after it, and the empty block of a model that would reason first.
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
    parse,
    says_no_reasoning,
    switches,
)

DATE = "26 Jul 2024"  # the day that every template believes it is: a prompt must not change overnight
PLAIN = "use --template plain"

NO_REASONING = "none"
SWITCHED_OFF = "switched off"
CLOSED_BY_TEMPLATE = "closed by the template"
CLOSED_BY_XPROBE = "closed by xprobe"

# strftime on DATE, a Friday at midnight, in English whatever the locale
_DIRECTIVES = {
    "%Y": "2024", "%y": "24", "%m": "07", "%-m": "7", "%B": "July", "%b": "Jul", "%h": "Jul", "%d": "26", "%-d": "26",
    "%e": "26", "%j": "208", "%-j": "208", "%A": "Friday", "%a": "Fri", "%w": "5", "%u": "5", "%U": "29", "%W": "30",
    "%V": "30", "%G": "2024", "%H": "00", "%-H": "0", "%I": "12", "%-I": "12", "%M": "00", "%-M": "0", "%S": "00",
    "%-S": "0", "%f": "000000", "%p": "AM", "%z": "", "%Z": "", "%F": "2024-07-26", "%T": "00:00:00", "%R": "00:00",
    "%D": "07/26/24", "%x": "07/26/24", "%X": "00:00:00", "%c": "Fri Jul 26 00:00:00 2024", "%s": "1721952000",
}  # fmt: skip
_FILTERS = " | ".join(f"replace({directive!r}, {text!r})" for directive, text in _DIRECTIVES.items())
# transformers turns a function among the arguments into text, so the clock is stopped inside of the template. The line
# break belongs to the tag before it and prints nothing.
_STOPPED_CLOCK = f"{{% macro strftime_now(format='%Y-%m-%d') %}}{{{{ format | {_FILTERS} }}}}{{% endmacro %}}\n"


class ChangedMessageError(Exception):
    """The chat template does not hold one message as it was given."""


@dataclass(frozen=True)
class _Renderer:
    """One call of the chat template: with which arguments, and in which form it takes messages."""

    tokenizer: Any
    source: str | None  # in place of the tokenizer's own template
    arguments: dict[str, Any]
    system: bool = False  # an empty system message comes first
    parts: bool = False  # contents are lists of parts

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
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            reason = " ".join(str(error).split())[:300]
            raise PromptError(f"the tokenizer's chat template failed ({reason}): {PLAIN}") from error

    @staticmethod
    def _content(text: str, parts: bool) -> Any:
        return [{"type": "text", "text": text}] if parts else text


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template writes around a message, up to the answer.

    ``before + message + tail`` is the prompt. ``reasoning`` says how the prompt keeps the model from reasoning first,
    and ``date`` the day that the template was given, if it asks for one.
    """

    renderer: _Renderer
    before: str
    after: str  # after the message in the template's own generation prompt
    tail: str  # after the message in xprobe's prompt
    reasoning: str
    date: str | None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> ChatFormat:
        """Reads off what the tokenizer's chat template writes.

        Raises
        ------
        PromptError
            The template fails, loses or doubles a message, or leaves open where the answer begins.
        """
        try:
            source = tokenizer.get_chat_template()
            if not isinstance(source, str):
                raise TypeError(f"it is no text but {type(source).__name__}")
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise PromptError(f"the tokenizer has no chat template that can be used ({reason}): {PLAIN}") from error
        tree = parse(source)
        message, answer = _stand_ins(source)
        renderer, rendered = _open(tokenizer, source, tree, message)
        before, after = rendered.split(message)
        known = [str(token.content) for token in tokenizer.added_tokens_decoder.values()]
        dialogue = _between(renderer, message, answer)
        tail = _up_to_answer(after, dialogue, lambda text: _closed(text, constants(tree), known))
        blocks = [find_block(text) for text in (after, dialogue or "")]
        if any(block is not None and block.is_open for block in blocks) and tail not in (after, dialogue):
            reasoning = CLOSED_BY_XPROBE
        elif rendered != _without_switches(renderer, switches(tree), message):
            reasoning = SWITCHED_OFF
        else:
            reasoning = NO_REASONING if find_block(tail) is None else CLOSED_BY_TEMPLATE
        asks_date = "strftime_now" in source or bool(date_variables(tree))
        return cls(renderer, before, after, tail, reasoning, DATE if asks_date else None)

    def held_message(self, message: str) -> str:
        """``message`` as the template holds it: whole, or without the blanks around it.

        Raises
        ------
        ChangedMessageError
            The template changes it otherwise, or writes other text around it than around other messages.
        """
        try:
            rendered = self.renderer.render(message)
        except PromptError as error:
            raise ChangedMessageError(str(error)) from error
        for held in (message, message.strip()):
            if rendered == self.before + held + self.after:
                return held
        raise ChangedMessageError("the text that it writes is not the message between its usual header and end")


def _stand_ins(source: str) -> tuple[str, str]:
    """A message and an answer that the template neither holds itself nor changes: digits have no case."""
    message, answer = "4815162342", "2718281828"
    while message in source or answer in source:
        message, answer = f"{message}40", f"{answer}31"
    return message, answer


def _open(tokenizer: Any, source: str, tree: nodes.Template | None, message: str) -> tuple[_Renderer, str]:
    """A call that the template accepts, and the text that it gives; if possible without an open reasoning block.

    Raises
    ------
    PromptError
        No call gives a text that holds the message once.
    """
    off, dates = switches(tree), dict.fromkeys(date_variables(tree), DATE)
    arguments = [{**some, **day} for day in (dates, {}) for some in (off, {})]
    arguments = [one for index, one in enumerate(arguments) if one not in arguments[:index]]
    stopped = _STOPPED_CLOCK + source if "strftime_now" in source else None
    first_error: PromptError | None = None
    for parts, system in product((False, True), repeat=2):
        usable = []
        for some in arguments:
            renderer = _Renderer(tokenizer, stopped, some, system, parts)
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
    raise first_error or PromptError(f"the chat template does not hold the message exactly once as given: {PLAIN}")


def _between(renderer: _Renderer, message: str, answer: str) -> str | None:
    """What the template writes between a message and its answer in a dialogue; None if it renders no such dialogue."""
    for parts in (renderer.parts, not renderer.parts):
        try:
            rendered = renderer.render(message, answer, parts=parts)
        except PromptError:
            continue  # a template may know no dialogues: its generation prompt counts
        if rendered.count(message) == rendered.count(answer) == 1:
            start, stop = rendered.index(message) + len(message), rendered.index(answer)
            if start <= stop:
                return rendered[start:stop]
    return None


def _up_to_answer(after: str, dialogue: str | None, closed: Callable[[str], str]) -> str:
    """The prompt's text after the message, of what the template writes there to generate and in a dialogue.

    The generation prompt is what the model sees when it is asked. The dialogue may write more before the answer, which
    belongs to the prompt as well; or leave out a reasoning block, which the generation prompt opens.

    Raises
    ------
    PromptError
        The two contradict each other, or a block cannot be closed.
    """
    if dialogue is None:
        return closed(after)
    if dialogue.startswith(after):
        return closed(dialogue)
    block = find_block(after)
    header = after[: block.start] if block is not None else ""
    if not dialogue.startswith(header):
        header = header.rstrip()  # the dialogue may break the line elsewhere
    if block is not None and dialogue.startswith(header):
        rest = dialogue[len(header) :]
        own = find_block(rest)
        if block.is_open and own is not None and not own.is_open:
            return closed(dialogue)
        if own is not None:
            return closed(after)
        done = closed(after)
        return done if rest.isspace() and done[-1].isspace() else done + rest
    more = after.removeprefix(dialogue) if after.startswith(dialogue) else None
    # Words or tags that only the generation prompt has, an opened block of any name among them, are not understood,
    # unless they say that nothing is opened. A dialogue without any header shows nothing.
    harmless = more is not None and (not more.strip() or not dialogue.strip() or says_no_reasoning(more))
    if after.rstrip() == dialogue.rstrip() or harmless:
        return closed(after)
    raise PromptError(
        f"the chat template ends its prompt with {after[-40:]!r} and begins an answer after {dialogue[-40:]!r}, so "
        f"where the answer begins is not known: {PLAIN}"
    )


def _closed(text: str, texts: Collection[str], known: Collection[str]) -> str:
    """``text`` without an open reasoning block."""
    while (block := find_block(text)) is not None and block.is_open:
        done = close_block(text, block, texts, known)
        if done is None:
            raise PromptError(
                f"the chat template opens a reasoning block ({block.tag}) before the answer, and how to close it is "
                f"not known: {PLAIN}"
            )
        text = done
    return text


def _without_switches(renderer: _Renderer, off: Collection[str], message: str) -> str | None:
    arguments = {name: value for name, value in renderer.arguments.items() if name not in off}
    try:
        return replace(renderer, arguments=arguments).render(message)
    except PromptError:
        return None
