"""`xprobe evaluate`: generate and score the answers of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xprobe.scoring.settings import NORMALISERS, AnswerSettings
from xprobe_cli.added_stage import add_stage
from xprobe_cli.options import Folder, common, of_run, track_option, with_model


def _help() -> str:
    """The text of `xprobe evaluate --help`, with one line for each normaliser."""
    width = max(map(len, NORMALISERS))
    lines = [f"{name:<{width}}  {description}" for name, description in NORMALISERS.items()]
    return "\n".join([
        "Let the model of the run folder RUN answer every prompt, and score the answers.",
        "",
        "Answers that the folder holds are not generated again: --norm and --threshold score them anew in seconds. A",
        "command that was stopped goes on where it was.",
        "",
        "Normalisers (--norm):",
        "",
        "\b",
        *lines,
    ])  # fmt: skip


@click.command("evaluate", help=_help())
@click.argument("run", type=Folder())
@click.option(
    "--norm",
    "normaliser",
    type=click.Choice(list(NORMALISERS)),
    default=AnswerSettings.normaliser,
    show_default=True,
    help="Normaliser that is applied before texts are compared.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=AnswerSettings.threshold,
    show_default=True,
    help="An answer with at least this F1 counts as correct.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Maximum number of tokens of an answer. [default: that of the longest gold answer in that language, but at "
    "least 32 and at most 128]",
)
@with_model
@track_option
@common
@click.pass_context
def command(
    context: click.Context, run: Path, normaliser: str, threshold: float, max_new_tokens: int | None,
    track: str | None, as_json: bool, **options: Any,
) -> int:  # fmt: skip
    """Runs `xprobe evaluate`; ``_help`` has the text for users."""
    from xprobe.evaluation import evaluate
    from xprobe_cli.answer_tables import answer_report

    settings = AnswerSettings(max_new_tokens, normaliser, threshold)
    return add_stage(
        "answers",
        lambda progress: evaluate(run, settings, progress=progress, **of_run(context, options)),
        answer_report,
        as_json=as_json,
        track=track,
    )
