"""Keeps the output of transformers off the terminal and collects its warnings about weights and tokens."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

MAX_CHARACTERS = 400  # of one message
REMOTE_CODE = "transformers_modules"  # package that transformers makes of a model's own code
OWN_CODE = "the model's own code"  # as the source of a warning

# Messages that concern no token and no weight. All other messages are collected: an unknown message may explain a wrong
# number.
HARMLESS = re.compile(
    r"""
      fast\ path\ is\ not\ available | falling\ back\ to\ (?:torch|the\ (?:naive|sequential|slow)) | deprecat
    | torch_dtype | generation\ flags | generation_config | GenerationConfig | loss_type
    | (?:LOAD|WEIGHTS)\ REPORT        # xprobe reads the same report itself (completeness.py)
    | Xet\ Storage | HF_TOKEN | unauthenticated\ requests | symlinks
    | `use_cache=True`\ is\ incompatible
    | kernels?`?\ (?:is\ not|package|library) | causal[-_]conv1d | flash[-_]linear[-_]attention
    """,
    re.VERBOSE | re.IGNORECASE,
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class _Collector(logging.Handler):
    def __init__(self, collected: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.collected = collected

    def emit(self, record: logging.LogRecord) -> None:
        _append(self.collected, record.getMessage(), _source_of_logger(record.name))


@contextlib.contextmanager
def quiet(collected: list[str] | None = None) -> Iterator[None]:
    """Suppresses the output of transformers inside the context. Exceptions pass, and the exit restores all settings.

    Parameters
    ----------
    collected : list of str, optional
        The context appends each warning that may concern tokens or weights once, as one line. It drops progress bars
        and harmless warnings (``HARMLESS``).

    Examples
    --------
    >>> collected = []
    >>> with quiet(collected):
    ...     logging.getLogger("transformers.models").warning("2 tokens were lost")
    ...     logging.getLogger("transformers.models").warning("`torch_dtype` is deprecated!")
    >>> collected
    ['transformers: 2 tokens were lost']
    """
    from transformers.utils import logging as transformers_logging

    kept: list[str] = [] if collected is None else collected
    bars = transformers_logging.is_progress_bar_enabled()
    forget = getattr(getattr(logging.Logger, "warning_once", None), "cache_clear", None)
    if forget is not None:
        forget()  # else a second model in one process gives no such warnings
    transformers_logging.disable_progress_bar()
    with contextlib.ExitStack() as undo:
        undo.callback(transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)
        for name in ("transformers", REMOTE_CODE, "huggingface_hub"):
            undo.enter_context(_only_handler(logging.getLogger(name), _Collector(kept)))
        undo.enter_context(contextlib.redirect_stderr(io.StringIO()))  # some readers draw their own progress bars
        caught = undo.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in caught or []:
                if not issubclass(warning.category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
                    _append(kept, str(warning.message), _source_of_file(warning.filename))


@contextlib.contextmanager
def _only_handler(logger: logging.Logger, collector: logging.Handler) -> Iterator[None]:
    """Replaces the handlers of ``logger`` by ``collector`` inside the context."""
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    logger.handlers[:] = [collector]
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def _source_of_logger(name: str) -> str:
    package = name.split(".")[0]
    return OWN_CODE if package == REMOTE_CODE else package


def _source_of_file(filename: str) -> str:
    """Who gives a warning: an installed package, the model's own code, or another file."""
    parts = Path(filename).parts
    if REMOTE_CODE in parts:
        return OWN_CODE
    for folder in ("site-packages", "dist-packages"):
        if folder in parts[:-1]:
            return parts[parts.index(folder) + 1].removesuffix(".py")
    return Path(filename).name


def _append(collected: list[str], message: str, source: str) -> None:
    """Appends a message with its source as one line, unless it is harmless or there already."""
    line = " ".join(_COLOURS.sub("", message).split())[:MAX_CHARACTERS]
    if line and not HARMLESS.search(line) and (entry := f"{source}: {line}") not in collected:
        collected.append(entry)
