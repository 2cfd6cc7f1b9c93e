"""Options and parameter types that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from xprobe.events import Notify

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show the full traceback of an error.")


class Names(click.ParamType):
    """A comma-separated list of names. With ``none=True`` the word "none" is an empty list."""

    name = "name,name"

    def __init__(self, *, none: bool = False) -> None:
        self.none = none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        if self.none and value.strip() == "none":
            return ()
        names = tuple(part.strip() for part in value.split(","))
        if self.none and "none" in names:
            self.fail(f"{value!r}: 'none' stands alone; leave it out, or leave out the other names", param, ctx)
        if not all(names):
            self.fail(f"{value!r} is not a comma-separated list of names", param, ctx)
        return names


class Folder(click.Path):
    """A path, as ``click.Path``, but not the empty text, which would stand for the working directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == "":
            self.fail("is empty: name a folder", param, ctx)
        return super().convert(value, param, ctx)


track_option = click.option(
    "--track",
    metavar="trackio|wandb[:PROJECT]",
    help="Log stages, rates and results to an experiment tracker (docs/report.md). A tracker that fails stops nothing.",
)


def tracked(progress: Notify, track: str | None) -> Notify:
    """``progress``, which ``--track`` has logged as well."""
    if track is None:
        return progress
    from xprobe.report.tracking import Tracker

    return Tracker(track, then=progress)


def echo_json(value: Any) -> None:
    """Prints the one JSON object of ``--json``. It must not hold NaN."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False))


def help_without_command(context: click.Context) -> None:
    """Shows the help on stderr and exits with 2 if a group is called without a subcommand."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


def of_run(context: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user gave; the others stay those of the run."""
    return {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def with_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of commands that load the model of a run. ``of_run`` keeps those that the user gave."""
    return _with_model(command, "A streamed model cannot do this: --no-stream loads it whole.")


def with_streamable_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """As ``with_model``, for commands that can read the model block by block."""
    return _with_model(command, "Read the model block by block, or load it whole. [default: as the run]")


def _with_model(command: Callable[..., Any], about_stream: str) -> Callable[..., Any]:
    for option in reversed([
        click.option("--device", help="A torch device: cpu, cuda, cuda:1, ... [default: that of the run]"),
        click.option(
            "--batch-tokens",
            type=click.IntRange(min=1),
            help="Maximum number of tokens in one pass. [default: that of the run]",
        ),
        click.option("--stream/--no-stream", default=None, help=about_stream),
        click.option("--trust-remote-code", is_flag=True, help="Let the model run its own Python code."),
        click.option("--allow-pickle", is_flag=True, help="Load weights from pickles. A pickle can run any code."),
    ]):  # fmt: skip
        command = option(command)
    return command


def loads_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of commands that load a model that is named on the command line."""
    for option in reversed([
        click.option("--dtype", default="auto", show_default=True, help="A torch dtype: float32, bfloat16, ..."),
        click.option("--device", default="auto", show_default=True, help="A torch device: cpu, cuda, cuda:1, ..."),
        click.option("--trust-remote-code", is_flag=True, help="Let the model run its own Python code."),
        click.option("--allow-pickle", is_flag=True, help="Load weights from pickles. A pickle can run any code."),
    ]):  # fmt: skip
        command = option(command)
    return command


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--json`` and ``--debug`` to a command."""
    return json_option(debug_option(command))
