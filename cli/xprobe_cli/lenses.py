"""`xprobe lenses`: a run read by several lenses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xprobe.lenses.settings import LENSES, LensesSettings
from xprobe_cli.added_stage import add_stage
from xprobe_cli.options import Folder, common, of_run, with_streamable_model


def _help() -> str:
    """The text of `xprobe lenses --help`, with one line for each kind of lens."""
    width = max(map(len, LENSES))
    return "\n".join([
        "Read the states of RUN by several lenses, and show the phases under each of them.",
        "",
        "The model runs once over the prompts; every lens reads the same states. The lens of the run is always among",
        "them. Beside the phases: the script of the most probable token after the prompt, by layer (a lens may prefer",
        "a language), and in the setting x-x the latent language: how probable the first token of the answer is in",
        "English and in the language of the question. A command that was stopped goes on where it was.",
        "",
        "Lenses (--lens); all but logit with a place: jacobian:FILE, tuned:FOLDER, or on the Hub",
        "jacobian:owner/repository/path@revision.",
        "",
        "\b",
        *(f"{name:<{width}}  {text}" for name, text in LENSES.items()),
    ])  # fmt: skip


@click.command("lenses", help=_help())
@click.argument("run", type=Folder())
@click.option("--lens", "lenses", multiple=True, metavar="KIND[:PLACE]", help="Another lens that reads. Repeatable.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Maximum number of questions, spread over the paragraphs; each in all languages and settings of the run. "
    "[default: all]",
)
@click.option(
    "--figure",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw readiness under each lens, and the scripts of the top tokens (needs matplotlib).",
)
@with_streamable_model
@common
@click.pass_context
def command(
    context: click.Context, run: Path, lenses: tuple[str, ...], limit: int | None, figure: Path | None, as_json: bool,
    **options: Any,
) -> int:  # fmt: skip
    """Runs `xprobe lenses`; ``_help`` has the text for users."""
    from xprobe.evaluation import read_lenses
    from xprobe.results import Study
    from xprobe_cli.figures import check_figure
    from xprobe_cli.lens_tables import lenses_report
    from xprobe_cli.lenses_figure import save_figure

    if figure is not None:
        check_figure(figure)
    settings, given = LensesSettings(lenses, limit), of_run(context, options)

    def compute(progress: Any) -> Study:
        study = read_lenses(run, settings, progress=progress, **given)
        if figure is not None:
            save_figure(study, figure)
        return study

    return add_stage("lenses", compute, lenses_report, as_json=as_json)
