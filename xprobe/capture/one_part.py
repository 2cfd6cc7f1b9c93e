"""Runs the requests that share a pass, in the way of a strategy."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence, Set
from typing import Any

import torch

from xprobe.capture.edited import run_plain
from xprobe.capture.edited_tree import run_on_tree
from xprobe.capture.passes import make_pass, run_pass
from xprobe.capture.plan import Strategy
from xprobe.capture.prefix import run_on_prefix
from xprobe.capture.products import fast_products
from xprobe.capture.requests import Request
from xprobe.capture.rows import Rows
from xprobe.models.anatomy import Anatomy, input_device
from xprobe.models.block_io import model_code_errors
from xprobe.models.passes import pad

# Which requests with edits are worth running: called between passes with the rows so far, and with the requests without
# edits that have run
Select = Callable[[Rows, Set[int]], Container[int]]


class Choice:
    """Asks ``select`` for the requests with edits that are to be run.

    Attributes
    ----------
    edited, unedited : list of int
        Requests with and without edits.
    """

    def __init__(self, requests: Sequence[Request], rows: Rows, select: Select | None) -> None:
        self.edited = [i for i, request in enumerate(requests) if request.edits]
        self.unedited = [i for i, request in enumerate(requests) if not request.edits]
        self._rows, self._select, self._ran = rows, select, set[int]()

    def after(self, part: Iterable[int]) -> Callable[[Iterable[int]], list[int]]:
        """Says which of some requests are to be run. It is called when the rows of ``part`` without edits are there."""

        def wanted(some: Iterable[int]) -> list[int]:
            if self._select is None:
                return list(some)
            self._ran |= set(part).difference(self.edited)
            chosen = self._select(self._rows, self._ran)
            return [i for i in some if i in chosen]

        return wanted


def run_part(
    model: Any,
    anatomy: Anatomy,
    requests: Sequence[Request],
    part: Sequence[int],
    into: Rows,
    strategy: Strategy,
    *,
    kernel: bool,
    most_tokens: int,
    max_shared_tokens: int | None = None,
    wanted: Callable[[Iterable[int]], Sequence[int]] = list,
) -> None:
    """Runs ``part`` of ``requests`` and writes their rows into ``into``.

    Parameters
    ----------
    kernel : bool
        Whether packed trees may use the attention kernels.
    most_tokens : int
        Most tokens in a pass over what lies behind edits.
    max_shared_tokens : int, optional
        Requests longer than this run alone, because the model's angles depend on the length.
    wanted : callable (requests with edits) -> requests
        Which of them are to be run, as in ``run_on_tree``. Of plain batches all are run. It is also called for a part
        without edits, when its rows are there.
    """
    with torch.inference_mode(), fast_products(model), model_code_errors(model):
        if max_shared_tokens is not None and len(requests[part[0]].ids) > max_shared_tokens:
            # dynamic NTK keeps the angles of the longest prompt until a short prompt is run
            model.base_model(input_ids=pad([requests[part[0]].ids[:1]], input_device(model)), use_cache=False)
        if any(requests[i].edits for i in part):
            if strategy == "tree":
                run_on_tree(model, anatomy, requests, part, into, most_tokens, kernel=kernel, wanted=wanted)
            else:
                run_plain(model, anatomy, requests, part, into)
            return
        if strategy == "prefix":
            run_on_prefix(model, anatomy, requests, part, into)
        else:
            run_pass(model, anatomy, make_pass(model, requests, part, into, strategy, kernel))
        wanted(())
