"""The hidden rows that are kept, and how they get from a forward pass into preallocated buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from xprobe_kernels import capture
from xprobe_kernels.capture import check_spans
from xprobe_kernels.transfer import upload

from xprobe.capture.requests import Each, Mean, Request
from xprobe.errors import UnknownNameError

# (index of the request in the pass, first position, last position + 1) -> spans (batch, start, stop) of hidden states
Locate = Callable[[int, int, int], list[tuple[int, int, int]]]


@dataclass(frozen=True, eq=False)
class Rows:
    """Hidden rows of N requests, before the final norm, in the model's dtype and on the head's device.

    ``rows[name]`` [L + 1, R, D] holds the rows of the reads called ``name``, one request after the other. The rows of
    request i are ``offsets[name][i]`` to ``offsets[name][i + 1] - 1``.

    Attributes
    ----------
    tensors : dict of str to Tensor [L + 1, R, D]
    offsets : dict of str to int64 Tensor [N + 1]
    first_layer : int
        The layer of the first rows; those of lower layers are not kept. The tensors then hold fewer than L + 1 layers.
    """

    tensors: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]
    first_layer: int = 0

    def __getitem__(self, name: str) -> Tensor:
        """Rows [L + 1, R, D] of the reads called ``name``.

        Raises
        ------
        UnknownNameError
            No read has this name. It is a ``UsageError`` and a ``KeyError``.
        """
        if name not in self.tensors:
            raise UnknownNameError(f"no read is called {name!r}; the requests read {', '.join(self.tensors)}")
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        """The names of the reads."""
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def first(self, name: str) -> Tensor:
        """The first row of every request [L + 1, N, D]."""
        tensor = self[name]
        return tensor[:, upload(self.offsets[name][:-1], tensor.device)]

    def copy(self) -> Rows:
        """A copy in separate memory, which the next pass does not overwrite."""
        return Rows({name: tensor.clone() for name, tensor in self.tensors.items()}, self.offsets, self.first_layer)

    def part(self, start: int, stop: int) -> Rows:
        """The rows of requests ``start`` to ``stop - 1``, in the same memory."""
        tensors, offsets = {}, {}
        for name, tensor in self.tensors.items():
            own = self.offsets[name][start : stop + 1]
            first, last = int(own[0]), int(own[-1])
            tensors[name], offsets[name] = tensor[:, first:last], own - first
        return Rows(tensors, offsets, self.first_layer)


class RowBuffers:
    """Memory for captured rows. It is allocated once, used for each wave, and grows only for a larger wave.

    ``layers`` layers are kept, from ``first_layer`` on.
    """

    def __init__(self, layers: int, width: int, dtype: torch.dtype, device: torch.device, first_layer: int = 0) -> None:
        self.layers, self.width, self.dtype, self.device = layers, width, dtype, device
        self.first_layer = first_layer
        self._memory: dict[str, Tensor] = {}

    def reserve(self, counts: Mapping[str, int]) -> None:
        """Allocates memory for so many rows of each name."""
        for name, count in counts.items():
            numbers = self.layers * self.width * count
            if name not in self._memory or self._memory[name].numel() < numbers:
                self._memory[name] = self._new_memory(numbers)

    def _new_memory(self, numbers: int) -> Tensor:
        return torch.empty(numbers, dtype=self.dtype, device=self.device)

    def rows_for(self, requests: Sequence[Request]) -> Rows:
        """Room for the rows of ``requests``, which passed ``check_requests``. The next call takes the same memory."""
        names = list(requests[0].reads) if requests else []
        offsets = {name: [0, *accumulate(request.reads[name].rows for request in requests)] for name in names}
        self.reserve({name: ends[-1] for name, ends in offsets.items()})
        tensors = {
            name: self._memory[name][: self.layers * self.width * ends[-1]].view(self.layers, -1, self.width)
            for name, ends in offsets.items()
        }
        return Rows(tensors, {name: torch.tensor(ends) for name, ends in offsets.items()}, self.first_layer)


class Receiver:
    """Copies the rows of one pass into buffers. It is called with the states of each layer, and waits for no device.

    Parameters
    ----------
    requests : sequence of Request
    part : sequence of int
        The requests that the pass runs over, by index.
    locate : callable
        Gives the spans of a request's positions in the hidden states of the pass; none for positions that the pass does
        not hold. Their rows stay as they are.
    into : Rows
        Buffers for all ``requests``.
    """

    def __init__(self, requests: Sequence[Request], part: Sequence[int], locate: Locate, into: Rows) -> None:
        self._copies: list[_CopyEach | _CopyMean] = []
        for name in requests[part[0]].reads:
            first_rows = into.offsets[name].tolist()
            reads = [(place, first_rows[i], requests[i].reads[name]) for place, i in enumerate(part)]
            each = [(place, first, read) for place, first, read in reads if isinstance(read, Each)]
            mean = [(place, first, read) for place, first, read in reads if isinstance(read, Mean)]
            tensor = into.tensors[name]
            self._copies.append(_CopyEach(each, locate, tensor) if each else _CopyMean(mean, locate, tensor))
        self._copies = [copy for copy in self._copies if len(copy.spans.host)]
        self._checked, self._first_layer = False, into.first_layer

    def __call__(self, layer: int, hidden: Tensor) -> None:
        if layer < self._first_layer:
            return
        if not self._checked:
            for copy in self._copies:
                check_spans(copy.spans.host, *hidden.shape[:2])
            self._checked = True
        for copy in self._copies:
            copy(layer - self._first_layer, hidden)


class _Spans:
    """Spans [S, 3] of (batch, start, stop), on each device that blocks run on."""

    def __init__(self, spans: list[tuple[int, int, int]]) -> None:
        self.host = torch.tensor(spans, dtype=torch.int64).reshape(-1, 3)
        self._copies: dict[torch.device, Tensor] = {}

    def to(self, device: torch.device) -> Tensor:
        if device not in self._copies:
            self._copies[device] = upload(self.host, device)
        return self._copies[device]


class _CopyEach:
    """Copies single rows bit for bit."""

    def __init__(self, reads: list[tuple[int, int, Each]], locate: Locate, into: Tensor) -> None:
        spans: list[tuple[int, int, int]] = []
        targets: list[int] = []
        for place, first, read in reads:
            for step, position in enumerate(read.positions):
                own_spans = locate(place, position, position + 1)
                spans += own_spans
                targets += [first + step] * len(own_spans)
        self.spans, self._into = _Spans(spans), into
        self._targets = upload(torch.tensor(targets), into.device)

    def __call__(self, layer: int, hidden: Tensor) -> None:
        spans = self.spans.to(hidden.device)
        buffer = torch.empty(spans.shape[0], hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        capture(hidden, spans, buffer, check=False)
        self._into[layer, self._targets] = buffer.to(self._into)


class _CopyMean:
    """Averages spans in fp32 (fp64 for fp64 rows), always in the same order.

    If the tokens of a span lie in several pieces of the pass, the means of the pieces are combined.
    """

    def __init__(self, reads: list[tuple[int, int, Mean]], locate: Locate, into: Tensor) -> None:
        pieces: list[tuple[int, int, int]] = []
        owned: list[list[int]] = []  # for each span, the indices of its pieces
        targets: list[int] = []
        for place, target, read in reads:
            own_pieces = locate(place, read.start, read.stop)
            if not own_pieces:
                continue
            owned.append(list(range(len(pieces), len(pieces) + len(own_pieces))))
            targets.append(target)
            pieces += own_pieces
        self.spans, self._into = _Spans(pieces), into
        most = max(map(len, owned), default=0)
        table = torch.tensor([own + [own[0]] * (most - len(own)) for own in owned])
        counted = torch.tensor([[1.0] * len(own) + [0.0] * (most - len(own)) for own in owned], dtype=torch.float64)
        lengths = (self.spans.host[:, 2] - self.spans.host[:, 1])[table] * counted
        self._targets, self._table = (upload(values, into.device) for values in (torch.tensor(targets), table))
        self._shares = upload(lengths / lengths.sum(1, keepdim=True), into.device)[..., None]

    def __call__(self, layer: int, hidden: Tensor) -> None:
        spans = self.spans.to(hidden.device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        means = torch.empty(spans.shape[0], hidden.shape[-1], dtype=wide, device=hidden.device)
        capture(hidden, spans, means, check=False)
        rows = (means.to(self._into.device)[self._table] * self._shares.to(wide)).sum(1)
        self._into[layer, self._targets] = rows.to(self._into.dtype)
