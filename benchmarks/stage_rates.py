"""Times the stages of a study on the same questions, beside the forecast of ``xprobe.sweeps``.

    python benchmarks/stage_rates.py OUT.json                                  the demo model, XQuAD en-x
    python benchmarks/stage_rates.py OUT.json --shape llama-3-8b --device cuda a random model of that shape, bf16

A study of one paragraph runs before, to compile kernels and to fill the caches; it does not count. The seconds are
those of the manifest, without the loading of the model. The answers of a random model do not end before --tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from xprobe_kernels.bench.environment import environment

import xprobe
from benchmarks.whole_run import SHAPES, random_model
from xprobe import AnswerSettings, OracleSettings, PatchSettings, RelevanceSettings, Study
from xprobe.config import Execution, StudyConfig
from xprobe.forecast import forecast
from xprobe.models import loading
from xprobe.models.sources import resolve

LOADING = ("load", "prompts", "parity")  # parts of a stage that do not grow with the questions
LATER: dict[str, Callable[..., Study]] = {
    "answers": xprobe.evaluate,
    "relevance": xprobe.attribute,
    "patching": xprobe.patch,
    "oracle": xprobe.oracle,
}
DEFAULT = "answers,relevance,patching"


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--model", "name", default="smollm2-135m", show_default=True, help="Also gives a random model its tokenizer."
)
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Use a random model of this shape.")
@click.option("--data", default="xquad", show_default=True)
@click.option("--setting", default="en-x", show_default=True)
@click.option("--languages", help="Comma-separated. [default: all]")
@click.option("--paragraphs", default=12, show_default=True)
@click.option("--questions", default=3, show_default=True, help="Of each paragraph.")
@click.option("--tokens", default=32, show_default=True, help="Most tokens of an answer.")
@click.option("--stages", default=DEFAULT, show_default=True, help="Stages after states; also oracle.")
@click.option("--oracle-limit", default=6, show_default=True, help="Questions of the stage oracle.")
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--batch-tokens", type=int, help="[default: by device]")
@click.option("--commit", help="Commit that is measured, where git is missing.")
def main(
    out: Path, name: str, shape: str | None, data: str, setting: str, languages: str | None, paragraphs: int,
    questions: int, tokens: int, stages: str, oracle_limit: int, device: str, dtype: str,
    batch_tokens: int | None, commit: str | None,
) -> None:  # fmt: skip
    """Times the stages and writes OUT."""
    source = resolve(name)
    if shape:
        chosen = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        model: Any = random_model(shape, loading.pick_device(device), chosen)
        tokenizer = loading.load_tokenizer(source)
    else:
        loaded = loading.load(source, Execution(device=device), dtype=dtype)
        model, tokenizer = loaded.model, loaded.tokenizer
    result: dict[str, Any] = {
        "model": shape or name, "data": data, "setting": setting, "dtype": str(model.dtype).removeprefix("torch."),
        "environment": environment(next(model.parameters()).device), "stages": {},
    }  # fmt: skip
    result["environment"]["commit"] = commit or result["environment"]["commit"]
    given: dict[str, Any] = {"tokenizer": tokenizer}
    options: dict[str, Any] = {"batch_tokens": batch_tokens}

    later: dict[str, Any] = {
        "answers": AnswerSettings(tokens), "relevance": RelevanceSettings(), "patching": PatchSettings(),
        "oracle": OracleSettings(limit=oracle_limit),
    }  # fmt: skip
    chosen_stages = {stage: later[stage] for stage in stages.split(",") if stage}
    if not shape:
        asked = StudyConfig(
            model=name, data=data, settings=(setting,), paragraphs=paragraphs, questions_per_paragraph=questions,
            languages=tuple(languages.split(",")) if languages else None, dtype=dtype,
        )  # fmt: skip
        expected = forecast(asked, Execution(device=device, batch_tokens=batch_tokens), chosen_stages)
        result["forecast"] = {"states": expected.seconds, **expected.stage_seconds}

    def save() -> None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def enter(stage: str, study: Study, wall: float) -> None:
        entry = study.manifest.stages[stage]
        seconds = {key: value for key, value in entry.seconds.items() if key not in LOADING}
        result["stages"][stage] = {
            "seconds": round(sum(seconds.values()), 3), "wall_seconds": round(wall, 3), "parts": entry.seconds,
            "warnings": entry.warnings,
        }  # fmt: skip
        if torch.cuda.is_available():
            result["stages"][stage]["memory_peak_bytes"] = torch.cuda.max_memory_allocated()
        click.echo(f"{stage}: {json.dumps(result['stages'][stage])}", err=True)
        save()

    with tempfile.TemporaryDirectory() as scratch:
        for part, count in (("first", 1), ("measured", paragraphs)):
            start = time.perf_counter()
            study = xprobe.run(
                model, **given, data=data, setting=setting, paragraphs=count, questions_per_paragraph=questions,
                languages=languages.split(",") if languages else None, out=Path(scratch) / part, probes=(), **options,
            )  # fmt: skip
            result["counts"] = asdict(study.manifest.counts)
            if part == "measured":
                enter("states", study, time.perf_counter() - start)
            for stage, settings in chosen_stages.items():
                start = time.perf_counter()
                study = LATER[stage](study, settings, model=model, **given, **options)
                if part == "measured":
                    enter(stage, study, time.perf_counter() - start)
    save()


if __name__ == "__main__":
    main()
