"""`xprobe doctor`: what works on this machine."""

from __future__ import annotations

import platform

import click

from xprobe import __version__
from xprobe.doctor import diagnose
from xprobe_cli.options import common, echo_json


@click.command("doctor")
@common
def command(as_json: bool) -> int:
    """Show what works on this machine, and what each missing package would add.

    The exit code is 1 if the main job cannot run.
    """
    checks = diagnose()
    broken = [check for check in checks if check.needed and not check.ok]
    if as_json:
        echo_json({
            "xprobe": __version__,
            "python": platform.python_version(),
            "works": not broken,
            "checks": [vars(check) for check in checks],
        })  # fmt: skip
        return 1 if broken else 0
    click.echo(f"xprobe {__version__}, Python {platform.python_version()} on {platform.platform()}\n")
    for check in checks:
        mark = "ok" if check.ok else "MISSING" if check.needed else "-"
        click.echo(f"{mark:<8}{check.name:<22}{check.detail}")
    if broken:
        click.echo(f"\nThe main job cannot run: {', '.join(check.name for check in broken)}")
        return 1
    click.echo("\nThe main job runs here: xprobe run")
    return 0
