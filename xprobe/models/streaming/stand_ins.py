"""Runs one block of a decoder at a time with the decoder's own code.

The other blocks are skipped: their forward returns its input. The decoder itself prepares the arguments of every block
(masks, positions, rotary embeddings and whatever else its family needs), so this module knows none of them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xprobe.errors import ModelError
from xprobe.models.block_io import hidden_argument, hidden_input, hidden_output, model_code_errors, with_hidden_input

# the forms in which a block may return its hidden state: a tensor, the first entry of a tuple, or a named entry
OUTPUT_FORMS: tuple[Callable[[Tensor], Any], ...] = (
    lambda hidden: hidden, lambda hidden: (hidden,), lambda h: (h, None), lambda h: (h, None, None),
    lambda h: {"hidden_states": h},
)  # fmt: skip
Forward = Callable[..., Any]
Replacement = Callable[[int, tuple, dict, Forward], Any]


@contextmanager
def replaced_forwards(blocks: Iterable[nn.Module], replacement: Replacement) -> Iterator[None]:
    """Replaces the forward of each block inside the context, and restores it on exit.

    The modules stay in place, so their hooks run and a decoder can read their attributes.

    Parameters
    ----------
    blocks : iterable of Module
    replacement : callable (index, args, kwargs, forward)
        Called instead of the block's forward. ``forward`` is the original.

    Examples
    --------
    >>> blocks = [nn.Linear(2, 2), nn.Linear(2, 2)]
    >>> with replaced_forwards(blocks, lambda index, args, kwargs, forward: index):
    ...     [block(torch.ones(2)) for block in blocks]
    [0, 1]
    """

    def bind(index: int, forward: Forward) -> Forward:
        return lambda *args, **kwargs: replacement(index, args, kwargs, forward)

    def restore(block: nn.Module, before: Any) -> None:
        del block.__dict__["forward"]
        if before is not None:
            block.__dict__["forward"] = before

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(restore, block, block.__dict__.get("forward"))
            block.__dict__["forward"] = bind(index, block.forward)
        yield


class BlockRunner:
    """Runs the blocks of ``model`` one at a time.

    Parameters
    ----------
    model : PreTrainedModel
    blocks : ModuleList
        Its blocks. Their weights may be on the meta device.
    ids : Tensor [1, T], int64
        A short prompt for the checks of the constructor.

    Raises
    ------
    ModelError
        The blocks exchange more than one hidden state: the decoder changes it between two blocks, an argument of a
        block depends on earlier blocks, or blocks share an object.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> runner = BlockRunner(model, model.model.layers, ids)
    >>> embedded, first = runner.run_block(0, {"input_ids": ids}, None)
    >>> _, second = runner.run_block(1, {"input_ids": ids}, first)
    >>> logits = model.lm_head(model.model.norm(second))
    >>> bool(torch.allclose(logits, model(ids).logits, atol=1e-6))
    True
    """

    def __init__(self, model: Any, blocks: nn.ModuleList, ids: Tensor) -> None:
        self.model, self.blocks = model, blocks
        self.form = self._find_form(ids)
        self._check_arguments(ids)

    def run_block(self, index: int, inputs: dict[str, Tensor], hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs block ``index``.

        Parameters
        ----------
        inputs : dict of str to Tensor
            Inputs of the decoder, such as ``input_ids`` [B, T].
        hidden : Tensor [B, T, D], optional
            Output of the block before; None for the first block.

        Returns
        -------
        tuple of Tensor [B, T, D]
            The hidden states that enter and leave the block.
        """
        result: list[Tensor] = []

        def replacement(position: int, args: tuple, kwargs: dict, forward: Forward) -> Any:
            before = hidden_input(args, kwargs)
            if position != index:
                return self.form(before)
            if hidden is not None:
                before = hidden
                args, kwargs = with_hidden_input(args, kwargs, hidden)
            after = hidden_output(forward(*args, **kwargs))
            result.extend((before, after))
            return self.form(after)

        with torch.inference_mode(), replaced_forwards(self.blocks, replacement), model_code_errors(self.model):
            self.model.base_model(**inputs, use_cache=False)
        return result[0], result[1]

    @contextmanager
    def with_last_output(self, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Skips all blocks in forward passes inside the context. The last block returns ``make(hidden)``."""
        final = len(self.blocks) - 1

        def replacement(index: int, args: tuple, kwargs: dict, forward: Forward) -> Any:
            hidden = hidden_input(args, kwargs)
            return self.form(make(hidden) if index == final else hidden)

        with replaced_forwards(self.blocks, replacement):
            yield

    def _find_form(self, ids: Tensor) -> Callable[[Tensor], Any]:
        """The output form with which every block gets exactly the tensor that the block before returned."""
        problems: list[str] = []
        for form in OUTPUT_FORMS:
            trace = _Trace(form)
            try:
                with torch.inference_mode(), replaced_forwards(self.blocks, trace.replacement):
                    self.model(input_ids=ids, use_cache=False)
            except Exception as error:  # a wrong form may raise any exception in the decoder
                problems.append(f"its decoder needs more from them ({type(error).__name__}: {str(error)[:100]})")
                continue
            if trace.order != list(range(len(self.blocks))):
                problems.append("they do not run once each in order")
            elif trace.changed:
                problems.append("the hidden state is changed between two of them")
            elif trace.returned[-1].ndim != 3:
                problems.append("they hand on more than one hidden state [batch, tokens, width]")
            else:
                return form
        raise self._refusal(next((reason for reason in problems if "needs more" not in reason), problems[0]))

    def _check_arguments(self, ids: Tensor) -> None:
        """Refuses blocks whose other arguments depend on earlier blocks or may carry state between blocks."""
        records: list[list[dict[str, Any]]] = []
        for shift in (0.0, 1.0):
            calls: list[dict[str, Any]] = []

            def replacement(
                index: int, args: tuple, kwargs: dict, forward: Forward, shift: float = shift, calls: Any = calls
            ) -> Any:
                hidden = hidden_input(args, kwargs)
                key = hidden_argument(args, kwargs)
                others = {f"argument {position}": value for position, value in enumerate(args) if position != key}
                others |= {name: value for name, value in kwargs.items() if name != key}
                calls.append(others)
                return self.form(hidden * (1 + shift) + shift)

            with torch.inference_mode(), replaced_forwards(self.blocks, replacement):
                self.model(input_ids=ids, use_cache=False)
            records.append(calls)
        for index, (one, other) in enumerate(zip(*records, strict=True)):
            for name, value in one.items():
                if (reason := _difference(value, other.get(name))) is not None:
                    raise self._refusal(f"block {index} is given {name!r}, {reason}")

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"the blocks of {type(self.model).__name__} cannot be run one at a time: {reason}")


class _Trace:
    """Replaces blocks by copies of their input and records whether each block gets the tensor of the block before."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        self.form = form
        self.returned: list[Tensor] = []
        self.order: list[int] = []
        self.changed = False

    def replacement(self, index: int, args: tuple, kwargs: dict, forward: Forward) -> Any:
        hidden = hidden_input(args, kwargs)
        self.changed = self.changed or (bool(self.returned) and hidden is not self.returned[-1])
        self.returned.append(hidden.clone())
        self.order.append(index)
        return self.form(self.returned[-1])


def _difference(one: Any, other: Any) -> str | None:
    """Why an argument is not a constant for the given inputs. None if it is."""
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
        return None if same else "which depends on what earlier blocks computed"
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        reasons = (_difference(a, b) for a, b in zip(one, other, strict=True))
        return next((reason for reason in reasons if reason is not None), None)
    if one is None or isinstance(one, bool | int | float | str | torch.dtype | torch.device | torch.Size):
        return None if one == other else "which depends on what earlier blocks computed"
    return f"a {type(one).__name__} through which blocks may share state"
