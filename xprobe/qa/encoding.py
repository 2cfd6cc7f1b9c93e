"""Tokenises prompts, and finds the tokens of each part of a prompt. Decoding verifies every part.

Parts that come from the data are tokenised as text. If the tokenizer finds a control token in them, a copy of the
tokenizer that knows no such token (``control.py``) tokenises the text again, and the result is verified to hold none.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from xprobe.qa.control import RenamedTokenizer, ambiguous_tokens, control_tokens, renamed_tokenizers

Span = tuple[int, int]
CHECKED_TEXTS = 4  # ordinary texts on which a copy of the tokenizer must give the same ids as the tokenizer


class UnverifiedError(Exception):
    """A span or an answer does not decode to its text."""


class ControlTokenError(Exception):
    """The tokenizer takes text of the data for a control token."""


@dataclass(frozen=True)
class Text:
    """A prompt and its answer as text.

    Parameters
    ----------
    pieces : tuple of (str, str)
        The prompt as pairs (part, text). A part is ``template``, ``context`` or ``question``. There is one context and
        one question.
    lead : str
        Text between prompt and answer. Its tokens belong to the answer.
    answer : str
        The gold answer.
    answer_start : int
        Character position of the answer in the context.

    Examples
    --------
    >>> pieces = (("context", "Ada sold 40 boats."), ("template", " Q: "), ("question", "How many?"))
    >>> text = Text(pieces, " ", "40", 9)
    >>> text.prompt
    'Ada sold 40 boats. Q: How many?'
    >>> text.character_spans
    {'context': (0, 18), 'question': (22, 31), 'answer_in_context': (9, 11)}
    """

    pieces: tuple[tuple[str, str], ...]
    lead: str
    answer: str
    answer_start: int

    @property
    def prompt(self) -> str:
        """The text of the prompt."""
        return "".join(text for _, text in self.pieces)

    @property
    def character_spans(self) -> dict[str, Span]:
        """The character spans of context, question and gold answer in the prompt."""
        spans: dict[str, Span] = {}
        start = 0
        for name, text in self.pieces:
            if name != "template":
                spans[name] = (start, start + len(text))
            start += len(text)
        first = spans["context"][0] + self.answer_start
        return spans | {"answer_in_context": (first, first + len(self.answer))}

    def with_template(self, change: Callable[[str], str]) -> Text:
        """This text with ``change`` applied to every part of the template. The data stay the same."""
        joined: list[tuple[str, str]] = []
        for name, text in self.pieces:
            if name == "template" and joined and joined[-1][0] == "template":
                joined[-1] = (name, joined[-1][1] + text)
            else:
                joined.append((name, text))
        pieces = tuple((name, change(text) if name == "template" else text) for name, text in joined)
        return replace(self, pieces=pieces, lead=change(self.lead))

    def without_data(self) -> Text:
        """This text with single letters instead of context, question and answer."""
        letters = {"context": "a", "question": "b"}
        pieces = tuple((name, letters.get(name, text)) for name, text in self.pieces)
        return replace(self, pieces=pieces, answer="a", answer_start=0)


class Tokens(NamedTuple):
    """Token ids of a text, the number of them that belong to the prompt, and the token spans of its parts.

    ``context_offsets`` are the characters of the context that each of its tokens holds.
    """

    ids: tuple[int, ...]
    length: int
    spans: dict[str, Span]
    context_offsets: tuple[Span, ...]


class _Encoded(NamedTuple):
    ids: list[int]
    offsets: list[Span]


_Encode = Callable[[list[str], bool], list[_Encoded]]  # (texts, whether the tokenizer adds its special tokens)


def encode_texts(
    texts: Sequence[Text], tokenizer: Any, *, chat: bool
) -> list[Tokens | UnverifiedError | ControlTokenError]:
    """The tokens of every text, or the error that keeps it from having any.

    Parameters
    ----------
    texts : sequence of Text
        What to tokenise.
    tokenizer : transformers tokenizer
        A fast one.
    chat : bool
        Whether the texts come from a chat template. It writes the special tokens itself, so the tokenizer adds none.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = "[UNK] Ada sold 40 boats Who".split()
    >>> backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    >>> text = Text((("context", "Ada sold 40 boats"), ("template", " "), ("question", "Who")), " ", "Ada", 0)
    >>> (tokens,) = encode_texts([text], tokenizer, chat=False)
    >>> tokens.ids, tokens.length, tokens.spans["question"]
    ((1, 2, 3, 4, 5, 1), 5, (4, 5))
    >>> tokens.context_offsets
    ((0, 3), (4, 8), (9, 11), (12, 17))
    """
    reader = _Reader(tokenizer, chat)
    results = reader.read(texts, _encode_with(tokenizer))
    suspects = [index for index, result in enumerate(results) if isinstance(result, ControlTokenError)]
    if not suspects:
        return results
    ordinary = [text for text, result in zip(texts, results, strict=True) if isinstance(result, Tokens)]
    checked = {text.without_data(): None for text in (texts[index] for index in suspects)}
    copy = _faithful_copy(reader, [*ordinary[:CHECKED_TEXTS], *checked], [texts[index] for index in suspects])
    if copy is None:
        return results
    renamed = [texts[index].with_template(copy.rename) for index in suspects]
    again = reader.read(renamed, _encode_renamed(copy))
    for index, result in zip(suspects, again, strict=True):
        if isinstance(result, UnverifiedError):
            result = ControlTokenError(f"{results[index]}; as text, {result}")
        results[index] = result
    return results


class _Reader:
    """Finds the parts of texts in their tokens, and verifies them with one tokenizer."""

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.controls = control_tokens(tokenizer)
        self._ambiguous = {id_: _comparable(self.controls[id_]) for id_ in ambiguous_tokens(tokenizer, self.controls)}

    def read(self, texts: Sequence[Text], encode: _Encode) -> list[Tokens | UnverifiedError | ControlTokenError]:
        heads = encode([text.prompt for text in texts], not self.chat)
        wholes = encode([text.prompt + text.lead + text.answer for text in texts], not self.chat)
        results: list[Tokens | UnverifiedError | ControlTokenError] = []
        for text, head, whole in zip(texts, heads, wholes, strict=True):
            try:
                results.append(self._read(text, head, whole, encode))
            except (UnverifiedError, ControlTokenError) as error:
                results.append(error)
        return results

    def _read(self, text: Text, head: _Encoded, whole: _Encoded, encode: _Encode) -> Tokens:
        prompt, places = text.prompt, text.character_spans
        head, answer = self._split(text, prompt, head, whole, encode)
        spans = {name: _overlapping(head.offsets, place) for name, place in places.items()}
        for name in ("context", "question"):
            self._check_text(head, spans[name], prompt, places[name], name)
        for name, span in spans.items():
            self._verify_span(head, span, prompt, places[name])
        self._verify_answer(answer, text.answer)
        return Tokens((*head.ids, *answer), len(head.ids), spans, _inside(head.offsets, spans, places["context"]))

    def _split(
        self, text: Text, prompt: str, head: _Encoded, whole: _Encoded, encode: _Encode
    ) -> tuple[_Encoded, list[int]]:
        """The tokens of the prompt, and the tokens of the answer that follow it.

        The two are tokenised together. If that merges the end of the prompt with the answer, the answer is tokenised
        alone. One exception: the blank of a chat template before the answer may be in the first token of the answer,
        as in the texts on which the model was trained.
        """
        length = len(head.ids)
        together = whole.ids[:length] == head.ids and len(whole.ids) > length
        if not together and self.chat:
            length = next((index for index, (_, stop) in enumerate(whole.offsets) if stop > len(prompt)), 0)
            together = length > 0 and not prompt[whole.offsets[length][0] :].strip()
        if together:
            joined = prompt + text.lead + text.answer
            place = (len(joined) - len(text.answer), len(joined))
            self._check_text(whole, (length, len(whole.ids)), joined, place, "answer")
            head = head if length == len(head.ids) else _Encoded(whole.ids[:length], whole.offsets[:length])
            return head, whole.ids[length:]
        (alone,) = encode([text.lead + text.answer], False)
        place = (len(text.lead), len(text.lead) + len(text.answer))
        self._check_text(alone, (0, len(alone.ids)), text.lead + text.answer, place, "answer")
        return head, alone.ids

    def _check_text(self, encoded: _Encoded, span: Span, text: str, place: Span, name: str) -> None:
        """Raises ControlTokenError if a control token within ``span`` covers characters of ``text[place]``."""
        if self.controls.keys().isdisjoint(encoded.ids[span[0] : span[1]]):
            return
        for index, id_ in enumerate(encoded.ids[slice(*span)], span[0]):
            if id_ not in self.controls:
                continue
            start, stop = encoded.offsets[index]
            # the unknown token and byte tokens count only if the text spells their name
            if id_ in self._ambiguous and (
                stop - start < 2 or self._ambiguous[id_] not in _comparable(text[start:stop])
            ):
                continue
            # a control token of the template may include blanks around it
            if text[max(start, place[0]) : min(stop, place[1])].strip():
                raise ControlTokenError(f"{self.controls[id_]!r} in the {name}")

    def _verify_span(self, head: _Encoded, span: Span, text: str, place: Span) -> None:
        wanted, (first, last) = text[slice(*place)], span
        if first == last:
            raise UnverifiedError(f"no token holds {_shorten(wanted)}")
        decoded = _comparable(self._decode(head.ids[first:last])).strip("\ufffd")
        covered = text[
            min(a for a, b in head.offsets[first:last] if a < b) : max(b for _, b in head.offsets[first:last])
        ]
        if _comparable(wanted) not in decoded or decoded not in _comparable(covered):
            raise UnverifiedError(f"{_shorten(wanted)} decodes to {_shorten(decoded)}")

    def _verify_answer(self, ids: list[int], answer: str) -> None:
        decoded = self._decode(ids) if ids else ""
        if not ids or _comparable(decoded) != _comparable(answer):
            raise UnverifiedError(f"answer {_shorten(answer)} decodes to {_shorten(decoded)}")

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _encode_with(tokenizer: Any) -> _Encode:
    def encode(texts: list[str], special: bool) -> list[_Encoded]:
        encoded = tokenizer(
            texts, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True,
            padding=False,
        )  # fmt: skip
        columns = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
        return [_without_end(*row, special) for row in zip(*columns, strict=True)]

    return encode


def _encode_renamed(copy: RenamedTokenizer) -> _Encode:
    def encode(texts: list[str], special: bool) -> list[_Encoded]:
        return [
            _without_end(one.ids, one.offsets, one.special_tokens_mask, special)
            for one in copy.encode(texts, special=special)
        ]

    return encode


def _without_end(ids: list[int], offsets: Iterable[Span], mask: list[int], special: bool) -> _Encoded:
    """Ids and character offsets, without special tokens that the tokenizer added at the end."""
    offsets = [(int(start), int(stop)) for start, stop in offsets]
    stop = len(ids)
    while special and stop and mask[stop - 1] and offsets[stop - 1][0] == offsets[stop - 1][1]:
        stop -= 1
    return _Encoded(list(ids[:stop]), offsets[:stop])


def _faithful_copy(reader: _Reader, checked: list[Text], texts: list[Text]) -> RenamedTokenizer | None:
    """A copy of the tokenizer that gives the same ids for ``checked``; None if there is none."""
    every = [text.prompt + text.lead + text.answer for text in (*checked, *texts)]
    wholes = every[: len(checked)]
    wanted = [one.ids for one in _encode_with(reader.tokenizer)(wholes, not reader.chat)]
    for copy in renamed_tokenizers(reader.tokenizer, reader.controls, every):
        renamed = [text.with_template(copy.rename) for text in checked]
        got = _encode_renamed(copy)([text.prompt + text.lead + text.answer for text in renamed], not reader.chat)
        if [one.ids for one in got] == wanted:
            return copy
    return None


def _overlapping(offsets: list[Span], place: Span) -> Span:
    """The span of tokens that hold a character of ``place``; an empty span if there are none."""
    start, stop = place
    inside = [index for index, (a, b) in enumerate(offsets) if a < stop and b > start and a < b]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _inside(offsets: list[Span], spans: dict[str, Span], place: Span) -> tuple[Span, ...]:
    """The characters of each token of the context, counted from the context's first character."""
    first, last = place
    return tuple(
        (min(max(start, first), last) - first, min(max(stop, first), last) - first)
        for start, stop in offsets[slice(*spans["context"])]
    )


@lru_cache(maxsize=256)  # prompts on one context come one after the other
def _comparable(text: str) -> str:
    """``text`` without what a tokenizer may change: blanks, case, compatibility forms and format characters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if not c.isspace() and unicodedata.category(c) != "Cf")


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:18]} … {text[-18:]}")
