"""Do the rules of attribution agree with leave-one-out? Spearman's correlation over the spans that the oracle removed.

    xprobe oracle RUN --sentences --limit 24
    python benchmarks/attribution_agreement.py RUN --language en --language de --json FILE

For each example, the drop of the gold answer's log-probability without a span is held against the relevance of the
span's tokens (their sum, signed), at every layer. The mean over examples is printed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

from xprobe.attribution.relevance import GradientRunner
from xprobe.attribution.settings import RULES
from xprobe.config import Execution
from xprobe.models import loading
from xprobe.models.anatomy import inspect
from xprobe.qa.prompts import Prompt, build_prompts
from xprobe.results import load_study
from xprobe.runs.lines import read_lines
from xprobe.runs.provenance import environment
from xprobe.stages.evidence import LINES
from xprobe.stages.opening import key_of, key_of_line
from xprobe.stages.questions import read_questions

FEWEST = 4  # spans of an example, for a correlation


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--rule", "rules", multiple=True, type=click.Choice(list(RULES)), default=tuple(RULES))
@click.option("--language", "languages", multiple=True, default=("en", "de", "ru", "zh"), show_default=True)
@click.option("--setting", default="en-x", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File to write.")
def main(run: Path, rules: tuple[str, ...], languages: tuple[str, ...], setting: str, out: Path | None) -> None:
    """Correlates relevance with the drops of a run's oracle."""
    study = load_study(run).manifest.study
    lines = {key_of_line(line): line for line in read_lines(run / LINES) if "step" not in line}
    source = loading.resolve(study.model)
    loaded = loading.load(source, Execution(device="cpu"), dtype="float32")
    asked = read_questions(study)
    prompts, _ = build_prompts(asked.examples, loaded.tokenizer, asked.template, loaded.window)
    chosen = [
        prompt
        for prompt in prompts
        if prompt.example.setting == setting and prompt.example.language in languages and key_of(prompt) in lines
    ]
    anatomy = inspect(loaded.model)
    result: dict[str, Any] = {"run": study.to_dict(), "languages": languages, "setting": setting, "rules": {}}
    for rule in rules:
        start = time.perf_counter()
        runner = GradientRunner(loaded.model, anatomy, rule)
        found = []
        for prompt in chosen:
            (relevance,) = runner.run([(prompt.ids[: prompt.length], prompt.targets)])
            found.append(agreement(prompt, lines[key_of(prompt)], relevance.values.double().numpy()))
        known = [one for one in found if one is not None]
        by_layer = np.nanmean(known, axis=0)
        result["rules"][rule] = {"examples": len(known), "by_layer": by_layer.round(4).tolist()}
        seconds = (time.perf_counter() - start) / max(1, len(chosen))
        layers = [0, 1, len(by_layer) // 3, len(by_layer) // 2, 2 * len(by_layer) // 3, len(by_layer) - 3]
        shown = "  ".join(f"{layer}: {by_layer[layer]:.2f}" for layer in layers)
        click.echo(f"{rule:10} {len(known)} examples, {seconds:.2f} s each, by layer  {shown}")
    if out is not None:
        out.write_text(json.dumps({**result, "environment": environment()}, indent=1) + "\n")


def agreement(prompt: Prompt, line: dict[str, Any], values: np.ndarray) -> list[float] | None:
    """Spearman's correlation of drop and relevance over the removed spans, by layer; None for fewer than ``FEWEST``."""
    searches = (one for one in line["searches"] if one["target"] == "gold" and one["question"])
    drops = next((one["drops"] for one in searches), [])
    first = prompt.spans["context"][0]
    sums = []
    for start, stop, _ in drops:
        held = [i for i, (a, b) in enumerate(prompt.context_offsets) if a < stop and b > start and a < b]
        sums.append(values[:, first + held[0] : first + held[-1] + 1].sum(1))
    if len(drops) < FEWEST:
        return None
    own = np.stack(sums)  # [spans, L + 1]
    wanted = [drop for _, _, drop in drops]
    return [
        float(spearmanr(own[:, layer], wanted).statistic) if np.ptp(own[:, layer]) > 0 else float("nan")
        for layer in range(own.shape[1])
    ]


if __name__ == "__main__":
    main()
