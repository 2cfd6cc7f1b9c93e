"""``token_statistics``: log-probability, rank and entropy of every label of a batch, from a model's hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xprobe_kernels.readout import check_forward_only, lens
from xprobe_kernels.request import MIB
from xprobe_kernels.unembedding import Unembedding, describe


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """Result of ``token_statistics``. Entry ``[b, t]`` is about ``labels[b, t]`` and the position that predicts it.

    Entries of labels that are left out hold NaN, rank 0 and id -1: those that equal ``ignore_index``, and with
    ``shift`` the first label of each sequence, which no position predicts. An entry whose hidden state holds NaN or
    infinity holds the same. Floating-point entries are fp32 (fp64 for fp64 hidden states), and none has a gradient.

    Attributes
    ----------
    log_probability : Tensor [B, T]
        Log-probability of the label, in nats. ``-log_probability.nanmean()`` is the mean cross-entropy.
    rank : Tensor [B, T], int64
        1 + the number of other tokens with a larger logit; ``Readout.rank`` says which logits are tied.
    entropy : Tensor [B, T]
        Entropy of the distribution that predicts the label, in nats.
    top_ids, top_log_probability : Tensor [B, T, k]
        The k most probable tokens, most probable first, and their log-probabilities. None if ``top_k`` is 0.

    Examples
    --------
    >>> import torch
    >>> from xprobe_kernels import Unembedding, token_statistics
    >>> hidden, labels = torch.eye(3)[None], torch.tensor([[0, 0, -100]])
    >>> token_statistics(hidden, labels, Unembedding(torch.eye(3), norm="none")).rank.tolist()
    [[0, 1, 0]]
    """

    log_probability: Tensor
    rank: Tensor
    entropy: Tensor
    top_ids: Tensor | None
    top_log_probability: Tensor | None


def token_statistics(
    hidden: Tensor,
    labels: Tensor,
    head: Unembedding,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    top_k: int = 0,
    backend: str = "auto",
    precision: Literal["ieee", "tf32"] = "ieee",
    workspace_bytes: int = 256 * MIB,
) -> TokenStatistics:
    """Log-probability, rank and entropy of every label, without the [B, T, V] logits.

    Parameters
    ----------
    hidden : Tensor [B, T, D]
        Hidden states before ``head.norm``. transformers' ``last_hidden_state`` already went through the final norm:
        give its head ``norm="none"``. A single sequence [T, D] and more leading dimensions are allowed.
    labels : Tensor [B, T], int64
        Token ids, on the device of ``hidden``.
    head : Unembedding
        What turns ``hidden`` into logits.
    ignore_index : int
        Labels with this value are left out, and their rows are not computed.
    shift : bool
        True: ``hidden[b, t]`` predicts ``labels[b, t + 1]``, as with ``labels=`` of transformers.
        False: ``hidden[b, t]`` predicts ``labels[b, t]``.
    top_k, backend, precision, workspace_bytes
        As for ``lens``.

    Returns
    -------
    TokenStatistics

    Raises
    ------
    ValueError
        Names the argument, its value and what was expected. Also if ``hidden`` requires a gradient, because none is
        computed: pass ``hidden.detach()`` or call under ``torch.no_grad()``.

    Examples
    --------
    Two tokens, three of four probability on the first. The second position predicts nothing:

    >>> import torch
    >>> from xprobe_kernels import Unembedding, token_statistics
    >>> head = Unembedding(torch.eye(2), norm="none")
    >>> hidden = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]).log()
    >>> values = token_statistics(hidden, torch.tensor([[1, 0]]), head)
    >>> [round(float(p), 4) for p in values.log_probability[0].exp()], values.rank.tolist()
    ([nan, 0.75], [[0, 1]])
    """
    _check(hidden, labels, head, ignore_index, shift)
    states, targets = (hidden[..., :-1, :], labels[..., 1:]) if shift else (hidden, labels)
    kept = targets != ignore_index
    tokens = targets[kept]
    wrong = (tokens < 0) | (tokens >= head.vocab_size)
    where = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    where[..., 1 if shift else 0 :] = kept
    if wrong.any():
        place = where.nonzero()[wrong][0].tolist()
        raise ValueError(
            f"labels holds {int(tokens[wrong][0])} at {place}; every entry must be from 0 to {head.vocab_size - 1}, "
            f"or ignore_index, which is {ignore_index}"
        )
    readout = lens(
        states[kept],
        head,
        tokens,
        top_k=top_k,
        backend=backend,
        precision=precision,
        workspace_bytes=workspace_bytes,
        check=False,
    )

    def spread(values: Tensor, left_out: float) -> Tensor:
        """Values of the kept rows [N, ...] at the places of their labels [B, T, ...]."""
        whole = values.new_full((*labels.shape, *values.shape[1:]), left_out)
        whole[where] = values
        return whole

    top_ids, top_logits = readout.top_ids, readout.top_logits
    return TokenStatistics(
        log_probability=spread(readout.log_probability[:, 0], torch.nan),
        rank=spread(readout.rank[:, 0], 0),
        entropy=spread(readout.entropy, torch.nan),
        top_ids=None if top_ids is None else spread(top_ids, -1),
        top_log_probability=None if top_logits is None else spread(top_logits - readout.logsumexp[:, None], torch.nan),
    )


def _check(hidden: Tensor, labels: Tensor, head: Unembedding, ignore_index: object, shift: object) -> None:
    """Checks what ``lens`` cannot check, because it sees rows."""
    if not isinstance(head, Unembedding):
        raise ValueError(f"head must be an Unembedding, got {describe(head)}")
    if not isinstance(hidden, Tensor) or hidden.ndim < 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating-point tensor [B, T, {head.width}], got {describe(hidden)}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != hidden.shape[:-1]:
        shape = list(hidden.shape[:-1])
        raise ValueError(f"labels must be an int64 tensor of shape {shape}, as hidden has it, got {describe(labels)}")
    if labels.device != hidden.device:
        raise ValueError(f"labels is on {labels.device}, hidden is on {hidden.device}: move one of them")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index must be a whole number, got {ignore_index!r}")
    if not isinstance(shift, bool):
        raise ValueError(f"shift must be True or False, got {shift!r}")
    check_forward_only(hidden, "token_statistics")
