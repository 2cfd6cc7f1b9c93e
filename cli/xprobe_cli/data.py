"""`xprobe data list | check | fetch`: the question sets."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from xprobe.errors import XprobeError
from xprobe.qa.fetch import XQUAD_URL, fetch_xquad
from xprobe.qa.parallel import XQUAD_LANGUAGES, load_data
from xprobe_cli.options import Names, common, echo_json, help_without_command
from xprobe_cli.tables import counted


@click.group("data", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Question sets: list, check, fetch."""
    help_without_command(context)


@command.command("list")
@common
def list_sets(as_json: bool) -> None:
    """List the sets that `--data` knows by name, with their languages and sizes."""
    sets = []
    for name in ("builtin", "xquad"):
        try:
            data = load_data(name)
            paragraphs = {record.paragraph for records in data.records.values() for record in records.values()}
            entry: dict[str, Any] = {"name": name, "languages": list(data.languages), "questions": len(data.ids)}
            sets.append({**entry, "paragraphs": len(paragraphs), "missing": None})
        except XprobeError as error:
            sets.append({"name": name, "languages": [], "questions": 0, "paragraphs": 0, "missing": str(error)})
    if as_json:
        echo_json({"sets": sets})
        return
    for entry in sets:
        size = (
            f"{counted(entry['questions'], 'question')} on {counted(entry['paragraphs'], 'paragraph')} in "
            f"{' '.join(entry['languages'])}"
        )
        click.echo(f"{entry['name']:<8}  {entry['missing'] or size}")
    click.echo(
        "\nYour own folder works as well: xprobe run --data FOLDER. It holds one file per language, "
        "NAME.<lang>.json or\nNAME.<lang>.jsonl, optionally with .gz, in SQuAD v1.1 format or with flat records "
        "(docs/data.md). A data set of the\nHugging Face Hub is named hf:NAME: xprobe run --data hf:google/xquad."
    )


@command.command("check")
@click.argument("data")
@click.option("--languages", type=Names(), help="Check only these languages, comma-separated.")
@click.option("--strict", is_flag=True, help="Stop at the first problem.")
@common
def check(data: str, languages: tuple[str, ...] | None, strict: bool, as_json: bool) -> int:
    """Validate every record of DATA: builtin, xquad, hf:NAME, a folder, or one file. The exit code is 1 if there are
    problems.

    Files are named NAME.<lang>.json or NAME.<lang>.jsonl, optionally with .gz, and hold SQuAD v1.1 or flat records
    (docs/data.md).
    """
    dataset = load_data(data, languages, strict=strict)
    if as_json:
        echo_json({
            "data": data,
            "files": list(dataset.files),
            "revision": dataset.revision,
            "questions": {language: len(records) for language, records in dataset.records.items()},
            "problems": [vars(problem) for problem in dataset.problems],
        })  # fmt: skip
        return 1 if dataset.problems else 0
    for problem in dataset.problems:
        click.echo(str(problem))
    for language, records in dataset.records.items():
        click.echo(f"{language}  {counted(len(records), 'usable question')}")
    reasons = Counter(problem.reason for problem in dataset.problems)
    kinds = "; ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    click.echo(f"{counted(len(dataset.problems), 'problem')}{': ' + kinds if kinds else ''}")
    return 1 if dataset.problems else 0


@command.command("fetch")
@click.argument("name", type=click.Choice(["xquad"]), metavar="xquad")
@click.option(
    "--languages", type=Names(), default=XQUAD_LANGUAGES, help="Download only these languages. [default: all 12]"
)
@click.option("--url", default=XQUAD_URL, show_default=True, help="Address of the xquad.<lang>.json files.")
@click.option("--force", is_flag=True, help="Download again files that exist.")
@common
def fetch(name: str, languages: tuple[str, ...], url: str, force: bool, as_json: bool) -> None:
    """Download a set into the cache. The licence of XQuAD is CC BY-SA 4.0."""
    counts: dict[str, int] = {}

    def report(language: str, questions: int) -> None:
        counts[language] = questions
        if not as_json:
            click.echo(f"{language}  {counted(questions, 'question')}", err=True)

    folder = fetch_xquad(languages, url=url, force=force, report=report)
    if as_json:
        echo_json({"folder": str(folder), "questions": counts})
    else:
        click.echo(f"{folder}\nuse it with: xprobe run --data {name}")
