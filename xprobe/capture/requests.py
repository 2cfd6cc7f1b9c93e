"""Requests say which token ids to run and which rows to keep. The caller names the rows and knows what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from xprobe.capture.edits import Edit
from xprobe.errors import UsageError
from xprobe.models.token_limits import TokenLimits, is_whole, show


@dataclass(frozen=True)
class Each:
    """Keep the row at every one of these positions, in this order. A list or a range becomes a tuple.

    Examples
    --------
    >>> Each((6, 7)).rows
    2
    """

    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.positions, list | range):
            object.__setattr__(self, "positions", tuple(self.positions))

    @property
    def first(self) -> int:
        """The smallest position."""
        return min(self.positions)

    @property
    def rows(self) -> int:
        """Rows that one request adds."""
        return len(self.positions)


@dataclass(frozen=True)
class Mean:
    """Keep one row: the mean over the positions ``start`` to ``stop - 1``.

    Examples
    --------
    >>> Mean(2, 5).rows
    1
    """

    start: int
    stop: int

    @property
    def first(self) -> int:
        """The first position of the mean."""
        return self.start

    @property
    def rows(self) -> int:
        """Rows that one request adds."""
        return 1


Read = Each | Mean


@dataclass(frozen=True)
class Request:
    """Token ids to run the model over, and the rows to keep at every layer.

    Parameters
    ----------
    ids : tuple of int
        All tokens that the model is fed. A list or a range becomes a tuple.
    reads : mapping of str to Each or Mean
        The rows to keep, by a name of the caller's choice.
    group : str
        Requests of one group have a common beginning. They are stored together, and may share a cache.
    edits : tuple of Edit
        States to replace (``xprobe.capture.edits``). The rows that are kept are those after the edits.

    A request does not know the model. ``Engine`` checks requests before it runs any (``check_requests``).

    Examples
    --------
    >>> request = Request((5, 8, 13, 21), {"last": Each((3,)), "middle": Mean(1, 3)})
    >>> request.first_read
    1
    """

    ids: tuple[int, ...]
    reads: Mapping[str, Read]
    group: str = ""
    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.ids, list | range):
            object.__setattr__(self, "ids", tuple(self.ids))
        if isinstance(self.edits, list):
            object.__setattr__(self, "edits", tuple(self.edits))

    @cached_property
    def first_read(self) -> int:
        """The first position whose row is kept."""
        return min(read.first for read in self.reads.values())


@dataclass(frozen=True)
class Group:
    """Requests with a common beginning. A run stores and resumes whole groups.

    Examples
    --------
    >>> Group("page 1", (Request((5, 6), {"last": Each((1,))}, "page 1"),)).key
    'page 1'
    """

    key: str
    requests: tuple[Request, ...]


def group_requests(requests: Sequence[Request]) -> list[Group]:
    """Groups by ``Request.group``, in order of first appearance.

    Examples
    --------
    >>> one, other = (Request((1, 2), {"last": Each((1,))}, group) for group in ("a", "b"))
    >>> [(group.key, len(group.requests)) for group in group_requests([one, other, one])]
    [('a', 2), ('b', 1)]
    """
    groups: dict[str, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.group, []).append(request)
    return [Group(key, tuple(members)) for key, members in groups.items()]


def check_requests(requests: Sequence[Request], limits: TokenLimits, names: Sequence[str] | None = None) -> None:
    """Refuses requests that the model cannot be run over, or that cannot be captured together.

    Parameters
    ----------
    limits : TokenLimits
        Of the model.
    names : sequence of str, optional
        What the messages call the requests; ``request 0``, ``request 1``, ... by default.

    Raises
    ------
    UsageError
        ``requests`` is not a list of ``Request``. A request has no token ids, more than the model's window, or one that
        the model does not have. Or it reads nothing, reads a position outside its ids or the same position twice, or
        reads other names or kinds of rows than the first request. The message names the request, the read, the value
        and what is allowed.

    Examples
    --------
    >>> check_requests([Request((5, 6), {"last": Each((2,))})], TokenLimits(vocab_size=160))
    Traceback (most recent call last):
    ...
    xprobe.errors.UsageError: request 0: read 'last' has the position 2, but positions of its 2 tokens are 0 to 1
    """
    if not isinstance(requests, list | tuple):
        raise UsageError(f"requests must be a list of Request, got {show(requests)}")
    names = names or [f"request {index}" for index in range(len(requests))]
    for name, request in zip(names, requests, strict=True):
        if not isinstance(request, Request):
            raise UsageError(f"{name} must be a Request (xprobe.capture.requests.Request), got {show(request)}")
        limits.check(request.ids, name)
        if not isinstance(request.group, str):
            raise UsageError(f"{name}: group must be text, got {show(request.group)}")
        _check_reads(request, name)
        if _kinds(request) != _kinds(requests[0]):
            raise UsageError(
                f"{name} reads {_describe_reads(request)}, {names[0]} reads {_describe_reads(requests[0])}: "
                "capture them in two calls"
            )


def check_sample(requests: Sequence[Request], limits: TokenLimits) -> None:
    """Refuses a sample for ``choose_strategy`` that is empty, or whose requests ``check_requests`` refuses.

    Raises
    ------
    UsageError
        As ``check_requests``.

    Examples
    --------
    >>> check_sample([], TokenLimits(vocab_size=160))
    Traceback (most recent call last):
    ...
    xprobe.errors.UsageError: the sample is empty, give a few requests with a common beginning
    """
    if isinstance(requests, list | tuple) and not requests:
        raise UsageError("the sample is empty, give a few requests with a common beginning")
    check_requests(requests, limits)


def check_groups(groups: Sequence[Group], limits: TokenLimits) -> None:
    """Refuses groups with requests that ``check_requests`` refuses.

    Raises
    ------
    UsageError
        As ``check_requests``, or a request has edits. The message names the group and the request's index in it.

    Examples
    --------
    >>> groups = group_requests([Request((5, 999), {"last": Each((1,))}, "page 1")])
    >>> check_groups(groups, TokenLimits(vocab_size=160))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    xprobe.errors.UsageError: request 0 of group 'page 1': ids[1] is 999, but token ids of this model are ...
    """
    names = [f"request {index} of group {group.key!r}" for group in groups for index in range(len(group.requests))]
    requests = [request for group in groups for request in group.requests]
    check_requests(requests, limits, names)
    for name, request in zip(names, requests, strict=True):
        if request.edits:
            raise UsageError(f"{name} has edits: a plan stores states as they are; Engine.capture runs edits")


def _check_reads(request: Request, name: str) -> None:
    example = '{"last": Each((len(ids) - 1,))}'
    if not isinstance(request.reads, Mapping):
        raise UsageError(f"{name}: reads is {show(request.reads)}, but must be a mapping, for example {example}")
    if not request.reads:
        raise UsageError(f"{name}: reads is empty, name at least one row to keep, for example {example}")
    count = len(request.ids)
    for key, read in request.reads.items():
        if not isinstance(key, str):
            raise UsageError(f"{name}: reads has the name {show(key)}, but names are text")
        if isinstance(read, Each):
            _check_positions(read, count, f"{name}: read {key!r}")
        elif isinstance(read, Mean):
            whole = is_whole(read.start) and is_whole(read.stop)
            if not whole or not 0 <= read.start < read.stop <= count:
                raise UsageError(
                    f"{name}: read {key!r} is {show(read)}, but needs whole numbers 0 <= start < stop <= {count} (its "
                    "number of tokens)"
                )
        else:
            raise UsageError(f"{name}: read {key!r} is {show(read)}, but must be Each(positions) or Mean(start, stop)")


def _check_positions(read: Each, count: int, name: str) -> None:
    if not isinstance(read.positions, tuple):
        raise UsageError(f"{name} has the positions {show(read.positions)}, but must have a tuple of whole numbers")
    if not read.positions:
        raise UsageError(f"{name} has no positions, give at least one")
    seen: set[int] = set()
    for position in read.positions:
        if not is_whole(position):
            raise UsageError(f"{name} has the position {show(position)}, but positions are whole numbers")
        if not 0 <= position < count:
            raise UsageError(
                f"{name} has the position {position}, but positions of its {count} tokens are 0 to {count - 1}"
            )
        if position in seen:
            raise UsageError(f"{name} has the position {position} twice, give each position once")
        seen.add(position)


def _kinds(request: Request) -> dict[str, type]:
    return {name: type(read) for name, read in request.reads.items()}


def _describe_reads(request: Request) -> str:
    return ", ".join(f"{name} ({type(read).__name__})" for name, read in request.reads.items())
