"""Control tokens: what a tokenizer cuts out of any text, and how text that merely looks like one is tokenised.

A tokenizer turns ``<|im_end|>`` into the token that ends a turn wherever it stands, in a question as well. To tokenise
such text as text, a copy of the tokenizer gives every control token a private name, which no data hold; the template's
own control tokens are written under these names, and the data are left alone. All else about the copy is the
tokenizer's own: ids, normaliser, the blanks that a control token takes with it, what it puts before a text.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable
from typing import Any

from xprobe.qa.reasoning import constants, is_tag, parse

# the private use area; and Egyptian hieroglyphs, for normalisers that remove what has no assigned meaning
_ALPHABETS = (range(0xE000, 0xF900), range(0x13000, 0x13430))
_SHAPE = re.compile(
    r"<[|｜].*>|<.*[|｜]>|\[/?[A-Z][A-Z_]*\]|\[\|.*\|\]|</?(?:s|pad|bos|eos|unk|cls|sep|mask)>"
    r"|</?(?:unused|reserved|extra_id|special)\w*>|\[[a-z]*(?:unused\d+|MASK)\]"
)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> content of the added tokens that direct the model and are not text to it.

    Those are the special ones, those that the chat template writes, and those that look like one (``<|...|>``,
    ``[INST]``, ``<think>``). Added tokens that stand for text, such as runs of blanks or HTML tags, are not.
    """
    written: str | None = None
    controls = {}
    for id_, token in tokenizer.added_tokens_decoder.items():
        content = str(token.content)
        if not content.strip():
            continue
        if not (token.special or _SHAPE.fullmatch(content.strip()) or is_tag(content.strip())):
            if content.isalnum() or not any(c.isalpha() for c in content):
                continue
            if written is None:
                written = "\n".join(constants(parse(_chat_template(tokenizer))))
            if content not in written:
                continue
        controls[int(id_)] = content
    return controls


def ambiguous_tokens(tokenizer: Any, controls: dict[int, str]) -> set[int]:
    """Control tokens that the tokenizer also gives for other text: the unknown token, and single bytes."""
    unknown = {getattr(tokenizer, "unk_token", None), getattr(tokenizer.backend_tokenizer.model, "unk_token", None)}
    return {id_ for id_, content in controls.items() if content in unknown or _BYTE.fullmatch(content)}


class RenamedTokenizer:
    """A tokenizer whose control tokens have private names.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The tokenizer to copy.
    controls : dict of int to str
        ``control_tokens(tokenizer)``.
    alphabet : range
        Code points for the names.
    taken : collection of str
        Characters that no name may hold: those of the texts to tokenise.

    Raises
    ------
    ValueError
        The tokenizer cannot be copied, or the copy gives other ids.
    """

    def __init__(self, tokenizer: Any, controls: dict[int, str], alphabet: range, taken: Collection[str]) -> None:
        from tokenizers import Tokenizer

        names = dict(zip(controls.values(), _names(alphabet, taken), strict=False))
        if len(names) < len(controls):
            raise ValueError("there are more control tokens than private names")
        try:
            parts = json.loads(tokenizer.backend_tokenizer.to_str())
            _rename(parts, names)
            self._tokenizer = Tokenizer.from_str(json.dumps(parts))
        except Exception as error:  # a tokenizer may hold parts in Python, which cannot be copied
            raise ValueError(" ".join(str(error).split())[:200]) from error
        self._names = {content: name for content, name in names.items() if not _BYTE.fullmatch(content)}
        for id_, content in controls.items():
            name = self._names.get(content, content)
            if self._tokenizer.token_to_id(name) != id_:
                raise ValueError(f"{content} has another id in the copy")
        longest_first = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def rename(self, text: str) -> str:
        """The template's ``text`` with its control tokens under their private names."""
        return self._pattern.sub(lambda match: self._names[match[0]], text)

    def encode(self, texts: list[str], *, special: bool) -> list[Any]:
        """``tokenizers.Encoding`` of every text, all ids those of the original tokenizer."""
        return self._tokenizer.encode_batch(texts, add_special_tokens=special)


def renamed_tokenizers(tokenizer: Any, controls: dict[int, str], texts: Iterable[str]) -> Iterable[RenamedTokenizer]:
    """The copies that can be made of a tokenizer, for ``texts``; none if it cannot be copied."""
    taken = set().union(*map(set, texts), *map(set, controls.values()))
    for alphabet in _ALPHABETS:
        try:
            yield RenamedTokenizer(tokenizer, controls, alphabet, taken)
        except ValueError:
            continue


def _chat_template(tokenizer: Any) -> str:
    try:
        return tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else ""
    except ValueError:  # several templates and no default one
        return ""


def _names(alphabet: range, taken: Collection[str]) -> Iterable[str]:
    """Names of two characters. They are read from left to right without a gap, so none begins inside another."""
    letters = [chr(code) for code in alphabet if chr(code) not in taken][:512]
    return map("".join, itertools.product(letters, repeat=2))


def _rename(parts: dict[str, Any], names: dict[str, str]) -> None:
    """Renames tokens in a tokenizer's JSON: among the added tokens and, under the same ids, in the vocabulary."""
    parts["truncation"] = parts["padding"] = None
    model = parts["model"]
    vocabulary = model["vocab"]
    pieces = vocabulary if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    # a byte's token must keep its name, by which the model finds it; it is text like any other once it is not added
    bytes_ = {content for content in names if _BYTE.fullmatch(content) and content in pieces}
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in bytes_]
    names = {content: name for content, name in names.items() if not _BYTE.fullmatch(content)}
    for token in parts["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): id_ for piece, id_ in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        # a merge that ends in a control token would make one of plain text
        prefix = len(model.get("continuing_subword_prefix") or "")
        kept = []
        for merge in model["merges"]:
            left, right = merge if isinstance(merge, list) else merge.split(" ")
            if not names.keys() & {left, right, left + right[prefix:]}:
                kept.append(merge)
        model["merges"] = kept
