"""Which lens reads: its kinds, and the text that names one. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from xprobe.arguments import check_least, text_names
from xprobe.errors import UsageError

LOGIT = "logit"
# kind -> what stands between a state and the model's own norm and head
LENSES: dict[str, str] = {
    LOGIT: "the model's own norm and head, no map before them",
    "tuned": "affine maps trained to predict the last layer's distribution (Belrose et al. 2023)",
    "jacobian": "the mean derivative of the last layer's state by this one (Gurnee et al. 2026)",
    "regression": "least squares from this layer's state to the last one (Din et al. 2023)",
}
FIRST = 16  # positions at the beginning of a text that are left out of a fit
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of a regression, as shares of the variance of each entry of the state
FITTED = ("regression", "jacobian")
TARGETS: dict[str, str] = {
    "last": "the output of the last block",
    "penultimate": "the output of the block before it",
}


@dataclass(frozen=True)
class LensName:
    """A lens as users name it: ``kind`` or ``kind:place``, ``place`` a file, a folder, or ``hub-id/file[@revision]``.

    Examples
    --------
    >>> LensName.parse("jacobian:lenses/smollm2.pt")
    LensName(kind='jacobian', place='lenses/smollm2.pt')
    >>> LensName.parse("logit").place
    ''
    >>> LensName.parse("jacobian")
    Traceback (most recent call last):
        ...
    xprobe.errors.UsageError: the lens 'jacobian' needs a file: jacobian:FILE (xprobe fit-lens makes one)
    """

    kind: str
    place: str = ""

    @classmethod
    def parse(cls, text: str) -> LensName:
        """Reads the text.

        Raises
        ------
        UsageError
            The kind is unknown, or a place is missing or too much.
        """
        if not isinstance(text, str):
            raise UsageError(f"a lens is named by text, such as 'logit' or 'jacobian:FILE', got {text!r}")
        kind, _, place = text.partition(":")
        if kind not in LENSES:
            raise UsageError(f"unknown lens {text!r}; known: {', '.join(LENSES)} (all but logit with :FILE)")
        if kind == LOGIT and place:
            raise UsageError(f"the lens {text!r}: logit has no file")
        if kind != LOGIT and not place:
            raise UsageError(f"the lens {text!r} needs a file: {kind}:FILE (xprobe fit-lens makes one)")
        return cls(kind, place)

    def __str__(self) -> str:
        return f"{self.kind}:{self.place}" if self.place else self.kind


@dataclass(frozen=True)
class FitSettings:
    """How a lens is fitted.

    Parameters
    ----------
    kind : str
        ``regression`` or ``jacobian``.
    target : str
        ``last``: the output of the last block. ``penultimate``: that of the block before it, where the last one adds
        what is frequent rather than what is meant.
    texts : int, optional
        Most texts; all by default.
    tokens : int
        Most tokens of each; the rest is left out.
    first : int
        Positions at the beginning of each text that are left out.
    ridge : float, optional
        Of the regression, as a share of the variance of each entry. By default the one of ``RIDGES`` with which the
        maps of both halves of the texts explain most of the other half, for each layer.

    Raises
    ------
    UsageError
        A value is out of its range.

    Examples
    --------
    >>> FitSettings("jacobian", texts=24).tokens
    128
    """

    kind: str = "regression"
    target: str = "last"
    texts: int | None = None
    tokens: int = 128
    first: int = FIRST
    ridge: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, FITTED), ("target", self.target, tuple(TARGETS))):
            if value not in known:
                raise UsageError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if self.texts is not None:
            check_least("texts", self.texts, 2)
        check_least("first", self.first, 0)
        check_least("tokens", self.tokens, self.first + 2)
        number = isinstance(self.ridge, int | float) and not isinstance(self.ridge, bool)
        if self.ridge is not None and (not number or not 0 <= self.ridge < float("inf")):
            raise UsageError(f"ridge must be a number of at least 0, got {self.ridge!r}")


@dataclass(frozen=True)
class LensesSettings:
    """Which lenses read a run again (``xprobe.read_lenses``).

    Parameters
    ----------
    lenses : str or iterable of str
        As ``LensName.parse`` takes them. The run's own lens is always read as well, and comes first.
    limit : int, optional
        Most questions, in the order in which ``limit`` of a study takes them; all by default.

    Raises
    ------
    UsageError
        A lens is unknown or lacks its file, or the limit is out of its range.

    Examples
    --------
    >>> LensesSettings("jacobian:lens.pt").with_own("logit")
    ('logit', 'jacobian:lens.pt')
    >>> LensesSettings("jacobian")
    Traceback (most recent call last):
        ...
    xprobe.errors.UsageError: the lens 'jacobian' needs a file: jacobian:FILE (xprobe fit-lens makes one)
    """

    lenses: tuple[str, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        names = text_names("lenses", self.lenses)
        for name in names:
            LensName.parse(name)
        object.__setattr__(self, "lenses", names)  # the class is frozen
        if self.limit is not None:
            check_least("limit", self.limit, 1)

    def with_own(self, own: str) -> tuple[str, ...]:
        """The lens of the run, then the others, each of them once."""
        return tuple(dict.fromkeys((own, *self.lenses)))
