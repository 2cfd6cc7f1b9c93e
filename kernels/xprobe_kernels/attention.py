"""Attention over a packed tree of token sequences on a GPU (``reach.py`` describes the tree).

One kernel computes it. No mask is stored, and tokens that several sequences share are computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xprobe_kernels.continuation import Continuation
from xprobe_kernels.reach import Blocks, Reach
from xprobe_kernels.transfer import on
from xprobe_kernels.triton_support import kernel_dtypes, kernels_run_on
from xprobe_kernels.unembedding import describe

__all__ = ["MAX_WIDTH", "Blocks", "Reach", "available", "serves", "tree_attention"]

MAX_WIDTH = 256  # largest width of an attention head's queries, keys and values


def available(device: torch.device) -> bool:
    """Whether the attention kernel runs on ``device``, which must be a GPU."""
    return device.type == "cuda" and kernels_run_on(device)


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``tree_attention`` takes these tensors [heads, tokens, width]."""
    return (
        kernels_run_on(query.device)
        and query.dtype in kernel_dtypes()
        and query.dtype == key.dtype == value.dtype
        and max(query.shape[-1], value.shape[-1]) <= MAX_WIDTH
    )


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Reach,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each token of a packed tree to itself and to the tokens that it continues.

    Parameters
    ----------
    query : Tensor [H, N, d]
        fp32, fp16 or bf16. The same dtype and device as ``key`` and ``value``.
    key : Tensor [G, N, d]
        G divides H: ``H / G`` neighbouring query heads share keys and values.
    value : Tensor [G, N, e]
        Must be finite. A value of infinity or NaN gives NaN even for queries that do not attend to it.
    reach : Reach
        Which tokens attend to which: N tokens, on the device of ``query``.
    scale : float
        Multiplies the dot products.
    window : int, optional
        A token attends only to the last ``window`` positions of its sequence, its own included. This saves no time:
        the kernel also visits blocks outside of the window.
    softcap : float, optional
        Scores become ``c * tanh(scale * q.k / c)`` with this c.
    sinks : Tensor [H], optional
        One logit per head. It adds to the softmax denominator and has no value of its own (attention sinks).

    Returns
    -------
    Tensor [N, H, e]
        In the dtype of ``query``.

    Raises
    ------
    ValueError
        Names the argument, its value and what was expected.

    Notes
    -----
    Scores and sums are fp32. Softmax weights are cast to the dtype of ``value`` before the second product, as in the
    usual attention libraries. The method is the running softmax of FlashAttention (Dao et al., 2022).

    Examples
    --------
    Needs Triton and a GPU, or ``TRITON_INTERPRET=1``. The two sequences 5 6 7 and 5 6 8 share two tokens:

    >>> import numpy as np, torch
    >>> from xprobe_kernels.attention import Blocks, Reach, serves, tree_attention
    >>> query = key = value = torch.eye(4)[None]  # one head, tokens 5 6 7 8
    >>> blocks = Blocks(16, 16, warps=4, stages=1)
    >>> reach = Reach.from_tree(np.array([4, 4, 3, 4]), np.array([0, 1, 2, 2]), blocks, torch.device("cpu"))
    >>> if serves(query, key, value):
    ...     out = tree_attention(query, key, value, reach, scale=1.0)
    ...     assert out[3, 0, 2] == 0  # token 8 does not attend to token 7
    """
    heads, tokens, _ = query.shape
    if key.shape[1:] != query.shape[1:] or value.shape[:2] != key.shape[:2] or heads % key.shape[0]:
        raise ValueError(f"query, key, value do not fit: {describe(query)}, {describe(key)}, {describe(value)}")
    if not serves(query, key, value):
        raise ValueError(
            f"tree_attention needs Triton, a GPU, one dtype of {', '.join(map(str, kernel_dtypes()))} "
            f"and heads at most {MAX_WIDTH} wide; got query {describe(query)}, value {describe(value)}"
        )
    if len(reach.until) != tokens or reach.until.device != query.device:
        raise ValueError(
            f"reach describes {len(reach.until)} tokens on {reach.until.device}, query is {describe(query)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window!r}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must have shape [{heads}], got {describe(sinks)}")
    from xprobe_kernels.triton_attention import attend

    with on(query.device):
        return attend(query, key, value, reach, scale, window, softcap, sinks)


def continued_attention(
    query: Tensor,
    kept: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    continuation: Continuation,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of tokens that continue a packed tree, on the tree and on their tails.

    Parameters
    ----------
    query : Tensor [H, n, d]
        fp32, fp16 or bf16, with the dtype and device of the keys and values.
    kept : keys [G, N, d] and values [G, N, e] of the tree's tokens
    own : keys [G, M, d] and values [G, M, e] of the tails' tokens
        Must be finite, also where no query attends to them yet.
    continuation : Continuation
        Which tokens attend to which, on the device of ``query``.
    scale, window, softcap, sinks
        As for ``tree_attention``.

    Returns
    -------
    Tensor [n, H, e]
        In the dtype of ``query``.

    Raises
    ------
    ValueError
        Names the argument, its value and what was expected.

    Examples
    --------
    Needs Triton and a GPU, or ``TRITON_INTERPRET=1``. Two tails of one token behind a tree of one token:

    >>> import numpy as np, torch
    >>> from xprobe_kernels.attention import Blocks, continued_attention, serves
    >>> from xprobe_kernels.continuation import Continuation
    >>> places = Continuation.from_tree(
    ...     np.array([1]), np.array([0]), [0, 0], [1, 1], [0, 1], Blocks(16, 16, 4, 1), torch.device("cpu")
    ... )
    >>> tree, tails = torch.eye(3)[None, :1], torch.eye(3)[None, 1:]
    >>> if serves(tails, tails, tails):
    ...     out = continued_attention(tails, (tree, tree), (tails, tails), places, scale=1.0)
    ...     assert out[0, 0, 2] == 0  # no tail attends to the other
    """
    heads, queries, width = query.shape
    groups, tokens, value_width = own[1].shape
    shapes = [(groups, kept[0].shape[1], width), (groups, kept[0].shape[1], value_width), (groups, tokens, width)]
    if [tuple(t.shape) for t in (*kept, own[0])] != shapes or heads % groups:
        raise ValueError(
            "query, kept, own do not fit: " + ", ".join(describe(tensor) for tensor in (query, *kept, *own))
        )
    if not (serves(query, *kept) and serves(query, *own)):
        raise ValueError(f"continued_attention takes what tree_attention takes; got query {describe(query)}")
    if len(continuation.places) != queries or len(continuation.since) != kept[0].shape[1] + tokens:
        raise ValueError(
            f"continuation describes {len(continuation.places)} queries and {len(continuation.since)} keys; query is "
            f"{describe(query)}, keys are {describe(kept[0])} and {describe(own[0])}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window!r}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must have shape [{heads}], got {describe(sinks)}")
    from xprobe_kernels.triton_continued import attend

    with on(query.device):
        return attend(query, kept, own, continuation, scale, window, softcap, sinks)
