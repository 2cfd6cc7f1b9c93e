"""`xprobe run`: the main job."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from xprobe.config import (
    DEFAULT_MODEL,
    DEFAULT_PROBES,
    DEVICE_MAPS,
    DTYPES,
    MAX_SEED,
    MODEL_IN_MEMORY,
    PROBES,
    RECORDS_IN_MEMORY,
    SETTINGS,
    SIGNALS,
    Execution,
    StudyConfig,
    split_options,
)
from xprobe.errors import UsageError
from xprobe.runs.folder import RunFolder
from xprobe.runs.identity import study_to_load
from xprobe.runs.lock import LOCK, FolderLock
from xprobe.runs.manifest import Manifest
from xprobe.runs.places import study_here
from xprobe_cli.options import Folder, Names, common, echo_json, track_option, tracked
from xprobe_cli.progress import Progress
from xprobe_cli.stopping import EXIT_CODES, Stoppable, Stopped, resume_hint
from xprobe_cli.tables import counted


@click.command("run")
@click.argument("model", default=DEFAULT_MODEL)
@click.option(
    "--data",
    default="builtin",
    show_default=True,
    metavar="builtin|xquad|hf:NAME|DIR|FILE",
    help="Question set: the built-in one, XQuAD, a data set of the Hugging Face Hub (hf:google/xquad), a folder with "
    "one file per language, or one such file. Files are named NAME.<lang>.json or NAME.<lang>.jsonl, optionally with "
    ".gz, and hold SQuAD v1.1 or flat records (docs/data.md).",
)
@click.option(
    "--setting",
    "settings",
    multiple=True,
    type=click.Choice(list(SETTINGS)),
    default=("en-x",),
    show_default=True,
    help="en-x: context and answer in English, question in language x; x-x: all in language x. Repeatable.",
)
@click.option("--languages", type=Names(), help="Question languages, comma-separated. [default: all in the data]")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use N questions, each in every language, spread over paragraphs, four on each if possible (docs/data.md).",
)
@click.option(
    "--paragraphs",
    type=click.IntRange(min=1),
    metavar="P",
    help="Use at most P paragraphs. Replaces --limit (docs/data.md).",
)
@click.option(
    "--questions-per-paragraph",
    type=click.IntRange(min=1),
    metavar="Q",
    help="Use at most Q questions of each paragraph.",
)
@click.option(
    "--signals",
    type=Names(),
    metavar="NAMES",
    help=f"Signals to compute, comma-separated: {', '.join(SIGNALS)}. [default: all]",
)
@click.option(
    "--probes",
    type=Names(none=True),
    metavar="NAMES|none",
    help=f"Probes to train, comma-separated: {', '.join(PROBES)}. [default: {','.join(DEFAULT_PROBES)}]",
)
@click.option("--out", type=Folder(), help="Run folder. [default: a new one under runs/]")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --out. Options that are not given are those of the run, except --trust-remote-code and "
    "--allow-pickle. It keeps all finished shards.",
)
@click.option(
    "--template",
    default="auto",
    show_default=True,
    metavar="auto|chat|plain|FILE",
    help="Wording of the prompt. FILE is a TOML file (docs/prompts.md).",
)
@click.option(
    "--lens",
    default="logit",
    show_default=True,
    metavar="KIND[:PLACE]",
    help="Lens that is applied to the hidden states: logit, tuned:FOLDER, jacobian:FILE or regression:FILE "
    "(docs/lenses.md).",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="The model's dtype. auto: float32 on a CPU, the checkpoint's dtype elsewhere.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="A torch device: cpu, cuda, cuda:1, ... auto: a GPU if there is one.",
)
@click.option(
    "--device-map",
    type=click.Choice(DEVICE_MAPS),
    help="Spread a model that is too large for one device over all devices (docs/large-models.md).",
)
@click.option(
    "--tensor-parallel/--no-tensor-parallel", help="Share each layer among the processes that torchrun starts."
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    help="Maximum number of tokens in one forward pass. Choose less if memory runs out. [default: 4096, on a "
    "GPU 16384]",
)
@click.option("--backend", default="auto", show_default=True, help="Lens backend; `xprobe doctor` lists them.")
@click.option(
    "--bootstrap",
    type=click.IntRange(min=1),
    default=StudyConfig.bootstrap,
    show_default=True,
    help="Bootstrap draws for the 95% intervals.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, MAX_SEED),
    default=0,
    show_default=True,
    help="Seed of intervals, permutations and control tasks.",
)
@click.option(
    "--rows/--no-rows",
    "store_rows",
    default=True,
    show_default=True,
    help="Store the hidden states in the run folder. Encoding and probes need them.",
)
@click.option(
    "--stream/--no-stream",
    help="For models larger than memory: run all prompts block by block. The weights of each block are read once.",
)
@click.option(
    "--dry-run", is_flag=True, help="Show groups, saved tokens, and expected memory, disk and time. Run nothing."
)
@click.option("--strict", is_flag=True, help="Stop at a bad record instead of leaving it out.")
@click.option("--trust-remote-code/--no-trust-remote-code", help="Let the model run its own Python code.")
@click.option("--allow-pickle/--no-allow-pickle", help="Load weights from pickles. A pickle can run any code.")
@track_option
@common
@click.pass_context
def command(
    context: click.Context,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    track: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Measure the phase stability of MODEL, layer by layer, over parallel questions.

    MODEL is a Hugging Face id, a local folder, a .gguf file, or smollm2-135m (the default, a small real model).

    \b
    xprobe run
    xprobe run --data xquad --languages en,de,zh,th --limit 20
    xprobe run ./my-model --setting en-x --setting x-x --out runs/mine
    """
    if resume and out is None:
        raise click.UsageError("--resume needs --out: the folder of the run to continue")
    if resume and out is not None:
        options |= _options_of_run(context, out, options)
    what, how = split_options(options)
    config, execution = StudyConfig(**what), Execution(**how)
    if dry_run:
        return _show_forecast(config, execution, out if resume else None, as_json)
    from xprobe.capture import worker
    from xprobe.models import tensor_parallel
    from xprobe.study import default_out, run_config
    from xprobe_cli.tables import study_report

    tensor_parallel.check_launch(execution)
    if execution.tensor_parallel and tensor_parallel.rank_and_count()[0] > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides when to stop
        return worker.follow(execution)
    folder = out if out is not None else default_out(config)
    try:
        with Progress() as progress, Stoppable(progress) as stoppable, tensor_parallel.lead(execution):
            study = run_config(config, execution, out=folder, resume=resume, progress=tracked(stoppable, track))
    except Stopped as stopped:
        more = [flag for flag, given in (
            ("--trust-remote-code", execution.trust_remote_code), ("--allow-pickle", execution.allow_pickle),
            ("--json", as_json),
        ) if given]  # fmt: skip
        click.echo(f"xprobe: interrupted: {resume_hint(progress, folder, more)}", err=True)
        return EXIT_CODES[stopped.signal]
    if as_json:
        echo_json(study.to_dict())
    else:
        click.echo(study_report(study))
    for line in warnings(study.manifest):
        click.echo(line, err=True)
    return 0


def _show_forecast(config: StudyConfig, execution: Execution, resumed: Path | None, as_json: bool) -> int:
    """Prints the forecast of the whole run. ``resumed`` is the folder that already holds a part of it."""
    from xprobe.forecast import forecast
    from xprobe_cli.forecasts import forecast_report

    result = forecast(config, execution)
    if resumed is not None and RunFolder(resumed).has_manifest():
        done = set(RunFolder(resumed).finished_shards())
        held = sum(RunFolder(resumed).shard_name(group.key) in done for group in result.groups)
        note = (
            f"these numbers are for the whole run; {resumed} already holds {held} of {len(result.groups)} shards, "
            "which are not computed again"
        )
        result = replace(result, notes=(*result.notes, note))
    if as_json:
        echo_json(result.to_dict())
    else:
        click.echo(forecast_report(result))
    return 0


def _options_of_run(context: click.Context, out: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """Options of the run in ``out``, changed by those that the command line gives; {} if there is no run."""
    if not RunFolder(out).has_manifest():
        if (out / LOCK).exists():
            with FolderLock(out):
                pass  # raises if another process is just starting a run here
        RunFolder.check(out, resume=True)  # a folder with something else in it is no place for a new run
        if context.get_parameter_source("model") is ParameterSource.DEFAULT:
            raise UsageError(f"{out} holds no run to resume: to begin one there, name the MODEL")
        return {}
    folder = RunFolder.open(out)
    manifest = folder.read_run()
    given = {name for name in chosen if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    bounds = {"paragraphs", "questions_per_paragraph"}
    if "limit" in given:
        given |= bounds  # they exclude each other, so those of the run must not be added
    elif bounds & given:
        given.add("limit")
    held = {"a model": manifest.model.kind, "questions": manifest.data.name}
    what = [name for name, value in held.items() if value in (MODEL_IN_MEMORY, RECORDS_IN_MEMORY)]
    if what:
        raise UsageError(
            f"the run in {out} was made with {' and '.join(what)} in memory, which only the script that made it has: "
            "resume it there, with xprobe.run(..., out=..., resume=True)"
        )
    states = manifest.stages.get("states")
    recorded = states.executions[-1].options if states is not None and states.executions else Execution()
    _, how = split_options({name: chosen[name] for name in given})
    begun = study_here(manifest) if "model" in given else study_to_load(manifest, out)
    study = {name: value for name, value in vars(begun).items() if name not in given}
    return {**study, **vars(recorded.resumed_with(how))}


def warnings(manifest: Manifest) -> list[str]:
    """Lines for stderr: the warnings of the run, and the records and examples that were left out."""
    lines = [f"xprobe: {warning}" for warning in manifest.warnings]
    for what, items in manifest.left_out.items():
        if items:
            left_out = counted(len(items), what.removesuffix("s"))
            lines.append(f"xprobe: {left_out} left out; the first: {items[0]} (all in manifest.json)")
    return lines
