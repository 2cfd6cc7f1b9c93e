"""Greedy generation: the most probable next token of every prompt, one after the other, until a stop token.

With the strategy ``tree``, all prompts of a pass generate together: the packed tree is run once, its keys and values
stay where the pass left them, and each step runs one new token per live prompt (``tree_decoding``). Models that cannot
share a pass use their own ``generate``, in batches of prompts of one length, so without padding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from xprobe_kernels import Unembedding, lens
from xprobe_kernels.transfer import upload

from xprobe.capture.products import fast_products
from xprobe.capture.tree import make_tree
from xprobe.capture.tree_attention import Layout, packed_attention
from xprobe.capture.tree_decoding import Decoding
from xprobe.models.anatomy import Anatomy, input_device, watch_states
from xprobe.models.block_io import model_code_errors
from xprobe.models.passes import pad

ROWS = 4096  # most rows in one call of the lens


@dataclass(frozen=True)
class Generated:
    """What a model says after a prompt.

    Attributes
    ----------
    ids : tuple of int
        The tokens up to the stop token, which is left out.
    log_probabilities : tuple of float
        Of these tokens, in nats, each given the prompt and the tokens before it.
    stopped : bool
        Whether a stop token came; otherwise the number of tokens ended it.
    """

    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    stopped: bool

    @classmethod
    def from_tokens(cls, ids: Sequence[int], log_probabilities: Sequence[float], stop: Collection[int]) -> Generated:
        """Cut before the first stop token.

        Examples
        --------
        >>> Generated.from_tokens([5, 6, 2, 7], [-0.5, -0.25, -1.0, -2.0], stop={2})
        Generated(ids=(5, 6), log_probabilities=(-0.5, -0.25), stopped=True)
        """
        end = next((place for place, token in enumerate(ids) if token in stop), None)
        return cls(tuple(ids[:end]), tuple(log_probabilities[:end]), end is not None)


def generate_on_tree(
    model: Any,
    anatomy: Anatomy,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop: Collection[int],
    *,
    kernel: bool = False,
) -> list[Generated]:
    """Generates after all ``prompts`` together, on one packed tree.

    Parameters
    ----------
    prompts : sequence of token ids
    limits : sequence of int
        Most new tokens of each prompt, at least 1.
    stop : collection of int
        Tokens that end an answer.
    kernel : bool
        Whether the pass over the tree may use the attention kernel.

    Raises
    ------
    NotShareable
        The model's attention needs something that packed attention does not have.
    """
    device, head = input_device(model), anatomy.head
    tree = make_tree(prompts)
    layout = Layout(tree, device, kernel, kept=[])
    ends = [tree.index(i, len(prompt) - 1) for i, prompt in enumerate(prompts)]
    ids: list[list[int]] = [[] for _ in prompts]
    log_probabilities: list[list[float]] = [[] for _ in prompts]
    with torch.inference_mode(), fast_products(model), model_code_errors(model):
        inputs = {"input_ids": upload(torch.tensor([tree.ids]), device), "position_ids": layout.positions[None]}
        with packed_attention(model, layout):
            rows = _last_rows(model, anatomy, inputs)[0]
        rows = rows[upload(torch.tensor(ends), rows.device)]
        decoding = Decoding(tree, layout.kept or [], list(map(len, prompts)), max(limits))
        live = list(range(len(prompts)))
        while True:
            tokens, values = _most_probable(rows, head)
            for i, token, value in zip(live, tokens, values, strict=True):
                ids[i].append(token)
                log_probabilities[i].append(value)
            live = [i for i in live if ids[i][-1] not in stop and len(ids[i]) < limits[i]]
            if not live:
                break
            positions = decoding.start_step(live)
            inputs = {
                "input_ids": upload(torch.tensor([[ids[i][-1] for i in live]]), device),
                "position_ids": upload(positions[None], device),
            }
            with packed_attention(model, decoding):
                rows = _last_rows(model, anatomy, inputs)[0]
    return [Generated.from_tokens(*answer, stop) for answer in zip(ids, log_probabilities, strict=True)]


def generate_in_batches(
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], stop: Collection[int], batch_tokens: int
) -> list[Generated]:
    """Generates by the model's own ``generate``, in batches of prompts of one length and limit.

    Parameters are those of ``generate_on_tree``. A batch holds at most ``batch_tokens`` tokens, or one prompt.
    """
    found: dict[int, Generated] = {}

    def kind(i: int) -> tuple[int, int]:
        return len(prompts[i]), limits[i]

    for (length, most), members in groupby(sorted(range(len(prompts)), key=kind), key=kind):
        same = list(members)
        step = max(1, batch_tokens // (length + most))
        for start in range(0, len(same), step):
            part = same[start : start + step]
            found |= zip(part, _generate_batch(model, [prompts[i] for i in part], most, stop), strict=True)
    return [found[i] for i in range(len(prompts))]


def _generate_batch(model: Any, prompts: Sequence[Sequence[int]], most: int, stop: Collection[int]) -> list[Generated]:
    from transformers import GenerationConfig, StoppingCriteriaList

    ids = pad(prompts, input_device(model))
    # what would change greedy tokens is given a neutral value: transformers takes missing entries from the model's own
    # configuration, and some of those punish repetition
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=most, min_new_tokens=0, repetition_penalty=1.0,
        no_repeat_ngram_size=0, encoder_repetition_penalty=1.0, renormalize_logits=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    criteria = StoppingCriteriaList([partial(_all_stopped, length=ids.shape[1], stop=frozenset(stop))])
    with torch.inference_mode(), fast_products(model), model_code_errors(model):
        result = model.generate(ids, generation_config=config, stopping_criteria=criteria)
    tokens = result.sequences[:, ids.shape[1] :]
    values = torch.stack([step.float().log_softmax(-1) for step in result.logits], 1).gather(2, tokens[..., None])
    rows = zip(tokens.tolist(), values[..., 0].tolist(), strict=True)
    return [Generated.from_tokens(*row, stop) for row in rows]


def _all_stopped(sequences: Tensor, scores: Any, *, length: int, stop: frozenset[int], **_: Any) -> Tensor:
    """Whether each row holds a stop token after the prompt of ``length`` tokens [B]."""
    ends = torch.tensor(sorted(stop), device=sequences.device)
    return torch.isin(sequences[:, length:], ends).any(-1)


def _last_rows(model: Any, anatomy: Anatomy, inputs: dict[str, Tensor]) -> Tensor:
    """The states [B, T, D] of the last layer in a forward pass of the decoder without its head."""
    last: list[Tensor] = []

    def receive(layer: int, hidden: Tensor) -> None:
        if layer == anatomy.n_layers - 1:
            last.append(hidden)

    with watch_states(anatomy.blocks, receive):
        model.base_model(**inputs, use_cache=False)
    return last[-1]


def _most_probable(rows: Tensor, head: Unembedding) -> tuple[list[int], list[float]]:
    """The most probable tokens after the rows [n, D], and their log-probabilities."""
    rows = rows.to(head.weight.device)
    readout = lens(rows, head, torch.zeros(len(rows), dtype=torch.int64, device=rows.device), top_k=1, check=False)
    ids, logits = cast(Tensor, readout.top_ids), cast(Tensor, readout.top_logits)
    return ids[:, 0].tolist(), (logits[:, 0] - readout.logsumexp).tolist()


def log_probabilities(rows: Tensor, targets: Sequence[int], head: Unembedding) -> list[float]:
    """Log-probability of a token after each of the rows [n, D] of the last layer, in nats.

    Examples
    --------
    >>> head = Unembedding(torch.eye(2), norm="none")
    >>> [round(value, 3) for value in log_probabilities(torch.tensor([[0.0, 0.0]]), [1], head)]
    [-0.693]
    """
    return [value for (value,) in token_log_probabilities(rows, [(target,) for target in targets], head)]


def token_log_probabilities(
    rows: Tensor, targets: Sequence[tuple[int, ...]], head: Unembedding
) -> list[tuple[float, ...]]:
    """Log-probabilities of several tokens, as many for each row, after the rows [n, D] of the last layer, in nats.

    Examples
    --------
    >>> head = Unembedding(torch.eye(2), norm="none")
    >>> ((one, other),) = token_log_probabilities(torch.tensor([[0.0, 1.0]]), [(0, 1)], head)
    >>> round(other - one, 6)
    1.0
    """
    found: list[tuple[float, ...]] = []
    for part in torch.arange(len(rows)).split(ROWS):
        some = rows[part[0] : part[-1] + 1].to(head.weight.device)
        ids = upload(torch.tensor(targets[part[0] : part[-1] + 1]), some.device)
        readout = lens(some, head, ids, check=False)
        found += map(tuple, (readout.logits.double() - readout.logsumexp.double()[:, None]).tolist())
    return found
