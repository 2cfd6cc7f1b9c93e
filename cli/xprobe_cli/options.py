"""Options and parameter types that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

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


def echo_json(value: Any) -> None:
    """Prints the one JSON object of ``--json``. It must not hold NaN."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False))


def help_without_command(context: click.Context) -> None:
    """Shows the help on stderr and exits with 2 if a group is called without a subcommand."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--json`` and ``--debug`` to a command."""
    return json_option(debug_option(command))
