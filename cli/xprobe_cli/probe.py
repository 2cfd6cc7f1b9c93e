"""`xprobe probe`: train probes on a stored run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xprobe.config import BUILT_IN_PROBES, DEFAULT_PROBES, MAX_SEED, PROBES
from xprobe_cli.options import Folder, common, echo_json
from xprobe_cli.progress import Progress


def _help() -> str:
    """The text of `xprobe probe --help`, with one line for each built-in probe."""
    width = max(map(len, BUILT_IN_PROBES))
    lines = [f"{name:<{width}}  {description}" for name, description in BUILT_IN_PROBES.items()]
    return "\n".join([
        "Train probes on the hidden states in the run folder RUN, without the model.",
        "",
        "\b",
        *lines,
        "",
        "Each probe is scored on paragraphs that it was not trained on, and compared with a baseline and a control",
        "task. Results of a probe that was trained before are replaced.",
    ])  # fmt: skip


@click.command("probe", help=_help())
@click.argument("run", type=Folder())
@click.option(
    "--probe",
    "probes",
    multiple=True,
    type=click.Choice(list(PROBES)),
    help=f"Probe to train. Repeatable. [default: {', '.join(DEFAULT_PROBES)}]",
)
@click.option(
    "--folds",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Number of folds. A fold holds whole paragraphs.",
)
@click.option(
    "--components",
    "n_components",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Maximum number of principal components of a probe.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(min=0, min_open=True),
    default=0.1,
    show_default=True,
    help="Ridge penalty of the alignment probe, per training sample (not Krippendorff's alpha).",
)
@click.option(
    "--c",
    "C",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Inverse of the penalty of the logistic regressions.",
)
@click.option("--seed", type=click.IntRange(0, MAX_SEED), help="Seed of the control tasks. [default: the run's seed]")
@click.option(
    "--jobs",
    type=int,
    default=-1,
    show_default=True,
    help="Layers that are trained at the same time. -1: one per core.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, or a torch device (needs SCIPY_ARRAY_API=1).")
@common
def command(run: Path, probes: tuple[str, ...], seed: int | None, as_json: bool, **options: Any) -> None:
    """Runs `xprobe probe`; ``_help`` has the text for users."""
    from xprobe.probes.settings import ProbeSettings
    from xprobe.runs.folder import RunFolder
    from xprobe.study import train_probes
    from xprobe_cli.probe_tables import probe_report

    if seed is None:
        seed = RunFolder.open(run).read_finished().study.seed
    settings = ProbeSettings(seed=seed, **options)
    with Progress() as progress:
        study = train_probes(run, probes or None, settings, progress)
    if as_json:
        echo_json({"run_dir": str(study.path), "probes": _plain(study)})
    else:
        click.echo(probe_report(study))
    for warning in study.manifest.stages["probes"].warnings:
        click.echo(f"xprobe: {warning}", err=True)


def _plain(study: Any) -> list[dict[str, Any]]:
    rows = study.probes.to_dict("records")
    return [{name: None if value != value else value for name, value in row.items()} for row in rows]
