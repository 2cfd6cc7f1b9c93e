"""Single prompts: what a patch of the hidden states does to the next token. No run folder, no question set."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any

from xprobe.arguments import check_instance, check_least
from xprobe.errors import UsageError
from xprobe.single_prompt.layout import patched_html

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from xprobe.capture.edits import Edit
    from xprobe.models.loading import LoadedModel

COLUMNS = ("run", "layer", "position", "token", "top", "effect")  # of the table, beside one for each answer
MOST_SEED = 2**63 - 1
PLAIN_TOKENS = 4096  # up to so many tokens in all, prompts are run as they are; beyond, shared beginnings run once
BEFORE = "before"
MOST_TOP = 32


@dataclass(frozen=True, eq=False)
class PromptEdit:
    """Other states at one layer of a prompt. Give exactly one of ``source``, ``states`` and ``seed``.

    Parameters
    ----------
    layer : int
        0 to L: layer 0 is the input of the first block, layer l the output of block l.
    positions : int or sequence of int
        Tokens of the prompt; negative ones count from its end.
    source : str, optional
        Another prompt, whose states at this layer are put in.
    source_positions : int or sequence of int, optional
        Tokens of ``source``; the same numbers as ``positions`` if None.
    states : Tensor [n, D] or [D], optional
        The states themselves, before the final norm.
    seed : int, optional
        Random directions, with the norms of the states that they replace.

    Raises
    ------
    UsageError
        Not exactly one of the three is given, or a value is of another kind.

    Examples
    --------
    >>> PromptEdit(12, -1, source="The Colosseum is in").positions
    (-1,)
    """

    layer: int
    positions: int | Sequence[int]
    source: str | None = None
    source_positions: int | Sequence[int] | None = None
    states: Tensor | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("source", "states", "seed") if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise UsageError(f"PromptEdit needs exactly one of source, states and seed, got {got}")
        if self.source is not None:
            check_instance("source", self.source, str)
        elif self.source_positions is not None:
            raise UsageError("source_positions is for a source: there is none")
        if self.states is not None and not hasattr(self.states, "is_floating_point"):
            raise UsageError(f"states must be a Tensor, got {type(self.states).__name__}")
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed <= MOST_SEED):
            raise UsageError(f"seed must be a whole number from 0 to {MOST_SEED}, got {self.seed!r}")
        for name in ("positions", "source_positions"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _whole_numbers(name, value))


def _whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """One position or several, as a tuple.

    Raises
    ------
    UsageError
        They are no whole numbers.
    """
    try:
        return tuple(map(index, value)) if hasattr(value, "__iter__") else (index(value),)
    except TypeError:
        raise UsageError(f"{name} must be a whole number or several, got {value!r}") from None


@dataclass(frozen=True, eq=False)
class PatchedPrompt:
    """What a model says after a prompt, before and after edits.

    Attributes
    ----------
    tokens : list of str
        Of the prompt.
    table : DataFrame
        One row for the prompt as it is (``run`` is "before") and one for each run with edits (0, 1, ...): ``layer``,
        ``position`` and ``token`` (of the first edit), a column for each answer with the log-probability of its first
        token in nats, and ``top``, the most probable next tokens. With two answers and runs that take the states of one
        other prompt also ``effect``: how far the preference for the second answer has moved, 0 as before, 1 as after
        the other prompt.
    """

    tokens: list[str]
    table: pd.DataFrame

    def __repr__(self) -> str:
        return f"PatchedPrompt({''.join(self.tokens)!r}: {len(self.table) - 1} runs)\n{self.table.to_string()}"

    def _repr_html_(self) -> str:
        return patched_html(self)


def patch_prompt(
    model: Any,
    prompt: str,
    edits: Sequence[PromptEdit | Sequence[PromptEdit]],
    *,
    answers: Sequence[str] = (),
    tokenizer: Any = None,
    top: int = 3,
    dtype: str = "auto",
    **options: Any,
) -> PatchedPrompt:
    """Runs a prompt again and again, each time with other states at one layer, and reads the next token.

    Parameters
    ----------
    model : str or PreTrainedModel
        As for ``xprobe.run``. To ask about several prompts, load the model once and pass it with its tokenizer.
    prompt : str
        Tokenised as the tokenizer does by default; no chat template is put around it.
    edits : sequence of PromptEdit, or of sequences of PromptEdit
        Each entry is one run; several edits of one run stand in a list.
    answers : sequence of str
        Continuations whose first tokens are followed. Mind the space before a word.
    tokenizer : PreTrainedTokenizerBase, optional
        Of a model in memory.
    top : int
        How many of the most probable next tokens are shown, 1 to 32.
    dtype : str
        As for ``xprobe.run``, where ``model`` is a name.
    **options
        ``device``, ``trust_remote_code``, ``allow_pickle``, as for ``xprobe.run``.

    Raises
    ------
    UsageError
        An argument is of another kind or out of its range, or the first tokens of two answers are the same.
    ModelError
        The model cannot be loaded, or its parts are not found.
    ParityError
        The lens does not give the model's own logits.

    Examples
    --------
    At which layer does the last token hold the city? docs/causes.md has the whole example.

    >>> import xprobe
    >>> edits = [xprobe.PromptEdit(layer, -1, "The Colosseum is in") for layer in (5, 25)]
    >>> found = xprobe.patch_prompt("smollm2-135m", "The Eiffel Tower is in", edits,
    ...                             answers=[" Paris", " Rome"])                            # doctest: +SKIP
    >>> found.table[["layer", "effect"]]                                                    # doctest: +SKIP
    """
    from xprobe.models import in_memory

    check_instance("prompt", prompt, str)
    check_least("top", top, 1)
    if top > MOST_TOP:
        raise UsageError(f"top must be a whole number of at most {MOST_TOP}, got {top}")
    _check_answers(answers)
    runs: list[Sequence[PromptEdit]] = [
        entry if isinstance(entry, list | tuple) else [entry] for entry in _listed(edits)
    ]
    for number, entry in enumerate(runs):
        if not entry or not all(isinstance(one, PromptEdit) for one in entry):
            raise UsageError(f"edits[{number}] must be a PromptEdit, or a list of them, got {entry!r}")
    loaded = in_memory.load_or_wrap(model, tokenizer, dtype, options)
    with in_memory.evaluation_mode(loaded.model) if not isinstance(model, str) else nullcontext():
        return _patch(loaded, prompt, runs, list(answers), top)


def _check_answers(answers: Any) -> None:
    if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
        raise UsageError(f"answers must be a list of texts, got {answers!r}")
    taken = [answer for answer in answers if answer in COLUMNS]
    if taken:
        raise UsageError(f"the answer {taken[0]!r} has the name of a column of the table: put a space before it")


def _listed(edits: Any) -> list[Any]:
    if isinstance(edits, PromptEdit):
        return [edits]
    if not isinstance(edits, list | tuple):
        raise UsageError(f"edits must be a list of PromptEdit, got {edits!r}")
    return list(edits)


def _patch(
    loaded: LoadedModel, prompt: str, runs: list[Sequence[PromptEdit]], answers: list[str], top: int
) -> PatchedPrompt:
    import pandas as pd

    from xprobe.capture.engine import Engine
    from xprobe.capture.requests import Each, Request
    from xprobe.models.anatomy import inspect
    from xprobe.models.parity import TeacherForced

    tokenizer = loaded.tokenizer
    targets = [_first_token(tokenizer, answer) for answer in answers]
    for number, target in enumerate(targets):
        if target in targets[:number]:
            twin = answers[targets.index(target)]
            raise UsageError(f"the answers {twin!r} and {answers[number]!r} begin with the same token")
    ids = {text: tuple(_encode(tokenizer, text)) for text in dict.fromkeys([prompt, *_sources(runs)])}
    place_of = {text: number for number, text in enumerate(ids)}

    def request(text: str, edits: tuple[Edit, ...] = ()) -> Request:
        return Request(ids[text], {"last": Each((len(ids[text]) - 1,))}, edits=edits)

    requests = [request(text) for text in ids]
    requests += [request(prompt, tuple(_edit(one, number, ids, prompt, place_of) for one in entry))
                 for number, entry in enumerate(runs)]  # fmt: skip
    engine = Engine(loaded.model, inspect(loaded.model), PLAIN_TOKENS)
    last = engine.anatomy.n_layers - 1
    for number, entry in enumerate(runs):
        for one in entry:
            if isinstance(one.layer, bool) or not isinstance(one.layer, int) or not 0 <= one.layer <= last:
                raise UsageError(f"edits[{number}]: layer must be a whole number from 0 to {last}, got {one.layer!r}")
    if sum(len(one.ids) for one in requests) <= PLAIN_TOKENS:
        engine.strategy = "plain"
    engine.check_parity([TeacherForced(own, own[-1:]) for own in ids.values()][:4])
    rows = engine.capture(requests, last_layer=True)["last"][0]
    values, tops = _read(rows, targets, top, engine)
    tokens = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids[prompt]]
    lines: list[dict[str, Any]] = []
    for run, row in ((BEFORE, place_of[prompt]), *((number, len(ids) + number) for number in range(len(runs)))):
        edit = runs[run][0] if isinstance(run, int) else None
        place = None if edit is None else range(len(tokens))[edit.positions[0]]  # type: ignore[index]
        line: dict[str, Any] = {
            "run": run, "layer": None if edit is None else edit.layer, "position": place,
            "token": "" if place is None else tokens[place],
        }  # fmt: skip
        line |= dict(zip(answers, values[row], strict=True))
        line["top"] = [(tokenizer.decode([token]), round(value, 3)) for token, value in tops[row]]
        source = _only_source(runs[run]) if isinstance(run, int) else prompt
        if len(answers) == 2 and source is not None:
            start, end, now = (values[at][1] - values[at][0] for at in (place_of[prompt], place_of[source], row))
            line["effect"] = 0.0 if run == BEFORE else (now - start) / (end - start) if end != start else float("nan")
        lines.append(line)
    return PatchedPrompt(tokens, pd.DataFrame(lines).set_index("run"))


def _sources(runs: list[Sequence[PromptEdit]]) -> list[str]:
    return [edit.source for entry in runs for edit in entry if edit.source is not None]


def _only_source(entry: Sequence[PromptEdit]) -> str | None:
    """The one prompt that all edits of a run take states of; None if there is no such prompt."""
    sources = {edit.source for edit in entry}
    return next(iter(sources)) if len(sources) == 1 else None


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    if not ids:
        raise UsageError(f"the prompt {text!r} has no tokens")
    return ids


def _first_token(tokenizer: Any, answer: str) -> int:
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UsageError(f"the answer {answer!r} has no tokens")
    return int(ids[0])


def _edit(edit: PromptEdit, number: int, ids: dict[str, tuple[int, ...]], prompt: str, places: dict[str, int]) -> Edit:
    """The edit on token ids.

    Raises
    ------
    UsageError
        A position is outside of its prompt.
    """
    from xprobe.capture.edits import Edit, RandomStates, StatesOf

    def counted(positions: Any, text: str) -> tuple[int, ...]:
        count = len(ids[text])
        for position in positions:
            if isinstance(position, bool) or not isinstance(position, int) or not -count <= position < count:
                raise UsageError(
                    f"edits[{number}] has the position {position!r}, but {text!r} has {count} tokens: {-count} to "
                    f"{count - 1}"
                )
        return tuple(position % count for position in positions)

    positions = counted(edit.positions, prompt)
    if edit.source is not None:
        taken = edit.positions if edit.source_positions is None else edit.source_positions
        return Edit(edit.layer, positions, StatesOf(places[edit.source], counted(taken, edit.source)))
    if edit.seed is not None:
        return Edit(edit.layer, positions, RandomStates(edit.seed))
    states = edit.states
    return Edit(edit.layer, positions, states[None] if getattr(states, "ndim", 2) == 1 else states)  # type: ignore[index,arg-type]


def _read(
    rows: Tensor, targets: list[int], top: int, engine: Any
) -> tuple[list[list[float]], list[list[tuple[int, float]]]]:
    """Log-probabilities of the targets, and the most probable tokens with theirs, after each row of the last layer."""
    import torch
    from xprobe_kernels import lens

    head = engine.anatomy.head
    rows = rows.to(head.weight.device)
    ids = torch.tensor([targets or [-1]] * len(rows), device=rows.device)
    try:
        readout = lens(rows, head, ids, top_k=top)
    except ValueError as error:
        raise UsageError(str(error)) from error
    norm = readout.logsumexp.double()[:, None]
    values = (readout.logits.double() - norm)[:, : len(targets)].tolist()
    top_ids, top_logits = readout.top_ids, readout.top_logits
    assert top_ids is not None
    assert top_logits is not None
    tops = zip(top_ids.tolist(), (top_logits.double() - norm).tolist(), strict=True)
    return values, [list(zip(*both, strict=True)) for both in tops]
