"""Runs a decoder with some of its blocks left out, so that one block can be driven by the decoder's own code.

A block that is left out hands on what it is given. The decoder itself prepares every block's arguments (masks,
positions, rotary embeddings, whatever its family gives each layer), so none of them is known by name here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xprobe.errors import ModelError
from xprobe.models.block_io import hidden_argument, hidden_input, hidden_output, model_code_errors, with_hidden_input

# how a block may hand on its hidden state: as the tensor, as the first of a tuple, or under a name
OUTPUT_FORMS: tuple[Callable[[Tensor], Any], ...] = (
    lambda hidden: hidden, lambda hidden: (hidden,), lambda h: (h, None), lambda h: (h, None, None),
    lambda h: {"hidden_states": h},
)  # fmt: skip
Forward = Callable[..., Any]
Stand = Callable[[int, tuple, dict, Forward], Any]


@contextmanager
def replaced_forwards(blocks: Iterable[nn.Module], stand: Stand) -> Iterator[None]:
    """Calls ``stand(index, args, kwargs, own_forward)`` instead of each block's forward; undone on exit.

    The modules stay in place, so hooks on them fire and attributes that a decoder asks its blocks for are theirs.
    """

    def shadow(index: int, own: Forward) -> Forward:
        return lambda *args, **kwargs: stand(index, args, kwargs, own)

    def restore(block: nn.Module, before: Any) -> None:
        del block.__dict__["forward"]
        if before is not None:
            block.__dict__["forward"] = before

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(restore, block, block.__dict__.get("forward"))
            block.__dict__["forward"] = shadow(index, block.forward)
        yield


class BlockRunner:
    """Drives the blocks of ``model`` one at a time.

    Raises
    ------
    ModelError
        The blocks do more than hand one hidden state on: the decoder changes it between blocks, gives a block what
        depends on earlier blocks' work, or lets them share state.
    """

    def __init__(self, model: Any, blocks: nn.ModuleList, ids: Tensor) -> None:
        self.model, self.blocks = model, blocks
        self.form = self._find_form(ids)
        self._check_arguments(ids)

    def run_block(self, index: int, inputs: dict[str, Tensor], hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """(what entered, what left) block ``index`` [B, T, D], the decoder being fed ``inputs``.

        ``hidden`` is what the blocks before have made of it; None for the first block.
        """
        result: list[Tensor] = []

        def stand(at: int, args: tuple, kwargs: dict, own: Forward) -> Any:
            given = hidden_input(args, kwargs)
            if at != index:
                return self.form(given)
            if hidden is not None:
                given = hidden
                args, kwargs = with_hidden_input(args, kwargs, hidden)
            left = hidden_output(own(*args, **kwargs))
            result.extend((given, left))
            return self.form(left)

        with torch.inference_mode(), replaced_forwards(self.blocks, stand), model_code_errors(self.model):
            self.model.base_model(**inputs, use_cache=False)
        return result[0], result[1]

    @contextmanager
    def with_last_output(self, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Forward passes inside leave out all blocks; the last one hands on ``make(hidden)`` in its place."""
        final = len(self.blocks) - 1

        def stand(at: int, args: tuple, kwargs: dict, own: Forward) -> Any:
            hidden = hidden_input(args, kwargs)
            return self.form(make(hidden) if at == final else hidden)

        with replaced_forwards(self.blocks, stand):
            yield

    def _find_form(self, ids: Tensor) -> Callable[[Tensor], Any]:
        """The form in which every block gets exactly the tensor that the one before handed on."""
        problems: list[str] = []
        for form in OUTPUT_FORMS:
            trace = _Trace(form)
            try:
                with torch.inference_mode(), replaced_forwards(self.blocks, trace.stand):
                    self.model(input_ids=ids, use_cache=False)
            except Exception as error:  # the wrong form ends in many kinds of errors inside the decoder
                problems.append(f"its decoder needs more from them ({type(error).__name__}: {str(error)[:100]})")
                continue
            if trace.order != list(range(len(self.blocks))):
                problems.append("they do not run once each in order")
            elif trace.changed:
                problems.append("the hidden state is changed between two of them")
            elif trace.handed[-1].ndim != 3:
                problems.append("they hand on more than one hidden state [batch, tokens, width]")
            else:
                return form
        raise self._refusal(next((why for why in problems if "needs more" not in why), problems[0]))

    def _check_arguments(self, ids: Tensor) -> None:
        """Refuses blocks whose other arguments depend on what earlier blocks computed, or can carry it."""
        records: list[list[dict[str, Any]]] = []
        for shift in (0.0, 1.0):
            calls: list[dict[str, Any]] = []

            def stand(
                at: int, args: tuple, kwargs: dict, own: Forward, shift: float = shift, calls: Any = calls
            ) -> Any:
                hidden = hidden_input(args, kwargs)
                where = hidden_argument(args, kwargs)
                rest = {f"argument {place}": value for place, value in enumerate(args) if place != where}
                rest |= {name: value for name, value in kwargs.items() if name != where}
                calls.append(rest)
                return self.form(hidden * (1 + shift) + shift)

            with torch.inference_mode(), replaced_forwards(self.blocks, stand):
                self.model(input_ids=ids, use_cache=False)
            records.append(calls)
        for index, (one, other) in enumerate(zip(*records, strict=True)):
            for name, value in one.items():
                if (reason := _difference(value, other.get(name))) is not None:
                    raise self._refusal(f"block {index} is given {name!r}, {reason}")

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"the blocks of {type(self.model).__name__} cannot be run one at a time: {reason}")


class _Trace:
    """Stand-ins that hand on copies, and note whether each gets the very tensor that the one before handed on."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        self.form = form
        self.handed: list[Tensor] = []
        self.order: list[int] = []
        self.changed = False

    def stand(self, at: int, args: tuple, kwargs: dict, own: Forward) -> Any:
        given = hidden_input(args, kwargs)
        self.changed = self.changed or (bool(self.handed) and given is not self.handed[-1])
        self.handed.append(given.clone())
        self.order.append(at)
        return self.form(self.handed[-1])


def _difference(one: Any, other: Any) -> str | None:
    """Why an argument is more than a constant of the inputs; None if it is not."""
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
        return None if same else "which depends on what earlier blocks computed"
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return next((why for a, b in zip(one, other, strict=True) if (why := _difference(a, b)) is not None), None)
    if one is None or isinstance(one, bool | int | float | str | torch.dtype | torch.device | torch.Size):
        return None if one == other else "which depends on what earlier blocks computed"
    return f"a {type(one).__name__} in which blocks may leave things for each other"
