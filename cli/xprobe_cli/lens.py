"""`xprobe lens`: what each layer of a model would say after a prompt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from xprobe.lenses.settings import LENSES
from xprobe_cli.options import common, echo_json, loads_model

POSITIONS = ("last", "all", "answer")


def _help() -> str:
    """The text of `xprobe lens --help`, with one line for each kind of lens."""
    width = max(map(len, LENSES))
    return "\n".join([
        "Show what each layer of MODEL would say next, after PROMPT.",
        "",
        "The table shows the most probable tokens of every layer, and the rank and probability of an answer.",
        "",
        "Lenses (--lens); all but logit with a place: jacobian:FILE, tuned:FOLDER, or on the Hub",
        "jacobian:owner/repository/path@revision.",
        "",
        "\b",
        *(f"{name:<{width}}  {text}" for name, text in LENSES.items()),
    ])  # fmt: skip


@click.command("lens", help=_help())
@click.argument("model")
@click.argument("prompt")
@click.option("--answer", help='A continuation to follow, for example " Paris", with the space before the word.')
@click.option("--lens", default="logit", show_default=True, metavar="KIND[:PLACE]", help="Lens to apply.")
@click.option(
    "--positions", type=click.Choice(POSITIONS), default="last", show_default=True, help="Which tokens are read."
)
@click.option("--top", type=click.IntRange(1, 32), default=5, show_default=True, help="Number of top tokens per layer.")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="PAGE.html",
    help="Write a page of the positions that are read, with the --top tokens of each.",
)
@loads_model
@common
def command(
    model: str, prompt: str, answer: str | None, lens: str, positions: str, top: int, save: Path | None, as_json: bool,
    **options: Any,
) -> int:  # fmt: skip
    """Runs `xprobe lens`; ``_help`` has the text for users."""
    if save is not None and not save.parent.is_dir():
        raise click.UsageError(f"--save {save}: there is no folder {save.parent}")
    if positions == "answer" and answer is None:
        raise click.UsageError("--positions answer needs --answer")
    from xprobe.single_prompt.lens import lens_prompt

    found = lens_prompt(
        model, prompt, lens=lens, answer=answer, positions=positions, top=top, **options,
        notify=lambda message: click.echo(f"xprobe: {message}", err=True),
    )  # fmt: skip
    if save is not None:
        _write(save, found)
    if as_json:
        echo_json(found.to_dict())
    else:
        click.echo(found.to_text(shutil.get_terminal_size((100, 24)).columns))
    return 0


def _write(path: Path, found: Any) -> None:
    """Writes the page.

    Raises
    ------
    UsageError
        The file cannot be written.
    """
    from xprobe.errors import UsageError

    try:
        path.write_text(found.to_html(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    click.echo(f"xprobe: wrote {path}", err=True)
