"""Which token ids a model can be given, and how many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from xprobe.errors import UsageError
from xprobe.models.anatomy import Anatomy
from xprobe.models.configuration import window


@dataclass(frozen=True)
class TokenLimits:
    """The limits of one model.

    Parameters
    ----------
    vocab_size : int
        Token ids are whole numbers from 0 to ``vocab_size - 1``.
    window : int, optional
        Most tokens of one prompt. None: the model has no limit.

    Examples
    --------
    >>> limits = TokenLimits(vocab_size=160, window=4)
    >>> limits.check((5, 6, 7), "prompt 0")
    >>> limits.check((5, 160), "prompt 1")
    Traceback (most recent call last):
    ...
    xprobe.errors.UsageError: prompt 1: ids[1] is 160, but token ids of this model are whole numbers from 0 to 159
    >>> limits.check((5, 6, 7, 8, 9), "prompt 2")
    Traceback (most recent call last):
    ...
    xprobe.errors.UsageError: prompt 2: ids has 5 tokens, but the window of this model is 4 tokens
    """

    vocab_size: int
    window: int | None = None

    @classmethod
    def from_model(cls, model: Any, anatomy: Anatomy) -> TokenLimits:
        """The limits of ``model``: rows of its unembedding, and the window in its configuration."""
        return cls(anatomy.head.vocab_size, window(model.config))

    def check(self, ids: Sequence[int], owner: str, field: str = "ids") -> None:
        """Refuses token ids that the model cannot be given.

        Parameters
        ----------
        ids : sequence of int
        owner, field : str
            What the ids belong to, and what they are called there, for the message.

        Raises
        ------
        UsageError
            Names the owner, the first bad id and its index, and what is allowed.
        """
        if not isinstance(ids, list | tuple | range):
            raise UsageError(
                f"{owner}: {field} is a {type(ids).__name__}, but must be a tuple of whole numbers; "
                "tuple(ids.tolist()) makes one of a tensor with one dimension"
            )
        if not ids:
            raise UsageError(f"{owner}: {field} is empty, give at least one token id")
        if not (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < self.vocab_size):
            for index, value in enumerate(ids):
                if not is_whole(value) or not 0 <= value < self.vocab_size:
                    raise UsageError(
                        f"{owner}: {field}[{index}] is {show(value)}, but token ids of this model are whole numbers "
                        f"from 0 to {self.vocab_size - 1}"
                    )
        if self.window is not None and len(ids) > self.window:
            raise UsageError(
                f"{owner}: {field} has {len(ids)} tokens, but the window of this model is {self.window} tokens"
            )


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number. True and False are none.

    Examples
    --------
    >>> is_whole(3), is_whole(3.0), is_whole(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def show(value: Any) -> str:
    """A value in an error message: in one line, cut off where it is long.

    Examples
    --------
    >>> show([1, 2]), len(show(list(range(100))))
    ('[1, 2]', 60)
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
