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
from xprobe_kernels.attention import serves
from xprobe_kernels.transfer import HostCopy, upload

from xprobe.capture.kernel_decoding import KernelDecoding
from xprobe.capture.products import fast_products
from xprobe.capture.tree import make_tree
from xprobe.capture.tree_attention import Layout, packed_attention
from xprobe.capture.tree_decoding import Decoding
from xprobe.models.anatomy import Anatomy, input_device, watch_states
from xprobe.models.block_io import model_code_errors
from xprobe.models.passes import pad

ROWS = 4096  # most rows in one call of the lens
# after so many tokens the host asks which answers have ended: on a GPU it waits, on a CPU tokens too many cost more
CHECKED, CHECKED_ON_CPU = 4, 1


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
    answers = _Answers(limits, stop, CHECKED_ON_CPU if device.type == "cpu" else CHECKED)
    with torch.inference_mode(), fast_products(model), model_code_errors(model):
        inputs = {"input_ids": upload(torch.tensor([tree.ids]), device), "position_ids": layout.positions[None]}
        with packed_attention(model, layout):
            rows = _last_rows(model, anatomy, inputs)[0]
        rows = rows[upload(torch.tensor(ends), rows.device)]
        kept, lengths = layout.kept or [], list(map(len, prompts))
        on_kernel = kernel and all(serves(key[0], key[0], value[0]) for key, value in kept)
        decoding = (KernelDecoding if on_kernel else Decoding)(tree, kept, lengths, max(limits))
        while (tokens := answers.add(*_most_probable(rows, head))) is not None:
            inputs = {"position_ids": decoding.start_step(answers.live, device)[None], "input_ids": tokens[None]}
            with packed_attention(model, decoding):
                rows = _last_rows(model, anatomy, {name: tensor.to(device) for name, tensor in inputs.items()})[0]
    return answers.finished()


class _Answers:
    """The tokens of every prompt so far. The host looks at them after every ``checked`` tokens, and waits only then.

    Parameters
    ----------
    limits : sequence of int
        Most tokens of each prompt; none gets more, whatever ``checked`` is.
    stop : collection of int
    checked : int

    Attributes
    ----------
    live : list of int
        The prompts that go on, by index.

    Examples
    --------
    >>> answers = _Answers([3, 1], {7}, checked=4)
    >>> answers.add(torch.tensor([5, 6]), torch.tensor([-0.5, -0.25]))
    tensor([5])
    >>> answers.live, answers.add(torch.tensor([8]), torch.tensor([-0.125]))
    ([0], tensor([8]))
    >>> answers.add(torch.tensor([7]), torch.tensor([-1.0])) is None
    True
    >>> [answer.ids for answer in answers.finished()]
    [(5, 8), (6,)]
    """

    def __init__(self, limits: Sequence[int], stop: Collection[int], checked: int) -> None:
        self._limits, self._stop, self._checked = limits, frozenset(stop), checked
        self.live = list(range(len(limits)))
        self._ids: list[list[int]] = [[] for _ in limits]
        self._values: list[list[float]] = [[] for _ in limits]
        self._unseen: list[tuple[Tensor, Tensor]] = []

    def add(self, tokens: Tensor, values: Tensor) -> Tensor | None:
        """Adds a token and its log-probability for each live prompt [n]. Returns the tokens of those that go on."""
        self._unseen.append((tokens, values))
        room = min(self._limits[i] - len(self._ids[i]) for i in self.live)
        if len(self._unseen) < min(self._checked, room):
            return tokens
        columns = HostCopy({"ids": torch.stack([t for t, _ in self._unseen], 1),
                            "values": torch.stack([v for _, v in self._unseen], 1)}).wait()  # fmt: skip
        self._unseen = []
        for i, new, likely in zip(self.live, columns["ids"].tolist(), columns["values"].tolist(), strict=True):
            self._ids[i] += new
            self._values[i] += likely
        goes_on = [
            row
            for row, (i, new) in enumerate(zip(self.live, columns["ids"].tolist(), strict=True))
            if len(self._ids[i]) < self._limits[i] and self._stop.isdisjoint(new)
        ]
        if not goes_on:
            return None
        if len(goes_on) < len(self.live):
            self.live = [self.live[row] for row in goes_on]
            tokens = tokens[upload(torch.tensor(goes_on), tokens.device)]
        return tokens

    def finished(self) -> list[Generated]:
        """The answer after each prompt."""
        return [Generated.from_tokens(*one, self._stop) for one in zip(self._ids, self._values, strict=True)]


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


def _most_probable(rows: Tensor, head: Unembedding) -> tuple[Tensor, Tensor]:
    """The most probable tokens [n] after the rows [n, D], and their log-probabilities [n]."""
    rows = rows.to(head.weight.device)
    readout = lens(rows, head, torch.zeros(len(rows), dtype=torch.int64, device=rows.device), top_k=1, check=False)
    ids, logits = cast(Tensor, readout.top_ids), cast(Tensor, readout.top_logits)
    return ids[:, 0], logits[:, 0] - readout.logsumexp


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
