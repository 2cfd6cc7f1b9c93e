"""Forward passes with hooks on the blocks: chosen rows of every layer land in one preallocated buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from xprobe_kernels import capture

from xprobe.capture.plan import Group, batch_by_length
from xprobe.models.anatomy import Anatomy, watch_states
from xprobe.qa.prompts import Prompt


@dataclass(frozen=True, eq=False)
class Captured:
    """Hidden rows of a group, before the final norm, in the model's dtype and on its device.

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
        return self.answers[:, self.offsets[:-1]]


def capture_group(model: Any, anatomy: Anatomy, group: Group, batch_tokens: int) -> Captured:
    """Runs the decoder (without its head) over a group's prompts and keeps the rows that the lens and probes need."""
    decoder = model.base_model
    layers, width, device = anatomy.n_layers, anatomy.head.width, model.device
    counts = torch.tensor([len(prompt.targets) for prompt in group.prompts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    answers = torch.empty(layers, int(offsets[-1]), width, dtype=model.dtype, device=device)
    questions = torch.empty(layers, len(group.prompts), width, dtype=model.dtype, device=device)
    for batch in batch_by_length(group.prompts, batch_tokens):
        members = [group.prompts[i] for i in batch]
        rows = torch.cat([torch.arange(int(offsets[i]), int(offsets[i + 1])) for i in batch]).to(device)
        places = torch.tensor(batch, device=device)
        spans, n_answer = _spans(members)
        ids = pad(members, device)
        buffer = torch.empty(spans.shape[0], width, dtype=model.dtype, device=device)

        def receive(
            layer: int, hidden: Tensor, spans: Tensor = spans, buffer: Tensor = buffer,
            rows: Tensor = rows, places: Tensor = places, n_answer: int = n_answer,
        ) -> None:  # fmt: skip
            capture(hidden, spans, buffer)
            answers[layer, rows] = buffer[:n_answer]
            questions[layer, places] = buffer[n_answer:]

        with torch.inference_mode(), watch_states(anatomy.blocks, receive):
            decoder(input_ids=ids, use_cache=False)
    targets = torch.tensor([token for prompt in group.prompts for token in prompt.targets], device=device)
    return Captured(answers, offsets, questions, targets)


def pad(prompts: list[Prompt], device: torch.device) -> Tensor:
    """Token ids [B, T], padded on the right with id 0, to be run *without* an attention mask.

    A causal model's states at real positions cannot see what comes later, so no mask is needed; and a mask can hurt:
    rows that it leaves with nothing to attend to become NaN in some attention implementations, and spread.
    """
    ids = torch.zeros(len(prompts), max(len(prompt.ids) for prompt in prompts), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
    return ids.to(device)


def _spans(prompts: list[Prompt]) -> tuple[Tensor, int]:
    """(batch, start, stop) of every answer position, then of every question; and how many answer positions."""
    answers = [(row, at, at + 1) for row, prompt in enumerate(prompts) for at in prompt.answer_positions]
    questions = [(row, *prompt.spans["question"]) for row, prompt in enumerate(prompts)]
    return torch.tensor(answers + questions), len(answers)
