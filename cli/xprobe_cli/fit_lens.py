"""`xprobe fit-lens`: fits a transport for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xprobe.lenses.settings import FITTED, LENSES, TARGETS, FitSettings
from xprobe_cli.options import common, echo_json, loads_model
from xprobe_cli.progress import Progress
from xprobe_cli.stopping import EXIT_CODES, Stoppable, Stopped


def _help() -> str:
    """The text of `xprobe fit-lens --help`, with one line for each kind."""
    width = max(map(len, FITTED))
    return "\n".join([
        "Fit a lens for MODEL on a text, and write it to a file in the format of published Jacobian lenses.",
        "",
        "The table shows for every layer how well the maps of both halves of the text agree. A Jacobian lens needs",
        "many passes back through the model for each text; a command that was stopped goes on where it was.",
        "",
        "Kinds (--kind):",
        "",
        "\b",
        *(f"{name:<{width}}  {LENSES[name]}" for name in FITTED),
    ])  # fmt: skip


@click.command("fit-lens", help=_help())
@click.argument("model")
@click.option("--kind", type=click.Choice(FITTED), default=FitSettings.kind, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE.pt", help="The file to write.")
@click.option(
    "--text",
    default="builtin",
    show_default=True,
    metavar="FILE",
    help="A UTF-8 file, texts with blank lines between; builtin: contexts of the built-in set in 12 languages.",
)
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    default=FitSettings.target,
    show_default=True,
    help="What the maps lead to: the output of the last block, or of the one before it.",
)
@click.option("--texts", type=click.IntRange(min=2), help="Maximum number of texts. [default: all]")
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=FitSettings.tokens,
    show_default=True,
    help="Maximum number of tokens of a text.",
)
@loads_model
@common
def command(
    model: str, kind: str, out: Path, text: str, target: str, texts: int | None, tokens: int, as_json: bool,
    **options: Any,
) -> int:  # fmt: skip
    """Runs `xprobe fit-lens`; ``_help`` has the text for users."""
    from xprobe.lenses.fit import fit_lens

    settings = FitSettings(kind, target, texts, tokens)
    try:
        with Progress() as progress, Stoppable(progress) as stoppable:
            fitted = fit_lens(model, out, settings, text=text, **options, progress=stoppable)
    except Stopped as stopped:
        click.echo("xprobe: interrupted: what was computed is kept; the same command goes on", err=True)
        return EXIT_CODES[stopped.signal]
    if as_json:
        rows: list[Any] = fitted.table.reset_index().to_dict("records")
        echo_json({"lens": fitted.name, "texts": fitted.texts, "tokens": fitted.tokens, "layers": rows})
    else:
        click.echo(f"{kind} lens of {model} · {fitted.texts} texts, {fitted.tokens:,} tokens · target {target}\n")
        click.echo(fitted.table.round(3).to_string())
        click.echo(f"\nuse it   --lens {fitted.name}")
    if fitted.warning:
        click.echo(f"xprobe: {fitted.warning}", err=True)
    return 0
