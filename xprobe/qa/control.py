"""Control tokens of a tokenizer, and how text that only looks like one is tokenised as text.

A tokenizer turns ``<|im_end|>`` into the token that ends a turn, wherever it occurs, in a question as well. To tokenise
such text as text, a copy of the tokenizer gives each control token a private name that does not occur in the data. The
control tokens of the template are written with these names; the data stay the same. Everything else about the copy is
unchanged: ids, normaliser, the blanks that a control token absorbs, the special tokens before a text.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable
from typing import Any

from xprobe.qa.reasoning import constants, is_tag, parse

# the private use area; Egyptian hieroglyphs for normalisers that remove private characters
_ALPHABETS = (range(0xE000, 0xF900), range(0x13000, 0x13430))
_SHAPE = re.compile(
    r"<[|｜].*>|<.*[|｜]>|\[/?[A-Z][A-Z_]*\]|\[\|.*\|\]|</?(?:s|pad|bos|eos|unk|cls|sep|mask)>"
    r"|</?(?:unused|reserved|extra_id|special)\w*>|\[[a-z]*(?:unused\d+|MASK)\]"
)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The control tokens by id: the added tokens that direct the model and are not text.

    These are the special tokens, the added tokens that the chat template writes, and those that look like a control
    token (``<|...|>``, ``[INST]``, ``<think>``). Added tokens for text, such as runs of blanks or HTML tags, are not.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})), eos_token="</s>")
    >>> tokenizer.add_tokens(["<think>", "<b>"])
    2
    >>> control_tokens(tokenizer)
    {1: '</s>', 2: '<think>'}
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
    """The ids of control tokens that may also stand for ordinary text: the unknown token, and tokens of single bytes.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    >>> ambiguous_tokens(tokenizer, {0: "<unk>", 1: "</s>", 2: "<0x0A>"})
    {0, 2}
    """
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
        Characters that no name may contain, because the texts contain them.

    Raises
    ------
    ValueError
        The tokenizer cannot be copied, or the copy gives other ids.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> backend = Tokenizer(models.WordLevel({"<": 0, "s": 1, ">": 2}))
    >>> backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    >>> tokenizer("<s>")["input_ids"]
    [3]
    >>> copy = RenamedTokenizer(tokenizer, control_tokens(tokenizer), range(0xE000, 0xE100), [])
    >>> [encoding.ids for encoding in copy.encode(["<s>", copy.rename("<s>")], special=False)]
    [[0, 1, 2], [3]]
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
        except Exception as error:  # parts of a tokenizer may be Python objects, which cannot be copied
            raise ValueError(" ".join(str(error).split())[:200]) from error
        self._names = {content: name for content, name in names.items() if not _BYTE.fullmatch(content)}
        for id_, content in controls.items():
            name = self._names.get(content, content)
            if self._tokenizer.token_to_id(name) != id_:
                raise ValueError(f"{content} has another id in the copy")
        longest_first = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def rename(self, text: str) -> str:
        """``text`` of the template with private names instead of control tokens."""
        return self._pattern.sub(lambda match: self._names[match[0]], text)

    def encode(self, texts: list[str], *, special: bool) -> list[Any]:
        """A ``tokenizers.Encoding`` for every text, with the ids of the original tokenizer."""
        return self._tokenizer.encode_batch(texts, add_special_tokens=special)


def renamed_tokenizers(tokenizer: Any, controls: dict[int, str], texts: Iterable[str]) -> Iterable[RenamedTokenizer]:
    """Copies of a tokenizer with private names that do not occur in ``texts``; none if it cannot be copied.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})), eos_token="</s>")
    >>> len(list(renamed_tokenizers(tokenizer, control_tokens(tokenizer), ["some text"])))
    2
    """
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
    """Names of two letters. A text of such names can be read in one way only, since all have the same length."""
    letters = [chr(code) for code in alphabet if chr(code) not in taken][:512]
    return map("".join, itertools.product(letters, repeat=2))


def _rename(parts: dict[str, Any], names: dict[str, str]) -> None:
    """Renames tokens in the JSON of a tokenizer: among the added tokens, and with the same ids in the vocabulary."""
    parts["truncation"] = parts["padding"] = None
    model = parts["model"]
    vocabulary = model["vocab"]
    pieces = vocabulary if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    # the model finds a byte token by its name, so the name must stay; it becomes ordinary text when it is not added
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
        # without this, a merge could make a control token from plain text
        prefix = len(model.get("continuing_subword_prefix") or "")
        kept = []
        for merge in model["merges"]:
            left, right = merge if isinstance(merge, list) else merge.split(" ")
            if not names.keys() & {left, right, left + right[prefix:]}:
                kept.append(merge)
        model["merges"] = kept
