"""The lens on one prompt: what each layer would say next, at every position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xprobe.arguments import check_instance, check_least
from xprobe.errors import UsageError
from xprobe.single_prompt.layout import page, terminal_table

if TYPE_CHECKING:
    import pandas as pd

    from xprobe.models.loading import LoadedModel

POSITIONS: dict[str, str] = {
    "last": "the last token of the prompt",
    "all": "every token of the prompt",
    "answer": "the positions at which the answer's tokens are predicted",
}
MOST_TOP = 32


@dataclass(frozen=True, eq=False)
class PromptLens:
    """What every layer would say next at P positions of a prompt.

    Attributes
    ----------
    model, lens : str
    tokens : list of str
        Of the prompt, and of the answer where it is read.
    positions : tuple of int [P]
        Which of the tokens are read; what follows them is predicted.
    top : list [L + 1][P][k] of (str, float)
        The most probable next tokens with their probabilities, best first.
    entropy : array [L + 1, P], nats
    answer : str, optional
    answer_rank, answer_probability : array [L + 1, P], optional
        Of the answer's first token at every position; with ``positions="answer"`` of the answer token that follows it.
    """

    model: str
    lens: str
    tokens: list[str]
    positions: tuple[int, ...]
    top: list[list[list[tuple[str, float]]]]
    entropy: NDArray[np.float64]
    answer: str | None = None
    answer_rank: NDArray[np.int64] | None = None
    answer_probability: NDArray[np.float64] | None = None

    @property
    def table(self) -> pd.DataFrame:
        """One row per layer and position: layer, position, token, top, probability, entropy, answer_rank, ..."""
        import pandas as pd

        rows = []
        for layer, by_position in enumerate(self.top):
            for place, best in enumerate(by_position):
                row: dict[str, Any] = {
                    "layer": layer, "position": self.positions[place], "token": self.tokens[self.positions[place]],
                    "top": best[0][0], "probability": best[0][1], "entropy": self.entropy[layer, place],
                }  # fmt: skip
                if self.answer_rank is not None and self.answer_probability is not None:
                    row["answer_rank"] = self.answer_rank[layer, place]
                    row["answer_probability"] = self.answer_probability[layer, place]
                rows.append(row)
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``xprobe lens --json`` prints them."""
        layers = []
        for layer, by_position in enumerate(self.top):
            cells = []
            for place, best in enumerate(by_position):
                cell: dict[str, Any] = {
                    "position": self.positions[place],
                    "top": [{"text": text, "probability": value} for text, value in best],
                    "entropy": float(self.entropy[layer, place]),
                }
                if self.answer_rank is not None and self.answer_probability is not None:
                    cell["answer_rank"] = int(self.answer_rank[layer, place])
                    cell["answer_probability"] = float(self.answer_probability[layer, place])
                cells.append(cell)
            layers.append({"layer": layer, "positions": cells})
        return {"model": self.model, "lens": self.lens, "tokens": self.tokens, "answer": self.answer, "layers": layers}

    def to_text(self, width: int = 100) -> str:
        """A table for a terminal of ``width`` columns."""
        return terminal_table(self, width)

    def to_html(self) -> str:
        """A page in one file, without anything from elsewhere."""
        return page(self)

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return page(self, whole=False)


def lens_prompt(
    model: Any,
    prompt: str,
    *,
    lens: str = "logit",
    answer: str | None = None,
    positions: str = "last",
    top: int = 5,
    tokenizer: Any = None,
    dtype: str = "auto",
    notify: Callable[[str], None] | None = None,
    **options: Any,
) -> PromptLens:
    """Reads every layer of a prompt with a lens.

    Parameters
    ----------
    model : str or PreTrainedModel
        As for ``xprobe.run``. To ask about several prompts, load the model once and pass it with its tokenizer.
    prompt : str
        Tokenised as the tokenizer does by default; no chat template is put around it.
    lens : str
        ``logit``, ``tuned:FOLDER``, ``jacobian:FILE`` or ``regression:FILE``; files may lie on the Hub
        (docs/lenses.md).
    answer : str, optional
        A continuation whose rank and probability are shown. Mind the space before a word.
    positions : str
        ``last``, ``all`` or ``answer``.
    top : int
        How many of the most probable tokens, 1 to 32.
    tokenizer : PreTrainedTokenizerBase, optional
        Of a model in memory.
    dtype : str
        As for ``xprobe.run``, where ``model`` is a name.
    notify : callable (message), optional
        Called with each warning.
    **options
        ``device``, ``trust_remote_code``, ``allow_pickle``, as for ``xprobe.run``.

    Raises
    ------
    UsageError
        An argument is of another kind or out of its range.
    ModelError
        The model cannot be loaded, its parts are not found, or the lens is of another model.
    ParityError
        The lens does not give the model's own logits at the last layer.

    Examples
    --------
    >>> import xprobe
    >>> found = xprobe.lens_prompt("smollm2-135m", "The capital of France is", answer=" Paris")   # doctest: +SKIP
    >>> found.table[["layer", "top", "answer_rank"]].tail()                                       # doctest: +SKIP
    """
    from xprobe.models import in_memory

    check_instance("prompt", prompt, str)
    check_least("top", top, 1)
    if top > MOST_TOP:
        raise UsageError(f"top must be a whole number of at most {MOST_TOP}, got {top}")
    if positions not in POSITIONS:
        raise UsageError(f"unknown positions {positions!r}; known: {', '.join(POSITIONS)}")
    if answer is not None:
        check_instance("answer", answer, str)
    elif positions == "answer":
        raise UsageError("positions 'answer' needs an answer")
    loaded = in_memory.load_or_wrap(model, tokenizer, dtype, options)
    with in_memory.evaluation_mode(loaded.model):
        return _read(loaded, prompt, lens, answer, positions, top, notify or (lambda message: None))


def _read(
    loaded: LoadedModel, prompt: str, lens_name: str, answer: str | None, positions: str, top: int,
    notify: Callable[[str], None],
) -> PromptLens:  # fmt: skip
    import torch
    from xprobe_kernels import lens

    from xprobe.capture.engine import Engine
    from xprobe.capture.requests import Each, Request
    from xprobe.lenses.files import load_lens
    from xprobe.models.anatomy import inspect
    from xprobe.models.parity import TeacherForced

    anatomy, tokenizer = inspect(loaded.model), loaded.tokenizer
    transport, warnings = load_lens(lens_name, anatomy.head.width, anatomy.n_layers, loaded.source.name)
    for message in warnings:
        notify(message)
    ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    if not ids:
        raise UsageError(f"the prompt {prompt!r} has no tokens")
    targets = [] if answer is None else [int(t) for t in tokenizer(answer, add_special_tokens=False)["input_ids"]]
    if answer is not None and not targets:
        raise UsageError(f"the answer {answer!r} has no tokens")
    read = ids + targets[:-1] if positions == "answer" else ids
    places = {
        "last": (len(ids) - 1,), "all": tuple(range(len(ids))), "answer": tuple(range(len(ids) - 1, len(read))),
    }[positions]  # fmt: skip
    engine = Engine(loaded.model, anatomy, max(4096, len(read)), notify)
    engine.strategy = "plain"
    engine.check_parity([TeacherForced(tuple(read), tuple(read[-1:]))])
    rows = engine.capture([Request(tuple(read), {"rows": Each(places)})])["rows"]  # [L + 1, P, D]
    if transport is not None:
        rows = transport.apply(rows)
    layers, count, width = rows.shape
    wanted = targets if positions == "answer" else [targets[0]] * count if targets else [-1] * count
    lookup = torch.tensor(wanted, device=rows.device).repeat(layers)
    head = anatomy.head
    readout = lens(rows.reshape(-1, width).to(head.weight.device), head, lookup.to(head.weight.device), top_k=top)
    norm = readout.logsumexp.double()[:, None]
    assert readout.top_ids is not None
    assert readout.top_logits is not None
    chances = (readout.top_logits.double() - norm).exp().reshape(layers, count, top).tolist()
    best = readout.top_ids.reshape(layers, count, top).tolist()
    names = {token: tokenizer.decode([token]) for some in best for own in some for token in own}
    tokens = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in read]
    found_top = [
        [[(names[token], chance) for token, chance in zip(*both, strict=True)] for both in zip(*some, strict=True)]
        for some in zip(best, chances, strict=True)
    ]
    entropy = readout.entropy.double().reshape(layers, count).cpu().numpy()
    if not targets:
        return PromptLens(loaded.source.name, lens_name, tokens, places, found_top, entropy)
    probability = (readout.logits.double() - norm)[:, 0].exp().reshape(layers, count).cpu().numpy()
    rank = readout.rank[:, 0].reshape(layers, count).cpu().numpy()
    return PromptLens(loaded.source.name, lens_name, tokens, places, found_top, entropy, answer, rank, probability)
