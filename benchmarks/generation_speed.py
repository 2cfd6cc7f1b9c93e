"""Answers of prompts that share a context: generated together, and one by one by the model's own ``generate``.

    python benchmarks/generation_speed.py --questions 5              smollm2-135m, one paragraph in 12 languages
    python benchmarks/generation_speed.py --model FILE --rounds 3 --json FILE

Every round times all prompts together, and then some of them one by one, in one process. Tokens are compared.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers import GenerationConfig

from xprobe.capture.engine import Engine
from xprobe.config import Execution, StudyConfig
from xprobe.models import loading
from xprobe.models.anatomy import inspect
from xprobe.models.sources import resolve
from xprobe.qa.prompts import build_prompts
from xprobe.qa.stopping import stop_tokens
from xprobe.runs.provenance import environment
from xprobe.stages.questions import read_questions
from xprobe.stages.requests import strategy_sample, study_request


@click.command()
@click.option("--model", "name", default="smollm2-135m", show_default=True)
@click.option("--data", default="xquad", show_default=True)
@click.option("--questions", default=5, show_default=True, help="Questions on one paragraph, each in every language.")
@click.option("--tokens", default=32, show_default=True, help="Most tokens of an answer.")
@click.option("--alone", default=12, show_default=True, help="Prompts of each round that are also run one by one.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File to write.")
def main(name: str, data: str, questions: int, tokens: int, alone: int, rounds: int, out: Path | None) -> None:
    """Times generation together and one by one."""
    source = resolve(name)
    loaded = loading.load(source, Execution(device="cpu"), dtype="float32")
    model: Any = loaded.model
    asked = read_questions(StudyConfig(model=name, data=data, paragraphs=1, questions_per_paragraph=questions))
    prompts, _ = build_prompts(asked.examples, loaded.tokenizer, asked.template, None)
    ids = [list(prompt.ids[: prompt.length]) for prompt in prompts]
    stop = stop_tokens(loaded.tokenizer, asked.template, model.generation_config)
    engine = Engine(model, inspect(model), Execution().tokens_on("cpu"))
    engine.choose_strategy(strategy_sample([study_request(prompt) for prompt in prompts]))
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, repetition_penalty=1.0, pad_token_id=0, eos_token_id=sorted(stop)
    )
    together, single, same, compared = [], [], 0, 0
    for round_ in range(rounds):
        start = time.perf_counter()
        answers = engine.generate(ids, tokens, stop)
        together.append((time.perf_counter() - start) / len(ids))
        chosen = [(round_ * alone + i * len(ids) // alone) % len(ids) for i in range(alone)]
        start = time.perf_counter()
        with torch.inference_mode():
            texts = [model.generate(torch.tensor([ids[i]]), generation_config=config)[0] for i in chosen]
        single.append((time.perf_counter() - start) / len(chosen))
        for i, text in zip(chosen, texts, strict=True):
            new = [token for token in text[len(ids[i]) :].tolist() if token not in stop]
            same, compared = same + (tuple(new) == answers[i].ids), compared + 1
    result = {
        "model": name, "strategy": engine.report().strategy, "prompts": len(ids),
        "prompt_tokens": sum(map(len, ids)), "new_tokens": sum(len(answer.ids) for answer in answers),
        "together_ms": 1000 * statistics.median(together), "one_by_one_ms": 1000 * statistics.median(single),
        "ratio": statistics.median(b / a for a, b in zip(together, single, strict=True)),
        "ratios": [b / a for a, b in zip(together, single, strict=True)],
        "same_tokens": f"{same} of {compared}", "threads": torch.get_num_threads(),
    }  # fmt: skip
    click.echo(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps({**result, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
