"""Keeps transformers off the terminal while it reads a model, and keeps what it says about weights and tokens."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator

MOST = 400  # characters of one message

# Messages that change no token and no weight. Everything else is handed on: an unknown message may be the one that
# explains a wrong number.
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
        _keep(self.collected, record.getMessage())


@contextlib.contextmanager
def quiet(collected: list[str] | None = None) -> Iterator[None]:
    """Nothing is printed inside; errors still come through as exceptions, and everything is put back on exit.

    Parameters
    ----------
    collected : list of str, optional
        Gets every warning that may concern tokens or weights, once each, in one line. Progress bars, and warnings
        that are known to change no number (``HARMLESS``), are dropped.
    """
    from transformers.utils import logging as transformers_logging

    kept: list[str] = [] if collected is None else collected
    bars = transformers_logging.is_progress_bar_enabled()
    forget = getattr(getattr(logging.Logger, "warning_once", None), "cache_clear", None)
    if forget is not None:
        forget()  # "once" is once per process, and a process may read several models
    transformers_logging.disable_progress_bar()
    with contextlib.ExitStack() as undo:
        undo.callback(transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)
        for name in ("transformers", "transformers_modules", "huggingface_hub"):  # the second: a model's own code
            undo.enter_context(_listening(logging.getLogger(name), _Collector(kept)))
        undo.enter_context(contextlib.redirect_stderr(io.StringIO()))  # some readers draw bars of their own
        caught = undo.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in caught or []:
                if not issubclass(warning.category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
                    _keep(kept, str(warning.message))


@contextlib.contextmanager
def _listening(logger: logging.Logger, collector: logging.Handler) -> Iterator[None]:
    """``collector`` in place of the logger's own handlers."""
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


def _keep(collected: list[str], message: str) -> None:
    line = " ".join(_COLOURS.sub("", message).split())[:MOST]
    if line and not HARMLESS.search(line) and (said := f"transformers: {line}") not in collected:
        collected.append(said)
