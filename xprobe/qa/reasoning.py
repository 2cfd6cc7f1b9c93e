"""Reasoning blocks of chat templates: the switches that turn them off, and how a block that stays open is closed.

A model that reasons writes its thoughts between two tags before it answers. A template may open that block in the
prompt, and the gold answer would then stand among the thoughts. The tags differ by family, their shape hardly does:
a word such as "think" between brackets, and the same word again with a slash or with "end" instead of "start".
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
_TELLING_WORDS = {"no", "not", "non", "off", "none", "nothink", "mode", "effort", "level"}  # <|no_think|> opens nothing
_OPPOSITES = (("start", "end"), ("begin", "end"), ("open", "close"), ("prefix", "suffix"), ("begin", "stop"))

_SWITCH = re.compile(r"think|reason|thought|(?:^|_)cot(?:_|$)|deliberat|reflect", re.IGNORECASE)
_NEGATIVE = re.compile(r"^(?:no|not|non|disable|skip|without|suppress|hide)(?:_|(?=think|reason))", re.IGNORECASE)
_YES_OR_NO = re.compile(r"^(?:enable|use|with|allow|do|should|force)_", re.IGNORECASE)
# what no yes or no can stand for, though a template may ask whether it is there
_NEVER_YES_OR_NO = re.compile(r"effort|level|budget|mode|style|format|content|text|prompt|token|tag", re.IGNORECASE)
# values that mean "do not reason", or "as little as you can", where a template compares a variable with them
_OFF = (
    "none", "off", "disabled", "disable", "no", "false", "no_think", "nothink", "/no_think", "non_thinking",
    "no_thinking", "chat", "minimal", "low",
)  # fmt: skip
_DATE = re.compile(r"(?:(?:current|todays?|now)_?)?date(?:_?(?:string|str|time))?|today|now", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """The last reasoning block of a text. ``start`` and ``opened`` are character positions of tags."""

    start: int  # its first tag
    opened: int = 0  # the tag that is still open
    tag: str = ""  # that tag; empty if the block is closed
    written: str = ""  # all that stands behind it

    @property
    def is_open(self) -> bool:
        return bool(self.tag)


def find_block(tail: str) -> Block | None:
    """The last reasoning block in ``tail``, the prompt's text after the user's message; None if it holds no tag of one.

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
        if _TELLING_WORDS & _words(tag["name"] or ""):
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
    """Whether ``text`` is a tag of a reasoning block and nothing else."""
    return _TAG.fullmatch(text) is not None


def says_no_reasoning(text: str) -> bool:
    """Whether ``text`` is nothing but a tag that turns reasoning off, such as ``<|no_think|>``."""
    return re.fullmatch(r"\s*[<\[/]*\W*no[_ -]?(?:think|reason)(?:ing)?\W*\s*", text, re.IGNORECASE) is not None


def close_block(tail: str, block: Block, constants: Collection[str], known: Collection[str]) -> str | None:
    r"""``tail`` with its open block closed, as the model's family writes an empty block; None if that is not known.

    Parameters
    ----------
    constants : collection of str
        The template's own texts: an empty block among them is the family's.
    known : collection of str
        Further texts that are tags for certain: the tokenizer's added tokens.

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
    """The syntax tree of a chat template; None if it cannot be parsed."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    try:
        return environment.parse(source)
    except jinja2.TemplateError:
        return None


def constants(tree: nodes.Template | None) -> list[str]:
    """The texts that a template can write."""
    if tree is None:
        return []
    values: list[str] = [node.data for node in tree.find_all(nodes.TemplateData)]
    return values + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]


def switches(tree: nodes.Template | None) -> dict[str, Any]:
    """The variables of a template that govern reasoning, each with the value that turns it off.

    A variable counts if its name speaks of reasoning and the template asks whether it is true, or compares it with
    a number or a word; one whose text is printed does not, unless its name is that of a yes or no.
    """
    if tree is None:
        return {"enable_thinking": False, "thinking": False}
    uses: dict[str, set[Any]] = {}
    for name, use in _uses(tree):
        if _SWITCH.search(name):
            uses.setdefault(name, set()).add(use)
    found: dict[str, Any] = {}
    for name, kinds in uses.items():
        if _YES_OR_NO.search(name) and "number" not in kinds:
            found[name] = False
            continue
        if kinds & {"printed", "called"}:
            continue
        words = {kind[1] for kind in kinds if isinstance(kind, tuple)}
        off = next((word for wanted in _OFF for word in sorted(words) if word.casefold() == wanted), None)
        if off is not None:
            found[name] = off
        elif "number" in kinds:
            found[name] = 0
        elif "truth" in kinds and "text" not in kinds and not (words or _NEVER_YES_OR_NO.search(name)):
            found[name] = bool(_NEGATIVE.search(name))
    return found


def date_variables(tree: nodes.Template | None) -> list[str]:
    """The variables of a template that stand for today's date as a text, and that it cannot do without.

    One that the template gives a default, or asks for before it writes of dates at all, is left to the template: what
    it then writes does not change from day to day.
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
    """What may close ``tag``, the likeliest first."""
    if tag.startswith("<|channel|>"):
        return  # only the template's dialogue can show the header of the answer's channel
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
    """(variable, use) of every place that reads a variable, or that sets it to a text.

    Uses are truth, number, ("word", word) for a comparison with one, printed, called (a method of it as well), text,
    and passed on.
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
                    yield from visit(child, _use_of(node, field, use))

    yield from visit(tree, "passed on")


def _use_of(node: nodes.Node, field: str, use: Any) -> Any:
    """How ``node`` uses its child, where ``use`` is how the node itself is used."""
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
    """``{% generation %}``, by which some templates mark what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 -- jinja's own way to name them

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
