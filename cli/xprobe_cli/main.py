"""The command group. It imports a subcommand only when it is called, so `xprobe --help` is quick."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module

import click

from xprobe import XprobeError, __version__
from xprobe_cli.options import help_without_command

COMMANDS = {  # name -> (module, one line for --help)
    "run": ("xprobe_cli.run", "Measure the phase stability of a model, layer by layer, over parallel questions."),
    "probe": ("xprobe_cli.probe", "Train probes on the stored states of a run, without the model."),
    "evaluate": ("xprobe_cli.evaluate", "Generate and score the answers of a run: F1, exact match, error types."),
    "oracle": ("xprobe_cli.oracle", "Find the words that each answer of a run depends on: could the model find it?"),
    "attribute": ("xprobe_cli.attribute", "Compute how much each token of a run matters at each layer (relevance)."),
    "patch": ("xprobe_cli.patch", "Find the layers of a run's model that use the question, and that hold the answer."),
    "lenses": ("xprobe_cli.lenses", "Read a run again by several lenses, and show its phases under each."),
    "sweep": ("xprobe_cli.sweep", "Run many models: here, on Ray or on Slurm; and compare them."),
    "compare": ("xprobe_cli.compare", "Compare several runs: metrics of each model, and how they correlate."),
    "report": ("xprobe_cli.report", "Write the page of a run: figures and tables in one HTML file."),
    "export": ("xprobe_cli.export", "Write the tables of a run as CSV, Parquet, or LaTeX."),
    "lens": ("xprobe_cli.lens", "Show what each layer of a model would say after one prompt."),
    "fit-lens": ("xprobe_cli.fit_lens", "Fit a regression or Jacobian lens for a model."),
    "data": ("xprobe_cli.data", "List, check and fetch question sets."),
    "bench": ("xprobe_cli.bench", "Measure speed, memory and error of the kernels, compared with plain torch."),
    "doctor": ("xprobe_cli.doctor", "Show what works on this machine, and what each missing package would add."),
}
INTERRUPTED = 130


class LazyGroup(click.Group):
    """Lists names and help lines of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return import_module(COMMANDS[name][0]).command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and (near := get_close_matches(args[0], COMMANDS)):
            raise click.UsageError(f"No such command {args[0]!r}. Did you mean {' or '.join(near)}?", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="xprobe")
@click.pass_context
def group(context: click.Context) -> None:
    """At which layer does a multilingual language model understand a question, and at which does it find the answer?

    `xprobe run` without arguments works on a small real model and a built-in question set.
    """
    help_without_command(context)


def let_threads_wait() -> None:
    """Lets waiting threads of OpenMP spin for microseconds, then sleep. Takes effect if torch is not imported yet.

    Patches of 48 pairs on 2 cores took 10.8 s in this way, 18.3 s if threads sleep at once, and 9.6 s if they spin for
    milliseconds, as GNU's OpenMP does by default; beside 2 other busy processes 24.4, 25.4 and 40.9 s.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        name, value = ("GOMP_SPINCOUNT", "10000") if sys.platform == "linux" else ("OMP_WAIT_POLICY", "PASSIVE")
        os.environ[name] = value


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 failed with a message, 2 bad usage, 130 interrupted, 143 terminated."""
    arguments = sys.argv[1:] if arguments is None else arguments
    let_threads_wait()
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the terminal lacks must not stop the command
    try:
        result = group.main(arguments, prog_name="xprobe", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "xprobe"
        _print_error(f"{' '.join(error.format_message().split())} (see {where} --help)")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _print_error("interrupted")
        return INTERRUPTED
    except XprobeError as error:
        if debug:
            raise
        _print_error(str(error))
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has closed the pipe
        return 1
    except OSError as error:
        if debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        _print_error(f"{error.strerror or error}{where} (a run that had finished is safe in its folder)")
        return 1
    except ModuleNotFoundError as error:
        if debug:
            raise
        _print_error(f"the package {error.name} is missing: `xprobe doctor` says how to install it")
        return 1
    except Exception as error:
        if debug:
            raise
        reason = " ".join(str(error).split())[:300]
        _print_error(f"unexpected {type(error).__name__}: {reason}. This is a fault in xprobe; --debug shows where")
        return 1


def _print_error(message: str) -> None:
    click.echo(f"xprobe: error: {message}", err=True)


def script() -> None:
    """Console entry point."""
    sys.exit(main())


if __name__ == "__main__":
    script()
