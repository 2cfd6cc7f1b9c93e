"""`xprobe attribute`: relevance of the tokens of a run, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xprobe.attribution.settings import ATTRIBUTED, RULES, RelevanceSettings
from xprobe_cli.added_stage import add_stage
from xprobe_cli.options import Folder, common, echo_json, of_run, with_model


def _help() -> str:
    """The text of `xprobe attribute --help`, with one line for each rule and quantity."""
    width = max(map(len, (*RULES, *ATTRIBUTED)))
    return "\n".join([
        "Compute how much each token of the prompts of RUN matters for the gold answer, at every layer.",
        "",
        "Relevance is gradient times input, summed over the hidden state of a token: one backward pass for each",
        "example. The table shows the major relevance depth (MRD) of question and answer, and the share of the",
        "relevance by layer. A command that was stopped goes on where it was.",
        "",
        "Rules (--rule):",
        "",
        "\b",
        *(f"{name:<{width}}  {description}" for name, description in RULES.items()),
        "",
        "Quantities (--of):",
        "",
        "\b",
        *(f"{name:<{width}}  {description}" for name, description in ATTRIBUTED.items()),
    ])  # fmt: skip


@click.command("attribute", help=_help())
@click.argument("run", type=Folder())
@click.option(
    "--rule",
    type=click.Choice(list(RULES)),
    default=RelevanceSettings.rule,
    show_default=True,
    help="Rule for nonlinear parts in the backward pass.",
)
@click.option(
    "--of",
    "attributed",
    type=click.Choice(list(ATTRIBUTED)),
    default=RelevanceSettings.attributed,
    show_default=True,
    help="Quantity that the relevance explains.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Maximum number of questions, spread over the paragraphs; each in all languages and settings of the run. "
    "[default: all]",
)
@click.option(
    "--show",
    metavar="EXAMPLE",
    help="Show the heat map of one example (setting/language/question id) instead; nothing is written to the run.",
)
@click.option(
    "--figure", type=click.Path(path_type=Path), metavar="FILE.png", help="With --show: draw it (needs matplotlib)."
)
@with_model
@common
@click.pass_context
def command(
    context: click.Context, run: Path, rule: str, attributed: str, limit: int | None, show: str | None,
    figure: Path | None, as_json: bool, **options: Any,
) -> int:  # fmt: skip
    """Runs `xprobe attribute`; ``_help`` has the text for users."""
    from xprobe.evaluation import attribute, attribute_example
    from xprobe_cli.figures import check_figure
    from xprobe_cli.relevance_tables import heat_map, plain_example, relevance_report, save_heat_map

    if figure is not None and show is None:
        raise click.UsageError("--figure draws one example: name it with --show")
    if figure is not None:
        check_figure(figure)
    settings = RelevanceSettings(rule, attributed, limit)
    given = of_run(context, options)
    if show is not None:
        found = attribute_example(run, show, settings, **given)
        if figure is not None:
            save_heat_map(found, figure)
        if as_json:
            echo_json(plain_example(found))
        else:
            click.echo(heat_map(found))
        return 0
    return add_stage(
        "relevance",
        lambda progress: attribute(run, settings, progress=progress, **given),
        relevance_report,
        as_json=as_json,
    )
