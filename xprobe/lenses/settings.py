"""Which lens reads: its kinds, and the text that names one. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from xprobe.errors import UsageError

LOGIT = "logit"
# kind -> what stands between a state and the model's own norm and head
LENSES: dict[str, str] = {
    LOGIT: "nothing: the model's own norm and head",
    "tuned": "affine maps trained to predict the last layer's distribution (Belrose et al. 2023)",
    "jacobian": "the mean derivative of the last layer's state by this one (Gurnee et al. 2026)",
    "regression": "least squares from this layer's state to the last one (Din et al. 2023)",
}
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
