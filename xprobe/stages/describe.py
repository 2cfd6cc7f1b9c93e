"""What ``manifest.json`` says of a run when its computing begins. docs/run-folder.md lists the entries."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from xprobe.config import StudyConfig
from xprobe.qa.prompts import describe_format
from xprobe.runs.provenance import environment

if TYPE_CHECKING:
    from xprobe.capture.plan import Plan
    from xprobe.models.anatomy import Anatomy
    from xprobe.qa.prompts import Prompt, Skipped
    from xprobe.qa.records import Dataset
    from xprobe.qa.templates import Template


def describe_model(model: Any, anatomy: Anatomy, window: int | None) -> dict[str, Any]:
    """Shape, dtype and place of a model, and what was found where in it."""
    from xprobe.models.anatomy import input_device

    return {
        "type": model.config.model_type,
        "n_blocks": anatomy.n_layers - 1,
        "width": anatomy.head.width,
        "vocab_size": anatomy.head.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(input_device(model)),
        "window": window,
        "modules": anatomy.names,
        "head_sha256": anatomy.head.fingerprint(),
        "scale": anatomy.head.scale,
        "softcap": anatomy.head.softcap,
    }


def describe_work(
    prompts: list[Prompt], skipped: list[Skipped], data: Dataset, plan: Plan, config: StudyConfig,
    template: Template, tokenizer: Any,
) -> dict[str, Any]:  # fmt: skip
    """What is asked, what was left out and why, and how it is computed."""
    return {
        "status": "running",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "prompt": {
            "template": config.template,
            **describe_format(template, tokenizer),
            "example": tokenizer.decode(prompts[0].ids, clean_up_tokenization_spaces=False),
        },
        "counts": {
            "examples": len(prompts),
            "answer_tokens": sum(len(prompt.targets) for prompt in prompts),
            "languages": len({prompt.example.language for prompt in prompts}),
            "paragraphs": len({prompt.example.paragraph for prompt in prompts}),
            "skipped": dict(Counter(item.reason for item in skipped)),
            "bad_records": dict(Counter(problem.reason for problem in data.problems)),
        },
        "left_out": {"records": [str(p) for p in data.problems], "examples": [str(s) for s in skipped]},
        "groups": [group.key for wave in plan.waves for group in wave.groups],
        "plan": plan.to_dict(),
        "environment": environment(),
    }
