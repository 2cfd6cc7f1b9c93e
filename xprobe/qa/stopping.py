"""Which tokens end an answer: the end of the text or of the turn, and for plain prompts a line break."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from xprobe.qa.control import control_tokens
from xprobe.qa.prompts import is_chat
from xprobe.qa.templates import Template

_PROBE = "Ada"  # an answer that every template writes as it is


def stop_tokens(tokenizer: Any, template: Template, generation_config: Any = None) -> frozenset[int]:
    """The ids of the tokens that end an answer.

    These are the end tokens of the tokenizer and of the model's ``generation_config``. In a chat, the control token
    that the chat template writes after an answer is added. A plain prompt ends with a cue such as "Answer:", so the
    answer to it ends at the first line break: every token with a line break in its text is added.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> from xprobe.qa.templates import load_template
    >>> backend = Tokenizer(models.WordLevel({"a": 0, "\\n": 1}))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    >>> sorted(stop_tokens(tokenizer, load_template("plain")))
    [1, 2]
    """
    configured = getattr(generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])} - {None}
    ends |= _end_of_turn(tokenizer) if is_chat(template, tokenizer) else _line_breaks(tokenizer)
    return frozenset(int(token) for token in ends)


def _end_of_turn(tokenizer: Any) -> set[int]:
    """The first control token that the chat template writes after an answer; nothing if it writes none."""
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": _PROBE}]
    with suppress(Exception):  # templates are programs, and a prompt was built with this one already
        after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(_PROBE)[2]
        controls = control_tokens(tokenizer)
        for token in tokenizer.encode(after, add_special_tokens=False):
            if token in controls:
                return {token}
    return set()


def _line_breaks(tokenizer: Any) -> set[int]:
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return {token for token, text in enumerate(texts) if "\n" in text}
