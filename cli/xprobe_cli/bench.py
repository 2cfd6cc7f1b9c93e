"""`xprobe bench`: speed, memory and error of the kernels on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from xprobe_cli.kernel_bench import draw, measure
from xprobe_cli.options import debug_option, echo_json

STDOUT = "-"


@click.command("bench")
@click.option("--kernel", default="lens", show_default=True, metavar="lens|capture|all", help="What to measure.")
@click.option(
    "--shape",
    metavar="NAME|all",
    help="Head of which model. An unknown name lists all names. [default: all; two on a CPU]",
)
@click.option(
    "--rows", default="all", show_default=True, metavar="many|few|all", help="Many positions, few positions, or both."
)
@click.option("--rounds", type=click.IntRange(min=1), help="Number of rounds. [default: as many as fit in the time]")
@click.option("--dtype", default="bfloat16", show_default=True, help="The model's dtype: bfloat16, float16 or float32.")
@click.option("--backend", "backends", multiple=True, help="Measure this lens backend; repeatable. [default: all]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: torch's choice]")
@click.option("--quick", is_flag=True, help="Small shapes without torch.compile, only to check that everything works.")
@click.option("--kl", is_flag=True, help="Compute KL to the final layer as well.")
@click.option(
    "--rivals",
    is_flag=True,
    help="Measure other projects' fused linear cross entropy at its own task, beside the lens (pip install"
    " 'xprobe[rivals]', needs a GPU).",
)
@click.option(
    "--json",
    "target",
    is_flag=False,
    flag_value=STDOUT,
    metavar="[FILE]",
    help="Write the results to FILE. Without FILE print one JSON object on stdout and nothing else.",
)
@click.option(
    "--figure", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the roofline (needs matplotlib)."
)
@debug_option
def command(target: str | None, figure: Path | None, **settings: Any) -> int:
    """Measure speed, memory and error of the kernels, and compare them with plain torch.

    All variants take turns in one process. The table shows ratios before times. A result that exceeds its error bound
    is shown as WRONG and gets no time. Takes about two minutes on two CPU cores, and three on a GPU.

    \b
    xprobe bench
    xprobe bench --shape smollm2-135m --json bench.json --figure roofline.png
    """
    if target not in (None, STDOUT) and not Path(target).resolve().parent.is_dir():
        raise click.UsageError(f"--json: {Path(target).resolve().parent} is not a folder")
    result = measure(None if target == STDOUT else click.echo, figure=figure, **settings)
    if target == STDOUT:
        echo_json(result)
    elif target is not None:
        Path(target).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        click.echo(f"\n{target}")
    if figure is not None:
        draw(result, figure)
        if target != STDOUT:
            click.echo(str(figure))
    return 0
