"""`xprobe oracle`: find the words of the context that the answers of a run depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xprobe.scoring.settings import NORMALISERS, REMOVALS, OracleSettings
from xprobe_cli.added_stage import add_stage
from xprobe_cli.options import Folder, common, echo_json, of_run, with_model


def _help() -> str:
    """The text of `xprobe oracle --help`, with one line for each kind of removal."""
    width = max(map(len, REMOVALS))
    return "\n".join([
        "Find the words of the context that each answer of the run folder RUN depends on.",
        "",
        "Words are removed from the context, one span after another, and the log-probability of the answer is",
        "measured again. The span whose removal costs most is the evidence. Its F1 with the gold answer says whether",
        "the model found the answer, whatever it then said. Answers are generated first where the run has none.",
        "",
        "This takes many times the tokens of `xprobe run`: --dry-run says how many; --limit and --sentences take",
        "fewer. A command that was stopped goes on where it was.",
        "",
        "Removal (--removal):",
        "",
        "\b",
        *(f"{name:<{width}}  {description}" for name, description in REMOVALS.items()),
    ])  # fmt: skip


@click.command("oracle", help=_help())
@click.argument("run", type=Folder())
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Maximum number of questions, spread over the paragraphs; each in all languages and settings of the run. "
    "[default: all]",
)
@click.option(
    "--removal",
    type=click.Choice(list(REMOVALS)),
    default=OracleSettings.removal,
    show_default=True,
    help="What happens to the tokens of a span.",
)
@click.option("--sentences", is_flag=True, help="Stop at the sentence: under a tenth of the cost.")
@click.option("--no-control", is_flag=True, help="Do not search again without the question.")
@click.option(
    "--norm",
    "normaliser",
    type=click.Choice(list(NORMALISERS)),
    default=OracleSettings.normaliser,
    show_default=True,
    help="Normaliser that is applied before texts are compared.",
)
@click.option("--dry-run", is_flag=True, help="Print what the command would take, and stop.")
@with_model
@common
@click.pass_context
def command(
    context: click.Context, run: Path, limit: int | None, removal: str, sentences: bool, no_control: bool,
    normaliser: str, dry_run: bool, as_json: bool, **options: Any,
) -> int:  # fmt: skip
    """Runs `xprobe oracle`; ``_help`` has the text for users."""
    from xprobe.evaluation import forecast_oracle, oracle
    from xprobe_cli.answer_tables import oracle_report

    settings = OracleSettings(removal, not sentences, not no_control, limit, normaliser)
    given = of_run(context, options)
    if dry_run:
        forecast = forecast_oracle(run, settings, **given)
        if as_json:
            echo_json(forecast.to_dict())
        else:
            click.echo(str(forecast))
        return 0
    return add_stage(
        "oracle", lambda progress: oracle(run, settings, progress=progress, **given), oracle_report, as_json=as_json
    )
