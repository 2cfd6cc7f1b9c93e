"""One tree of errors. Every message says what is wrong, where, and what to do."""

from __future__ import annotations


class XprobeError(Exception):
    """Base of all errors that xprobe raises on purpose. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class UsageError(XprobeError, ValueError):
    """An argument is wrong: nothing was started."""

    exit_code = 2


class UnknownNameError(UsageError, KeyError):
    """A mapping of xprobe does not hold the name that was asked for. It is also a KeyError, as in any mapping."""

    __str__ = Exception.__str__  # KeyError would put the message in quotes


class DataError(XprobeError):
    """A dataset cannot be read, or holds nothing to work on."""


class ModelError(XprobeError):
    """A model cannot be loaded, or is not something the lens can read."""


class ModelCodeError(ModelError, RuntimeError):
    """A model's own code raised an exception. The message names the class of the model and the exception."""


class ParityError(ModelError):
    """The lens at the last layer does not give the model's own logits: every number would be wrong."""


class PromptError(XprobeError):
    """A template cannot be used, or a span cannot be found again in the tokens."""


class ProbeError(XprobeError):
    """A function of a probe failed: its labels, its estimator or its metric."""


class RunFolderError(XprobeError):
    """A run folder cannot be written, read or continued."""
