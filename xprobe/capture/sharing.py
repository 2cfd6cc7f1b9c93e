"""Checks whether prompts that share a forward pass keep the rows of their own plain runs.

Two checks run the model itself, because the name of its family does not answer the question. *Isolation*: does a token
of a packed sequence depend on tokens that it must not see? The check changes these tokens, and then moves them; the
states of the other tokens must not change. Attention obeys the packing. Convolutions and recurrences do not, and this
check finds very small effects of them. *Agreement*: does the lens give the same values on these rows as on the rows of
plain runs?
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from xprobe_kernels import Unembedding, reference
from xprobe_kernels.transfer import upload

from xprobe.capture.requests import Each, Request
from xprobe.capture.rows import Rows
from xprobe.capture.tree import Segment, Tree, common_length
from xprobe.capture.tree_attention import Layout, packed_attention
from xprobe.models.anatomy import input_device
from xprobe.models.passes import Pass

CHECK_REQUESTS = 4  # most requests in the check of agreement
CHECK_TOKENS = 128  # most tokens of each, unless the model treats distant tokens in another way
CHECK_ROWS = 2  # rows that are compared of each
# names of the numbers in a configuration that say from which distance on tokens are treated in another way
_REACH = re.compile(r"window|chunk|local|floor_scale|index_topk")

BEGINNING, CONTINUATION = 16, 24  # tokens of the check for isolation
# allowed differences in units of rounding of a channel's largest entry, where sums may have another order; the
# roundings of several layers add up
ISOLATED_ROUNDINGS = {8: 256, 4: 256, 2: 16}  # by bytes of the dtype


class NotIsolated(Exception):
    """A token depends on tokens of other prompts."""


class CarriesState(NotIsolated):
    """A token depends on tokens of other prompts by a state outside of attention, which no cache holds."""


@dataclass(frozen=True)
class _Bound:
    """How far rows may differ, as a share of the spread of the logits, and which row counts (1.0: the worst one).

    With 16 bits, rounding can change the routing to experts and so whole rows. There the median row counts.
    """

    quantile: float
    floor: float
    ceiling: float
    noise: float  # the bound, between floor and ceiling, as a multiple of the difference between plain batches


BOUNDS = {
    torch.float64: _Bound(1.0, 1e-6, 1e-5, 8),
    torch.float32: _Bound(1.0, 3e-4, 3e-3, 8),
    torch.float16: _Bound(0.5, 2e-2, 1e-1, 3),
    torch.bfloat16: _Bound(0.5, 5e-2, 2e-1, 3),
}


def short_sample(requests: Sequence[Request], config: Any, max_shared_tokens: int | None = None) -> list[Request]:
    """The requests of the check of agreement: a few of the caller's, cut to a bounded length, with reads of its own.

    The cost of the check is bounded, however long and however many the requests are. A long request loses tokens from
    its middle: a part of the beginning that it shares with others stays, and so do its own last tokens. Prompts of up
    to ``CHECK_TOKENS`` tokens show whether attention, positions and packing fit together. Some models treat distant
    tokens in another way, for example outside a sliding window. If the caller's requests reach so far, then those of
    the check do, too.

    Parameters
    ----------
    requests : sequence of Request
        The first ``CHECK_REQUESTS`` are taken.
    config : PreTrainedConfig
        Of the model.
    max_shared_tokens : int, optional
        Requests of the check are no longer than this (``xprobe.capture.plan.rotary_limit``).

    Returns
    -------
    list of Request
        Each reads ``rows``: up to ``CHECK_ROWS`` positions after its shared beginning.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> page = tuple(range(10, 3010))
    >>> sample = [Request((*page, token, token), {"last": Each((3001,))}) for token in (5, 6)]
    >>> short = short_sample(sample, LlamaConfig())
    >>> [(len(request.ids), request.ids[-3:], request.reads["rows"].positions) for request in short]
    [(128, (135, 5, 5), (126, 127)), (128, (135, 6, 6), (126, 127))]
    """
    taken = requests[:CHECK_REQUESTS]
    longest = max(len(request.ids) for request in taken)
    most = min(_check_length(config, longest), max_shared_tokens or longest)
    short = []
    for index, request in enumerate(taken):
        ids = request.ids
        others = [other.ids for number, other in enumerate(taken) if number != index]
        shared = max((common_length(ids, other) for other in others), default=0)
        if len(ids) > most:
            own = min(len(ids) - shared, max(most // 2, most - shared))
            shared = min(shared, most - own)
            ids = (*ids[:shared], *ids[len(ids) - own :])
        last = len(ids) - 1
        first = min(shared, last)
        step = max(1, (last - first) // max(1, CHECK_ROWS - 1))
        positions = tuple(sorted({*range(last, first - 1, -step)}))[-CHECK_ROWS:]
        short.append(Request(ids, {"rows": Each(positions)}, request.group))
    return short


def _check_length(config: Any, longest: int) -> int:
    """Most tokens of a request in the check of agreement, where the longest request has ``longest``."""
    values = config.get_text_config(decoder=True).to_dict()
    reaches = [
        value
        for name, value in values.items()
        if _REACH.search(name) and isinstance(value, int) and CHECK_TOKENS // 2 < value < longest
    ]
    return max([CHECK_TOKENS, *(reach + CHECK_TOKENS // 2 for reach in reaches)])


def carries_state(model: Any, blocks: Sequence[nn.Module]) -> str | None:
    """Why tokens depend on each other outside of attention, from what the model declares; None if nothing says so."""
    if getattr(model, "_is_stateful", False):
        return "it keeps a state from token to token"
    modules = (module for block in blocks for module in block.modules())
    if any(isinstance(module, nn.Conv1d) and max(module.kernel_size) > 1 for module in modules):
        return "its blocks hold a convolution over tokens"
    return None


class Isolation:
    """Four passes over one beginning with two continuations, and the comparison of their states.

    The second pass repeats the first. If it gives other bits, bits cannot be compared on this machine. The third pass
    has other tokens in the first continuation. Indices and lengths are those of the first pass, so all numbers are
    rounded alike: the states of the beginning and of the second continuation must be equal to the bit. (Models with
    experts may differ by a few roundings, because their experts get other tokens together.) In the fourth pass the
    continuations change places, and the states may differ by a few roundings.
    """

    def __init__(self, model: Any, blocks: Sequence[nn.Module], kernel: bool) -> None:
        self._first: dict[int, Tensor] = {}
        names = (type(module).__name__.lower() for block in blocks for module in block.modules())
        self._exact = not any("expert" in name or "moe" in name for name in names)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(min(10, vocabulary - 1), vocabulary, (BEGINNING + 3 * CONTINUATION,), generator=generator)
        beginning, one, other, last = ids.split([BEGINNING, *[CONTINUATION] * 3])
        self.passes = [
            _branching(model, torch.cat([beginning, one, last]), kernel, self._keep),
            _branching(model, torch.cat([beginning, one, last]), kernel, self._repeat),
            _branching(model, torch.cat([beginning, other, last]), kernel, self._compare_tokens),
            _branching(model, torch.cat([beginning, last, one]), kernel, self._compare_places),
        ]

    def _keep(self, layer: int, hidden: Tensor) -> None:
        self._first[layer] = torch.cat([hidden[0, :BEGINNING], hidden[0, -CONTINUATION:]])

    def _repeat(self, layer: int, hidden: Tensor) -> None:
        again = torch.cat([hidden[0, :BEGINNING], hidden[0, -CONTINUATION:]])
        self._exact = self._exact and torch.equal(again, self._first[layer])

    def _compare_tokens(self, layer: int, hidden: Tensor) -> None:
        rows = torch.cat([hidden[0, :BEGINNING], hidden[0, -CONTINUATION:]])
        self._compare(layer, rows, self._exact, CarriesState)

    def _compare_places(self, layer: int, hidden: Tensor) -> None:
        self._compare(layer, hidden[0, : BEGINNING + CONTINUATION], False, NotIsolated)
        del self._first[layer]

    def _compare(self, layer: int, rows: Tensor, exact: bool, failure: type[NotIsolated]) -> None:
        wanted = self._first[layer]
        if torch.equal(rows, wanted):
            return
        roundings = ISOLATED_ROUNDINGS[rows.dtype.itemsize]
        bound = roundings * torch.finfo(rows.dtype).eps * wanted.float().abs().amax(0)
        if exact or not bool(((rows.float() - wanted.float()).abs().amax(0) <= bound).all()):
            raise failure(f"from layer {layer} on a token depends on tokens of other prompts")


def _branching(model: Any, ids: Tensor, kernel: bool, receive: Callable[[int, Tensor], None]) -> Pass:
    """A packed pass over a beginning with two continuations."""
    middle, end = BEGINNING + CONTINUATION, BEGINNING + 2 * CONTINUATION
    root = Segment(0, BEGINNING, end, 0)
    first, second = Segment(BEGINNING, middle, middle, BEGINNING), Segment(middle, end, end, BEGINNING)
    positions = (*range(middle), *range(BEGINNING, middle))
    tree = Tree(tuple(ids.tolist()), positions, (root, first, second), ((root, first), (root, second)))
    device = input_device(model)
    layout = Layout(tree, device, kernel)
    inputs = {"input_ids": upload(ids[None], device), "position_ids": layout.positions[None]}

    def used(layer: int, hidden: Tensor) -> None:
        if layer > 0 and not layout.calls:
            raise NotIsolated("its attention is its own and cannot be replaced")
        receive(layer, hidden)

    return Pass(inputs, used, lambda: packed_attention(model, layout))


def disagreement(
    rows: Rows, wanted: Rows, noise: Callable[[], Rows] | None, head: Unembedding, layer: int
) -> str | None:
    """Describes how far the rows of a layer are from the rows of plain runs; None if only by rounding.

    The function compares log-probabilities over the whole vocabulary, not the rows themselves: in real models a few
    channels are hundreds of times larger than the others and hide differences in these.

    Parameters
    ----------
    noise : callable () -> Rows, optional
        Gives rows of the same prompts from plain batches of another size: their difference from ``wanted`` is
        rounding. It is called only if it can change the result. Without it, all differences up to the ceiling pass.
    """
    for name, tensor in wanted.tensors.items():
        theirs = tensor[layer]
        bound = BOUNDS[theirs.dtype]
        error = _difference(rows[name][layer], theirs, head, bound.quantile)
        if error <= bound.floor:
            continue
        allowed = bound.ceiling
        if noise is not None and error <= bound.ceiling:
            rounding = _difference(noise()[name][layer], theirs, head, bound.quantile)
            allowed = min(max(bound.floor, bound.noise * rounding), bound.ceiling)
        if not error <= allowed:
            return f"its log-probabilities at layer {layer} differ by {error:.1e} of their spread"
    return None


def _difference(ours: Tensor, theirs: Tensor, head: Unembedding, quantile: float) -> float:
    """Difference of the log-probabilities of two sets of rows [R, D], for the row at this quantile: root mean square
    over the vocabulary, as a share of the spread of the logits."""
    dtype = torch.float64 if theirs.dtype == torch.float64 else torch.float32
    both = torch.cat([ours, theirs]).to(head.weight.device, dtype)
    one, other = reference.logits(both, head, dtype).log_softmax(-1).chunk(2)
    usable = torch.isfinite(other)
    apart = torch.where(usable, one - other, 0.0).square().mean(-1).sqrt()
    spread = torch.where(usable, other, other.nan_to_num(neginf=0.0).mean()).std(-1)
    # NaN counts as an infinite difference
    return float((apart / spread.clamp(min=1e-30)).nan_to_num(nan=float("inf")).quantile(quantile))
