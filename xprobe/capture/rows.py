"""The rows that are kept of the residual states, and how they get from a forward pass into one preallocated buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from xprobe_kernels import capture
from xprobe_kernels.capture import check_spans
from xprobe_kernels.transfer import upload

from xprobe.qa.prompts import Prompt

# (prompt's place in the pass, first, last + 1 position) -> spans (batch, start, stop) in the pass's hidden states
Locate = Callable[[int, int, int], list[tuple[int, int, int]]]


@dataclass(frozen=True, eq=False)
class Captured:
    """Hidden rows of N prompts, before the final norm, in the model's dtype and on the head's device.

    Attributes
    ----------
    answers : Tensor [L + 1, P, D]
        Rows at the answer positions of all examples, one example after the other.
    offsets : Tensor [N + 1], int64
        Example i owns rows ``offsets[i]:offsets[i + 1]`` of the P; its first one is the last prompt token.
    questions : Tensor [L + 1, N, D]
        Mean over the question's own tokens.
    targets : Tensor [P], int64
        The gold token that follows each answer position.
    """

    answers: Tensor
    offsets: Tensor
    questions: Tensor
    targets: Tensor

    @property
    def prompt_ends(self) -> Tensor:
        """Rows at the last prompt token [L + 1, N, D]."""
        return self.answers[:, upload(self.offsets[:-1], self.answers.device)]

    def copy(self) -> Captured:
        """The same rows in memory of their own, which the next pass does not overwrite."""
        return Captured(self.answers.clone(), self.offsets, self.questions.clone(), self.targets)

    def part(self, start: int, stop: int) -> Captured:
        """Prompts ``start:stop`` alone; the same memory."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return Captured(
            self.answers[:, first:last],
            self.offsets[start : stop + 1] - first,
            self.questions[:, start:stop],
            self.targets[first:last],
        )


class RowSpace:
    """Memory for captured rows, taken once and used again for each wave; grows only if a larger one comes."""

    def __init__(self, layers: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layers, self.width, self.device = layers, width, device
        self._answers = torch.empty(0, dtype=dtype, device=device)
        self._questions = torch.empty(0, dtype=dtype, device=device)

    def reserve(self, positions: int, examples: int) -> None:
        """Takes memory for so many answer positions and examples at once."""
        row = self.layers * self.width
        if self._answers.numel() < row * positions:
            self._answers = self._memory(self._answers, row * positions)
        if self._questions.numel() < row * examples:
            self._questions = self._memory(self._questions, row * examples)

    def _memory(self, before: Tensor, numbers: int) -> Tensor:
        return before.new_empty(numbers)

    def take(self, prompts: Sequence[Prompt]) -> Captured:
        """Room for the rows of ``prompts``; what was taken before is overwritten."""
        offsets = [0, *accumulate(len(prompt.targets) for prompt in prompts)]
        self.reserve(offsets[-1], len(prompts))
        shape = (self.layers, -1, self.width)
        targets = upload(torch.tensor([token for prompt in prompts for token in prompt.targets]), self.device)
        return Captured(
            self._answers[: self.layers * self.width * offsets[-1]].view(shape),
            torch.tensor(offsets),
            self._questions[: self.layers * self.width * len(prompts)].view(shape),
            targets,
        )


class Receiver:
    """Copies the rows of one pass into their places; called with each layer's states. Waits for no device.

    Answer rows are copied bit for bit. A question whose tokens lie in several pieces of the pass is put together from
    the pieces' means, in fp32 (fp64 for fp64 rows), always in the same order.
    """

    def __init__(self, prompts: Sequence[Prompt], part: Sequence[int], locate: Locate, into: Captured) -> None:
        answers: list[tuple[int, int, int]] = []
        rows: list[int] = []
        pieces: list[tuple[int, int, int]] = []
        owned: list[list[int]] = []  # numbers of the pieces of each question
        offsets = into.offsets.tolist()
        for place, i in enumerate(part):
            for step, at in enumerate(prompts[i].answer_positions):
                answers += locate(place, at, at + 1)
                rows.append(offsets[i] + step)
            found = locate(place, *prompts[i].spans["question"])
            owned.append(list(range(len(pieces), len(pieces) + len(found))))
            pieces += found
        self.into = into
        self.host = torch.tensor(answers), torch.tensor(pieces)  # spans
        self.spans: dict[torch.device, tuple[Tensor, Tensor]] = {}  # per device of a block
        most = max(map(len, owned))
        table = torch.tensor([own + [own[0]] * (most - len(own)) for own in owned])
        counted = torch.tensor([[1.0] * len(own) + [0.0] * (most - len(own)) for own in owned], dtype=torch.float64)
        lengths = (self.host[1][:, 2] - self.host[1][:, 1])[table] * counted
        device = into.answers.device
        self.rows, self.members = upload(torch.tensor(rows), device), upload(torch.tensor(list(part)), device)
        self.table = upload(table, device)
        self.shares = upload(lengths / lengths.sum(1, keepdim=True), device)[..., None]
        self.checked = False

    def __call__(self, layer: int, hidden: Tensor) -> None:
        if not self.checked:
            for spans in self.host:
                check_spans(spans, *hidden.shape[:2])
            self.checked = True
        device = hidden.device
        if device not in self.spans:
            self.spans[device] = upload(self.host[0], device), upload(self.host[1], device)
        answers, pieces = self.spans[device]
        into = self.into
        wide = torch.promote_types(hidden.dtype, torch.float32)
        buffer = torch.empty(answers.shape[0], hidden.shape[-1], dtype=hidden.dtype, device=device)
        capture(hidden, answers, buffer, check=False)
        into.answers[layer, self.rows] = buffer.to(into.answers)
        means = torch.empty(pieces.shape[0], hidden.shape[-1], dtype=wide, device=device)
        capture(hidden, pieces, means, check=False)
        questions = (means.to(into.questions.device)[self.table] * self.shares.to(wide)).sum(1)
        into.questions[layer, self.members] = questions.to(into.questions.dtype)
