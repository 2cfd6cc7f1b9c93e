"""What to run and which rows to keep, as plain data. Capture knows token ids; the caller gives rows their meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Each:
    """Keep the row at every one of these positions, in this order.

    Examples
    --------
    >>> Each((6, 7)).rows
    2
    """

    positions: tuple[int, ...]

    @property
    def first(self) -> int:
        return min(self.positions, default=0)

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
        All tokens that the model is fed.
    reads : mapping of str to Each or Mean
        The rows to keep, by a name of the caller's choice.
    group : str
        Requests of one group begin alike: they are stored together, and may share a cache.

    Examples
    --------
    >>> request = Request((5, 8, 13, 21), {"last": Each((3,)), "middle": Mean(1, 3)})
    >>> request.first_read
    1
    """

    ids: tuple[int, ...]
    reads: Mapping[str, Read]
    group: str = ""

    @cached_property
    def first_read(self) -> int:
        """The first position whose row is needed."""
        return min(read.first for read in self.reads.values())


@dataclass(frozen=True)
class Group:
    """Requests that begin alike: the unit that is stored and resumed."""

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


def check_requests(requests: Sequence[Request]) -> None:
    """Refuses requests that cannot be captured together.

    Raises
    ------
    ValueError
        A request has no token, reads nothing, reads a position outside its tokens, or reads other names or kinds of
        rows than the first one.
    """
    kinds = {name: type(read) for name, read in requests[0].reads.items()} if requests else {}
    for number, request in enumerate(requests):
        if not request.ids or not request.reads:
            raise ValueError(f"request {number} has {'no reads' if request.ids else 'no tokens'}")
        if {name: type(read) for name, read in request.reads.items()} != kinds:
            raise ValueError(
                f"request {number} reads {_described(request)}, the first request reads {_described(requests[0])}: "
                "capture them in two calls"
            )
        for name, read in request.reads.items():
            empty = read.stop <= read.start if isinstance(read, Mean) else not read.positions
            last = read.stop - 1 if isinstance(read, Mean) else max(read.positions, default=0)
            if empty or read.first < 0 or last >= len(request.ids):
                raise ValueError(f"request {number} reads {name} at {read}, but has {len(request.ids)} tokens")


def _described(request: Request) -> str:
    return ", ".join(f"{name} ({type(read).__name__})" for name, read in request.reads.items())
