"""What a sweep over 40 models on all of XQuAD would take on H200 GPUs, calculated from measured rates.

    python benchmarks/large_sweep.py                      # the tables of docs/large-sweeps.md
    python benchmarks/large_sweep.py --price 2.5          # another price of a GPU hour

Rates: states ``results/h200-2026-11-27`` (two models, of 0.1 and 7 billion parameters in their blocks); answers
``results/h200-2026-11-27-a7b381a`` (the first of them); tokens ``results/xquad-counts-2026-11-27.json``. All else is
calculated: nothing here was run at this scale.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click

RESULTS = Path(__file__).parent / "results"
QUESTIONS, LANGUAGES = 1190, 12  # of XQuAD
SETTINGS = ("en-x", "x-x")
READOUT = 20  # bytes of a position and layer in a shard
ROWS = 2  # hidden rows of an example: prompt end, mean over the question
BFLOAT16 = 2


@dataclass(frozen=True)
class Shape:
    """Some models of one size: how many, blocks, width, vocabulary, parameters of the blocks, GPUs for one run."""

    name: str
    models: int
    blocks: int
    width: int
    vocabulary: int
    parameters: float
    gpus: int


# 40 models, from small to large; the shapes are those of published families
MIX = (
    Shape("1B", 10, 16, 2048, 128_256, 0.97e9, 1),
    Shape("8B", 16, 32, 4096, 128_256, 6.98e9, 1),
    Shape("14B", 8, 40, 5120, 151_936, 13.2e9, 1),
    Shape("70B", 6, 80, 8192, 128_256, 68.5e9, 2),
)


@dataclass(frozen=True)
class Work:
    """All examples of the settings: their number, tokens that are run, and answer positions."""

    examples: int
    tokens_run: float
    positions: float


@dataclass(frozen=True)
class Rates:
    """Measured on one H200: tokens and operations per second of whole runs, examples per second of generation."""

    tokens_of_small: float
    operations_of_large: float
    answers: float
    blocks_of_answers: int


def read_work() -> Work:
    """The counts of the files that are here, scaled to all questions."""
    counts = json.loads((RESULTS / "xquad-counts-2026-11-27.json").read_text())["settings"]
    scale = QUESTIONS * LANGUAGES / counts["en-x"]["examples"]
    return Work(
        QUESTIONS * LANGUAGES * len(SETTINGS),
        scale * sum(counts[setting]["tokens_run"] for setting in SETTINGS),
        scale * sum(counts[setting]["answer_positions"] for setting in SETTINGS),
    )


def read_rates() -> Rates:
    """The rates of the runs with 4096 tokens in a pass; of generation, those of the newer measurement."""
    runs = json.loads((RESULTS / "h200-2026-11-27" / "run.json").read_text())["runs"]
    whole = {run["name"]: run["rates"][0]["all"] for run in runs}
    small, large = whole["demo"], whole["llama-3-8b"]
    stages = json.loads((RESULTS / "h200-2026-11-27-a7b381a" / "stages-demo.json").read_text())
    return Rates(
        small["tokens_run"] / small["seconds_extrapolated"],
        large["operations"] / large["seconds_extrapolated"],
        stages["counts"]["examples"] / stages["stages"]["answers"]["parts"]["generation"],
        30,
    )


def states_seconds(shape: Shape, work: Work, rates: Rates) -> float:
    """Forward passes, lens and writing: by operations, but no faster than a small model by tokens."""
    forward = 2 * shape.parameters * work.tokens_run
    lens = 2 * shape.vocabulary * shape.width * work.positions * (shape.blocks + 1)
    return max((forward + lens) / rates.operations_of_large, work.tokens_run / rates.tokens_of_small)


def answers_seconds(shape: Shape, work: Work, rates: Rates) -> float:
    """The prompts again, by operations; then new tokens: the demo model's time, bound by launches, times the blocks."""
    prompts = 2 * shape.parameters * work.tokens_run / rates.operations_of_large
    return prompts + work.examples / rates.answers * max(1.0, shape.blocks / rates.blocks_of_answers)


def disk(shape: Shape, work: Work, *, rows: bool) -> float:
    """Bytes of the shards of one run."""
    layers = shape.blocks + 1
    kept = ROWS * work.examples * layers * shape.width * BFLOAT16 if rows else 0
    return kept + work.positions * layers * READOUT


def tables(price: float) -> str:
    """Two Markdown tables: one run of each size, and all runs."""
    work, rates = read_work(), read_rates()
    lines = [
        "| size | models | GPUs | states, minutes | answers, minutes | disk of a run | without hidden rows |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    hours = {"states": 0.0, "answers": 0.0}
    total = {True: 0.0, False: 0.0}
    for shape in MIX:
        seconds = {"states": states_seconds(shape, work, rates), "answers": answers_seconds(shape, work, rates)}
        sizes = {rows: disk(shape, work, rows=rows) for rows in (True, False)}
        lines.append(
            f"| {shape.name} | {shape.models} | {shape.gpus} | {seconds['states'] / 60:.1f} | "
            f"{seconds['answers'] / 60:.0f} | {sizes[True] / 1e9:.1f} GB | {sizes[False] / 1e9:.2f} GB |"
        )
        for stage in hours:
            hours[stage] += shape.models * shape.gpus * seconds[stage] / 3600
        for rows in total:
            total[rows] += shape.models * sizes[rows]
    lines += [
        "",
        f"| all {sum(shape.models for shape in MIX)} models | GPU hours | cost at ${price:g} per GPU hour |",
        "| --- | --- | --- |",
        *(f"| {stage} | {one:.1f} | ${price * one:.0f} |" for stage, one in hours.items()),
        "",
        f"{work.examples:,} examples a model, {work.tokens_run / 1e6:.2f} million tokens that are run, "
        f"{work.positions / 1e6:.2f} million answer positions. Disk of all runs: {total[True] / 1e12:.2f} TB, "
        f"{total[False] / 1e9:.0f} GB without hidden rows.",
    ]
    return "\n".join(lines)


@click.command()
@click.option("--price", default=3.0, show_default=True, help="US dollars for one GPU hour. An assumption.")
def main(price: float) -> None:
    """Prints the tables."""
    click.echo(tables(price))


if __name__ == "__main__":
    main()
