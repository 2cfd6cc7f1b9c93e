"""`xprobe patch`: states of one question in the run of another, and the causal boundaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xprobe.phases.patch_settings import CONTROLS, PATCHES, PatchSettings
from xprobe_cli.added_stage import add_stage
from xprobe_cli.options import Folder, common, of_run, with_model


def _help() -> str:
    """The text of `xprobe patch --help`, with one line for each kind of patch."""
    width = max(map(len, (*PATCHES, *CONTROLS)))
    lines = [f"{name:<{width}}  {text}" for name, text in (PATCHES | CONTROLS).items()]
    return "\n".join([
        "Find the layers of the model of RUN that use the question, and those that hold the answer.",
        "",
        "Two prompts on one paragraph differ in the question alone. The model is run on one of them, with states of",
        "the other one put in at one layer, for every layer in turn. The effect says how far the answer moves: 0 not",
        "at all, 1 as if the other question had been asked. The causal boundary is the layer where the effect of the",
        "last token's state (answer) rises to 1/2, and the one where that of the question's states (question) falls",
        "below it. A command that was stopped goes on where it was.",
        "",
        "What is replaced, with the controls below:",
        "",
        "\b",
        *lines,
    ])  # fmt: skip


@click.command("patch", help=_help())
@click.argument("run", type=Folder())
@click.option(
    "--pairs",
    type=click.IntRange(min=1),
    help="Maximum number of pairs in one language, per paragraph and language. [default: each question once]",
)
@click.option(
    "--cross",
    type=click.IntRange(min=0),
    default=PatchSettings.cross,
    show_default=True,
    help="Pairs with a question in another language, per paragraph and language.",
)
@click.option(
    "--controls",
    type=click.IntRange(min=0),
    default=PatchSettings.controls,
    show_default=True,
    help="Pairs with controls, per paragraph and language.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=2),
    help="Maximum number of questions, spread over the paragraphs; each in all languages and settings of the run. "
    "[default: all]",
)
@click.option(
    "--figure",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw the curves beside readiness and encoding, and the boundaries by language (needs matplotlib).",
)
@with_model
@common
@click.pass_context
def command(
    context: click.Context, run: Path, pairs: int | None, cross: int, controls: int, limit: int | None,
    figure: Path | None, as_json: bool, **options: Any,
) -> int:  # fmt: skip
    """Runs `xprobe patch`; ``_help`` has the text for users."""
    from xprobe.evaluation import patch
    from xprobe.report.figures import save_causes
    from xprobe.results import Study
    from xprobe_cli.figures import check_figure
    from xprobe_cli.patching_tables import patching_report

    if figure is not None:
        check_figure(figure)
    settings, given = PatchSettings(pairs, cross, controls, limit), of_run(context, options)

    def compute(progress: Any) -> Study:
        study = patch(run, settings, progress=progress, **given)
        if figure is not None:
            save_causes(study, figure)
        return study

    return add_stage("patching", compute, patching_report, as_json=as_json)
