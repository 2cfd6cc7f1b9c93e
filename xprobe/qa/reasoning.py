"""Reasoning blocks of chat templates: the variables that turn them off, and how to close a block that stays open.

A reasoning model writes its thoughts between two tags before it answers. If a template opens such a block in the
prompt, the gold answer would be inside the thoughts. The tags differ between model families, but they look alike: a
word such as "think" between brackets, and the same word with a slash, or with "end" instead of "start".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension

_WORD = r"(?:think|thought|reason|reflect|deliberat|scratchpad|inner_(?:pre|suf)fix)"
_INSIDE = r"[^\s<>\[\]|｜◁▷]*"
_TAG = re.compile(
    rf"(?P<left><[|｜]?|\[|◁)(?P<name>{_INSIDE}{_WORD}{_INSIDE})(?P<right>[|｜]?>|\]|▷)"  # <think>, [THINK]
    r"|(?P<channel><\|channel\|?>(?:analysis|thought|thinking)(?:<\|message\|>)?)"  # gpt-oss, Gemma 4
    r"|(?P<after><channel\|>|<\|channel\|>final)",
    re.IGNORECASE,
)
_CLOSING_WORDS = {"end", "close", "stop", "suffix"}
_NOT_OPENING_WORDS = {"no", "not", "non", "off", "none", "nothink", "mode", "effort", "level"}  # <|no_think|>
_OPPOSITES = (("start", "end"), ("begin", "end"), ("open", "close"), ("prefix", "suffix"), ("begin", "stop"))

_SWITCH = re.compile(r"think|reason|thought|(?:^|_)cot(?:_|$)|deliberat|reflect", re.IGNORECASE)
_NEGATIVE = re.compile(r"^(?:no|not|non|disable|skip|without|suppress|hide)(?:_|(?=think|reason))", re.IGNORECASE)
_BOOLEAN_NAME = re.compile(r"^(?:enable|use|with|allow|do|should|force)_", re.IGNORECASE)
# names of variables that are not booleans, even if a template tests whether they are set
_NOT_BOOLEAN = re.compile(r"effort|level|budget|mode|style|format|content|text|prompt|token|tag", re.IGNORECASE)
# values that mean "do not reason" or "reason as little as possible" where a template compares a variable with them
_OFF = (
    "none", "off", "disabled", "disable", "no", "false", "no_think", "nothink", "/no_think", "non_thinking",
    "no_thinking", "chat", "minimal", "low",
)  # fmt: skip
_DATE = re.compile(r"(?:(?:current|todays?|now)_?)?date(?:_?(?:string|str|time))?|today|now", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """The last reasoning block of a text.

    Parameters
    ----------
    start : int
        Character position of the first tag of the block.
    opened : int
        Character position of the tag that is still open.
    tag : str
        The tag that is still open; empty if the block is closed.
    written : str
        All text after that tag.

    Examples
    --------
    >>> Block(start=4, opened=4, tag="<think>").is_open
    True
    """

    start: int
    opened: int = 0
    tag: str = ""
    written: str = ""

    @property
    def is_open(self) -> bool:
        """Whether the block has no closing tag."""
        return bool(self.tag)


def find_block(tail: str) -> Block | None:
    """The last reasoning block in ``tail``, the text of the prompt after the user's message; None if there is none.

    Examples
    --------
    >>> find_block("<|assistant|><think>\\n").is_open
    True
    >>> find_block("<|assistant|><think></think>").is_open
    False
    """
    start: int | None = None
    opened: list[re.Match[str]] = []
    for tag in _TAG.finditer(tail):
        if _NOT_OPENING_WORDS & _words(tag["name"] or ""):
            continue
        if not opened:
            start = tag.start()
        if not _closes(tag):
            opened.append(tag)
        elif opened:
            opened.pop()
    if start is None:
        return None
    if not opened:
        return Block(start)
    return Block(start, opened[-1].start(), opened[-1][0], tail[opened[-1].end() :])


def is_tag(text: str) -> bool:
    """Whether ``text`` is a tag of a reasoning block and nothing else.

    Examples
    --------
    >>> is_tag("<think>"), is_tag("<b>")
    (True, False)
    """
    return _TAG.fullmatch(text) is not None


def is_no_reasoning_tag(text: str) -> bool:
    """Whether ``text`` is a tag that turns reasoning off, such as ``<|no_think|>``, and nothing else.

    Examples
    --------
    >>> is_no_reasoning_tag("<|no_think|>"), is_no_reasoning_tag("<think>")
    (True, False)
    """
    return re.fullmatch(r"\s*[<\[/]*\W*no[_ -]?(?:think|reason)(?:ing)?\W*\s*", text, re.IGNORECASE) is not None


def close_block(tail: str, block: Block, constants: Collection[str], known: Collection[str]) -> str | None:
    r"""``tail`` with its open block closed. The result is None if the closing tag is not known.

    Parameters
    ----------
    tail : str
        Text of the prompt after the user's message.
    block : Block
        The open block of ``tail``.
    constants : collection of str
        The texts of the template. If one of them is an empty block, the block is closed in this form.
    known : collection of str
        Further texts that are certainly tags: the added tokens of the tokenizer.

    Examples
    --------
    >>> tail = "<|assistant|><think>\n"
    >>> close_block(tail, find_block(tail), [], [])
    '<|assistant|><think>\n\n</think>\n\n'
    """
    for closing in _closing_tags(block.tag):
        by_convention = block.tag[0] in "[◁" or (block.tag[0] == "<" and block.tag[1] not in "|｜")
        if not (by_convention or closing in known or any(closing in text for text in constants)):
            continue
        empty = re.compile(rf"{re.escape(block.tag)}\n*{re.escape(closing)}\n*$")
        written = block.written
        if not written.strip():
            for text in constants:
                if match := empty.search(text):
                    return tail[: block.opened] + match[0]
        if not (block.tag[0] == "<" and block.tag[1] not in "|｜"):
            return tail + closing
        if written.strip():
            return tail + ("" if written.endswith("\n") else "\n") + f"{closing}\n\n"
        return tail + "\n\n"[len(written) :] * "\n\n".startswith(written) + f"{closing}\n\n"
    return None


def parse(source: str) -> nodes.Template | None:
    """The syntax tree of a chat template; None if it cannot be parsed.

    Examples
    --------
    >>> parse("{% if %}") is None
    True
    """
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    try:
        return environment.parse(source)
    except jinja2.TemplateError:
        return None


def constants(tree: nodes.Template | None) -> list[str]:
    """The texts that a template can write.

    Examples
    --------
    >>> constants(parse("<a>{{ 'b' if thinking else 'c' }}"))
    ['<a>', 'b', 'c']
    """
    if tree is None:
        return []
    values: list[str] = [node.data for node in tree.find_all(nodes.TemplateData)]
    return values + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]


def switches(tree: nodes.Template | None) -> dict[str, Any]:
    """The variables of a template that control reasoning, each with the value that turns it off.

    A variable counts if its name is about reasoning and the template tests whether it is true, or compares it with a
    number or a word. A variable that is printed does not count, unless its name is that of a boolean.

    Examples
    --------
    >>> switches(parse("{% if enable_thinking %}<think>{% endif %}"))
    {'enable_thinking': False}
    >>> switches(parse("{% if thinking_budget > 0 %}<think>{% endif %}"))
    {'thinking_budget': 0}
    """
    if tree is None:
        return {"enable_thinking": False, "thinking": False}
    uses: dict[str, set[Any]] = {}
    for name, use in _uses(tree):
        if _SWITCH.search(name):
            uses.setdefault(name, set()).add(use)
    values: dict[str, Any] = {}
    for name, kinds in uses.items():
        if _BOOLEAN_NAME.search(name) and "number" not in kinds:
            values[name] = False
            continue
        if kinds & {"printed", "called"}:
            continue
        words = {kind[1] for kind in kinds if isinstance(kind, tuple)}
        off = next((word for wanted in _OFF for word in sorted(words) if word.casefold() == wanted), None)
        if off is not None:
            values[name] = off
        elif "number" in kinds:
            values[name] = 0
        elif "truth" in kinds and "text" not in kinds and not (words or _NOT_BOOLEAN.search(name)):
            values[name] = bool(_NEGATIVE.search(name))
    return values


def date_variables(tree: nodes.Template | None) -> list[str]:
    """The variables of a template that hold the date of today as text and must be set.

    A variable with a default, or one that the template tests before it writes a date, need not be set: without it the
    text does not change from day to day.

    Examples
    --------
    >>> date_variables(parse("Today is {{ date_string }}."))
    ['date_string']
    >>> date_variables(parse("{% if date_string %}Today is {{ date_string }}.{% endif %}"))
    []
    """
    if tree is None:
        return ["date_string"]
    uses = [(name, use) for name, use in _uses(tree) if _DATE.fullmatch(name)]
    optional = {name for name, use in uses if use not in ("printed", "passed on")}
    return sorted({name for name, _ in uses} - optional)


def _closes(tag: re.Match[str]) -> bool:
    if tag["name"] is None:
        return tag["after"] is not None
    return tag["name"].startswith("/") or bool(_CLOSING_WORDS & _words(tag["name"]))


def _words(name: str) -> set[str]:
    return set(re.split(r"[\W_▁]+", name.casefold()))


def _closing_tags(tag: str) -> Iterator[str]:
    """Tags that may close ``tag``, the most likely first."""
    if tag.startswith("<|channel|>"):
        return  # only a dialogue of the template shows the header of the channel for the answer
    if tag.startswith("<|channel>"):
        yield "<channel|>"
        return
    for opening, closing in _OPPOSITES:
        changed = re.sub(rf"(?<![a-z]){opening}(?![a-z])", closing, tag)
        changed = re.sub(rf"(?<![A-Z]){opening.upper()}(?![A-Z])", closing.upper(), changed)
        if changed != tag:
            yield changed
    yield re.sub(r"^(<[|｜]?|\[|◁)", r"\1/", tag)


def _uses(tree: nodes.Template) -> Iterator[tuple[str, Any]]:
    """Pairs (variable, use) for every place that reads a variable or sets it to a text.

    A use is ``truth``, ``number``, ``("word", word)`` for a comparison with a word, ``printed``, ``called`` (also for a
    method of the variable), ``text`` or ``passed on``.
    """

    def visit(node: nodes.Node, use: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(node, nodes.Name):
            if node.ctx == "load":
                yield node.name, use
            return
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name) and _is_text(node.node):
            yield node.target.name, "text"
        for field, value in node.iter_fields():
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, nodes.Node):
                    yield from visit(child, _child_use(node, field, use))

    yield from visit(tree, "passed on")


def _child_use(node: nodes.Node, field: str, use: Any) -> Any:
    """How ``node`` uses the child in ``field``. ``use`` is the use of the node itself."""
    if isinstance(node, nodes.If | nodes.CondExpr) and field == "test":
        return "truth"
    if isinstance(node, nodes.Not | nodes.Test):
        return "truth"
    if isinstance(node, nodes.Compare):
        others = [node.expr, *(operand.expr for operand in node.ops)]
        values = [other.value for other in others if isinstance(other, nodes.Const)]
        for other in others:
            if isinstance(other, nodes.List | nodes.Tuple):
                values += [item.value for item in other.items if isinstance(item, nodes.Const)]
        value = values[0] if values else None
        if isinstance(value, str):
            return ("word", value)
        return "truth" if value is None or isinstance(value, bool) else "number"
    if isinstance(node, nodes.Operand):
        return use
    if isinstance(node, nodes.Call | nodes.Getattr) and field == "node":
        return "called"
    if isinstance(node, nodes.CondExpr):
        return "text" if _is_text(node.expr1) or _is_text(node.expr2) else use
    if isinstance(node, nodes.Filter) and node.name in ("default", "d") and node.args:
        value = node.args[0].value if isinstance(node.args[0], nodes.Const) else None
        return "truth" if isinstance(value, bool) else {int: "number", str: "text"}.get(type(value), use)
    if isinstance(node, nodes.Filter | nodes.And | nodes.Or):
        return use
    if isinstance(node, nodes.Output | nodes.Concat | nodes.Add | nodes.Getitem):
        return "printed"
    return "passed on"


def _is_text(node: nodes.Node | None) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, str)


class _Generation(Extension):
    """The tag ``{% generation %}``, with which some templates mark the text of the assistant."""

    tags = {"generation"}  # noqa: RUF012 -- jinja needs a class attribute

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
