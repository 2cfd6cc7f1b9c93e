"""Runs requests with edits on a packed tree: only what lies behind an edit is computed anew.

One pass over the tree runs every request as it is, and keeps the keys and values of each attention layer and the states
of the tokens that edits may change. Then, for each layer with edits, one pass runs the blocks *above* that layer, and
only over the tokens from the first edited position on. They attend to the kept keys and values of the tokens before
them. So an edit of the last token of a prompt costs one token in the blocks above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from xprobe_kernels.attention import continued_attention, serves
from xprobe_kernels.continuation import Continuation
from xprobe_kernels.reach import Blocks
from xprobe_kernels.transfer import upload

from xprobe.capture.edited import change_states, with_sources
from xprobe.capture.edits import Edit, RandomStates, StatesOf, random_directions
from xprobe.capture.passes import MULTIPLE
from xprobe.capture.requests import Mean, Request
from xprobe.capture.rows import Receiver, Rows
from xprobe.capture.tree import Segment, Tree, make_tree
from xprobe.capture.tree_attention import Layout, NotShareable, Rule, ends_below, packed_attention, within_segments
from xprobe.capture.tree_decoding import Part, PlacedPart, group_heads, merge_parts, parts_of
from xprobe.models.anatomy import Anatomy, input_device, watch_states
from xprobe.models.block_io import hidden_input, hidden_output, with_hidden_output

BLOCK = 128  # tokens of the tree that are read in one product with a mask; see ``tree_decoding``


def first_changed(request: Request) -> int:
    """The first position whose state may change, or whose row is a mean with such a position.

    Examples
    --------
    >>> from xprobe.capture.edits import RandomStates
    >>> first_changed(Request((5, 6, 7), {"all": Mean(0, 3)}, edits=(Edit(2, (2,), RandomStates(0)),)))
    0
    """
    first = min(position for edit in request.edits for position in edit.positions)
    while straddling := [
        read.start for read in request.reads.values() if isinstance(read, Mean) and read.start < first < read.stop
    ]:
        first = min(straddling)
    return first


def run_on_tree(
    model: Any,
    anatomy: Anatomy,
    requests: Sequence[Request],
    part: Sequence[int],
    into: Rows,
    most_tokens: int,
    *,
    kernel: bool = False,
    wanted: Callable[[Iterable[int]], Sequence[int]] = list,
) -> None:
    """Runs ``part`` of ``requests``, some of them with edits, and writes their rows into ``into``.

    Parameters
    ----------
    most_tokens : int
        Most tokens in a pass over what lies behind edits; a request may exceed it.
    kernel : bool
        Whether the attention kernels may be used.
    wanted : callable (requests with edits) -> requests
        Which requests with edits are to be run. It is called when the rows of the others are there.

    Raises
    ------
    NotShareable
        The model's attention needs something that packed attention does not have.
    """
    base = _Base(model, anatomy, requests, part, into, kernel)
    by_layer: dict[int, list[int]] = {}
    for i in wanted([i for i in part if requests[i].edits]):
        by_layer.setdefault(min(edit.layer for edit in requests[i].edits), []).append(i)
    for layer in sorted(by_layer):
        members = sorted(by_layer[layer], key=lambda i: base.end(i, first_changed(requests[i])))
        for some in _chunks(requests, members, most_tokens):
            _run_behind(model, anatomy, requests, some, layer, base, into)


class _Base:
    """The pass over the tree without edits.

    Attributes
    ----------
    tree : Tree
        Of the requests and of those whose states they take.
    path : dict of int to int
        Index of a request to that of its sequence in the tree.
    attention_calls : list of int
        By layer, how many attention layers ran before it.
    """

    def __init__(
        self, model: Any, anatomy: Anatomy, requests: Sequence[Request], part: Sequence[int], into: Rows, kernel: bool
    ) -> None:
        device = input_device(model)
        members = with_sources(requests, part)
        self.path = {i: row for row, i in enumerate(members)}
        self.kernel = kernel
        self._ends = {i: len(requests[i].ids) for i in members}
        self.tree = make_tree([requests[i].ids for i in members])
        padded = self.tree.padded(MULTIPLE)
        layout = Layout(padded, device, kernel, kept=[])
        self.attention_calls: list[int] = []
        self.returned: list[Any] = []  # what each block returns besides its hidden state
        self._parts: dict[tuple[tuple[int, int], ...], list[Part]] = {}
        self._below = ends_below(padded)
        self._continuations: dict[Any, Continuation] = {}
        self._directions: dict[tuple[tuple[int, int], ...], Tensor] = {}
        needed = sorted(self._needed(requests, part))
        self._index = {token: row for row, token in enumerate(needed)}
        wanted = upload(torch.tensor(needed, dtype=torch.int64), device)
        self._states: list[Tensor] = []
        receiver = Receiver(
            requests, part, lambda i, start, stop: [(0, *piece) for piece in padded.pieces(i, start, stop)], into
        )

        def receive(layer: int, hidden: Tensor) -> None:
            receiver(layer, hidden)
            self._states.append(hidden[0, wanted.to(hidden.device)])
            self.attention_calls.append(len(layout.kept or []))

        def record(module: nn.Module, args: tuple, output: Any) -> None:
            self.returned.append(with_hidden_output(output, hidden_output(output).new_empty(0)))

        inputs = {"input_ids": upload(torch.tensor([padded.ids]), device), "position_ids": layout.positions[None]}
        with ExitStack() as stack:
            stack.enter_context(watch_states(anatomy.blocks, receive))
            for block in anatomy.blocks:
                stack.callback(block.register_forward_hook(record).remove)
            stack.enter_context(packed_attention(model, layout))
            stack.enter_context(torch.inference_mode())
            model.base_model(**inputs, use_cache=False)
        self.kept: list[tuple[Tensor, Tensor]] = layout.kept or []

    def _needed(self, requests: Sequence[Request], part: Sequence[int]) -> set[int]:
        """Tokens of the tree whose states edits need: those that they may change, and those that they take."""
        spans: set[tuple[int, int, int]] = set()
        for i in part:
            if not requests[i].edits:
                continue
            spans.add((self.path[i], first_changed(requests[i]), len(requests[i].ids)))
            for edit in requests[i].edits:
                if isinstance(edit.states, StatesOf):
                    path = self.path[edit.states.request]
                    spans |= {(path, position, position + 1) for position in edit.states.positions}
        return {token for span in spans for start, stop in self.tree.pieces(*span) for token in range(start, stop)}

    def rows_behind(self, some: Sequence[int], starts: Sequence[int]) -> list[int]:
        """Where ``states`` holds the states of requests from a position on, one request after the other."""
        return [row for i, start in zip(some, starts, strict=True) for row in self.rows(i, range(start, self._ends[i]))]

    def rows(self, i: int, positions: Sequence[int]) -> list[int]:
        """Where ``states`` holds the states of a request."""
        return [self._index[self.tree.index(self.path[i], position)] for position in positions]

    def end(self, i: int, start: int) -> int:
        """The token of the tree before position ``start`` of a request; -1 if there is none."""
        return self.tree.index(self.path[i], start - 1) if start else -1

    def continuation(
        self, ends: tuple[tuple[int, int], ...], lengths: Sequence[int], blocks: Blocks, device: torch.device
    ) -> Continuation:
        """What tokens behind edits attend to: ``lengths[k]`` of them from each (sequence, position) on."""
        key = ends, blocks, device
        if key not in self._continuations:
            last = [self.tree.index(path, start - 1) if start else -1 for path, start in ends]
            self._continuations[key] = Continuation.from_tree(
                *self._below, last, lengths, range(sum(lengths)), blocks, device
            )
        return self._continuations[key]

    def directions(self, seeds: tuple[tuple[int, int], ...], like: Tensor) -> Tensor:
        """Random directions [n, D] in fp64 for (seed, how many), one after the other, on the device of ``like``."""
        if seeds not in self._directions:
            drawn = [random_directions(count, like.shape[-1], seed) for seed, count in seeds]
            self._directions[seeds] = upload(torch.cat(drawn), like.device)
        return self._directions[seeds].to(like.device)

    def states(self, layer: int, rows: Sequence[int]) -> Tensor:
        """States of a layer without edits [n, D]."""
        held = self._states[layer]
        return held[upload(torch.tensor(rows, dtype=torch.int64), held.device)]

    def parts(self, ends: tuple[tuple[int, int], ...]) -> list[Part]:
        """The tokens before the given position of each (sequence, position) of the tree, in parts."""
        if ends not in self._parts:
            paths = tuple(_cut(self.tree.paths[path], end) for path, end in ends)
            self._parts[ends] = parts_of(Tree(self.tree.ids, self.tree.positions, self.tree.segments, paths), BLOCK)
        return self._parts[ends]


def _cut(path: Sequence[Segment], end: int) -> tuple[Segment, ...]:
    """The segments of a path up to the position ``end``."""
    return tuple(Segment(s.start, min(s.stop, s.start + end - s.depth), s.end, s.depth) for s in path if s.depth < end)


def _chunks(requests: Sequence[Request], members: Sequence[int], most_tokens: int) -> list[list[int]]:
    """``members`` in chunks of at most ``most_tokens`` tokens behind their edits."""
    chunks: list[list[int]] = []
    filled = 0
    for i in members:
        own = len(requests[i].ids) - first_changed(requests[i])
        if chunks and filled + own <= most_tokens:
            chunks[-1].append(i)
            filled += own
        else:
            chunks.append([i])
            filled = own
    return chunks


def _run_behind(
    model: Any, anatomy: Anatomy, requests: Sequence[Request], some: list[int], layer: int, base: _Base, into: Rows
) -> None:
    """Runs what lies behind the edits of ``some`` requests, whose first edits are at ``layer``."""
    device = input_device(model)
    if layer == 0:
        some = _changed_inputs(requests, some, base)
        if not some:
            return
    starts = [first_changed(requests[i]) for i in some]
    lengths = [len(requests[i].ids) - start for i, start in zip(some, starts, strict=True)]
    offsets = [0, *accumulate(lengths[:-1])]
    positions = [p for i, start in zip(some, starts, strict=True) for p in range(start, len(requests[i].ids))]
    edits: dict[int, list[tuple[list[int], int, Edit]]] = {}
    for row, i in enumerate(some):
        for edit in requests[i].edits:
            rows = [offsets[row] + position - starts[row] for position in edit.positions]
            edits.setdefault(edit.layer, []).append((rows, i, edit))

    def changed(at: int, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] of layer ``at`` with the edits of this layer."""
        if at not in edits:
            return hidden
        own = hidden.clone()
        taken = [(rows, edit.states) for rows, _, edit in edits[at] if isinstance(edit.states, StatesOf)]
        if taken:  # all in one product of indices
            held = [row for _, source in taken for row in base.rows(source.request, source.positions)]
            own[_indices([rows for rows, _ in taken], own.device)] = base.states(at, held).to(own)
        drawn = [(rows, edit.states) for rows, _, edit in edits[at] if isinstance(edit.states, RandomStates)]
        if drawn:
            where = _indices([rows for rows, _ in drawn], own.device)
            directions = base.directions(tuple((states.seed, len(rows)) for rows, states in drawn), own)
            own[where] = (directions * hidden[where].double().norm(dim=-1, keepdim=True)).to(own)
        for rows, _, edit in edits[at]:
            if isinstance(edit.states, Tensor):
                states = edit.states if edit.states.device.type != "cpu" else upload(edit.states, own.device)
                own[_indices([rows], own.device)] = states.to(own)
        return own

    def locate(row: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        if start < starts[row]:
            return []  # the pass over the tree has written it
        return [(0, offsets[row] + start - starts[row], offsets[row] + stop - starts[row])]

    receiver = Receiver(requests, some, locate, into)
    held = [
        row for i, start in zip(some, starts, strict=True) for row in base.rows(i, range(start, len(requests[i].ids)))
    ]
    first = changed(layer, base.states(layer, held))
    receiver(layer, first[None])
    if layer == anatomy.n_layers - 1:
        return
    attention = _Behind(
        base, tuple((base.path[i], start) for i, start in zip(some, starts, strict=True)), lengths, positions
    )
    attention.start(base.attention_calls[layer])

    def change(at: int, hidden: Tensor) -> Tensor:
        if at <= layer:
            return first[None].to(hidden.device) if at == layer else hidden
        return changed(at, hidden[0])[None] if at in edits else hidden

    def receive(at: int, hidden: Tensor) -> None:
        if at > layer:
            receiver(at, hidden)

    ids = [token for i, start in zip(some, starts, strict=True) for token in requests[i].ids[start:]]
    inputs = {
        "input_ids": upload(torch.tensor([ids]), device),
        "position_ids": upload(torch.tensor([positions]), device),
    }
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for number, block in enumerate(anatomy.blocks[:layer]):
            stack.enter_context(_skipped(block, base.returned[number]))
        stack.enter_context(change_states(anatomy.blocks, change))
        stack.enter_context(watch_states(anatomy.blocks, receive))
        stack.enter_context(packed_attention(model, attention))
        model.base_model(**inputs, use_cache=False)


def _changed_inputs(requests: Sequence[Request], some: list[int], base: _Base) -> list[int]:
    """``some`` without requests whose edits put the states of equal tokens in the place of their own at layer 0.

    Nothing changes for these, and the pass over the tree has written their rows. Positions count: learned embeddings of
    positions are part of the states.
    """
    pairs: list[tuple[int, int, int]] = []  # request, row of its own state, row of the state that it takes
    kept = []
    for i in some:
        edits, ids = requests[i].edits, requests[i].ids
        equal = all(
            edit.layer == 0
            and isinstance(edit.states, StatesOf)
            and [ids[at] for at in edit.positions]
            == [requests[edit.states.request].ids[at] for at in edit.states.positions]
            for edit in edits
        )
        if not equal:
            kept.append(i)
            continue
        for edit in edits:
            assert isinstance(edit.states, StatesOf)
            taken = base.rows(edit.states.request, edit.states.positions)
            pairs += [(i, *both) for both in zip(base.rows(i, edit.positions), taken, strict=True)]
    if not pairs:
        return kept
    own, others = (base.states(0, [pair[column] for pair in pairs]) for column in (1, 2))
    changed = (own != others).any(-1).tolist()  # the only wait of a pass: equal tokens are rare at other layers
    kept += {i for (i, _, _), differs in zip(pairs, changed, strict=True) if differs}
    return [i for i in some if i in set(kept)]


def _indices(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Indices, one list after the other, on a device. A list as an index would make the host wait for it."""
    return upload(torch.tensor([row for some in rows for row in some], dtype=torch.int64), device)


@contextmanager
def _skipped(block: nn.Module, returned: Any) -> Iterator[None]:
    """A block that hands its input on. ``returned``: what it returned in another pass."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return with_hidden_output(returned, hidden_input(args, kwargs))

    own = vars(block).get("forward")
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        del vars(block)["forward"]
        if own is not None:
            vars(block)["forward"] = own


class _Behind:
    """Attention of the tokens behind edits, on the tokens before them in the tree and on each other.

    A ``PackedAttention``.
    """

    def __init__(
        self, base: _Base, ends: tuple[tuple[int, int], ...], lengths: Sequence[int], positions: Sequence[int]
    ) -> None:
        self._base, self._furthest, self._lengths = base, max(positions), tuple(lengths)
        self._host_positions = torch.tensor(positions)
        starts = [0, *accumulate(lengths[:-1])]
        self._segments = tuple(
            Segment(start, start + length, start + length, 0) for start, length in zip(starts, lengths, strict=True)
        )
        self._rows = [list(range(s.start, s.stop)) for s in self._segments]
        self._tree = Tree((0,) * len(positions), tuple(positions), self._segments, ())
        self._ends = ends
        self._placed: dict[torch.device, tuple[Layout, Tensor, list[PlacedPart]]] = {}
        self._call = 0

    def start(self, call: int) -> None:
        """The next attention layer is number ``call`` of the model."""
        self._call = call

    def _on(self, device: torch.device) -> tuple[Layout, Tensor, list[PlacedPart]]:
        if device not in self._placed:
            parts = []
            for part in self._base.parts(self._ends):
                rows = torch.tensor([row for member in part.members for row in self._rows[member]])
                counts = torch.tensor([len(self._rows[member]) for member in part.members])
                mask = None if part.mask is None else upload(part.mask.repeat_interleave(counts, 0), device)
                parts.append(PlacedPart(part, upload(rows, device), upload(part.positions, device), mask))
            layout = Layout(self._tree, device, kernel=False)
            self._placed[device] = layout, upload(self._host_positions, device), parts
        return self._placed[device]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule, sinks: Tensor | None) -> Tensor:
        """Attention of the tokens [1, H, n, d] -> [1, n, H, d]; see ``PackedAttention``."""
        if self._call >= len(self._base.kept):
            raise NotShareable("more attention layers than in the pass before")
        kept = self._base.kept[self._call]
        self._call += 1
        if kept[0].shape[1] != key.shape[1] or query.shape[2] != len(self._host_positions):
            raise NotShareable("other keys or tokens than in the pass before")
        if self._base.kernel and serves(query[0], key[0], value[0]):
            blocks = Blocks.choose(query.dtype.itemsize, max(query.shape[-1], value.shape[-1]))
            found = continued_attention(
                query[0], (kept[0][0], kept[1][0]), (key[0], value[0]),
                self._base.continuation(self._ends, self._lengths, blocks, query.device),
                scale=rule.scale, window=rule.window, softcap=rule.softcap, sinks=sinks,
            )  # fmt: skip
            return found[None]
        layout, positions, parts = self._on(query.device)
        groups = key.shape[1]
        out, norms = within_segments(layout.batches, query, key, value, rule)  # [H, n, d], [H, n]
        out = out.transpose(0, 1).unflatten(1, (groups, -1)).contiguous()
        norms = norms.transpose(0, 1).unflatten(1, (groups, -1)).contiguous()
        merge_parts(out, norms, group_heads(query, groups), kept, parts, positions, self._furthest, rule)
        if sinks is not None:
            out = out * torch.sigmoid(norms - sinks.to(out.dtype).view(groups, -1))[..., None]
        return out.flatten(1, 2)[None].to(query.dtype)
