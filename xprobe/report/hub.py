"""A run as a data set repository of the Hugging Face Hub: tables and a card, written to a folder and uploaded."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from xprobe.errors import UsageError, XprobeError
from xprobe.report.columns import TABLES, describe_column, describe_table
from xprobe.report.places import shown_name, shown_names, without_folders

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import HfApi

    from xprobe.results import Study

CARD, TAG = "README.md", "xprobe"
_NAMES_OF_FILES = ("lens",)  # columns that may hold the path of a file of this machine
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_FIGURES = ("alpha", "boundary", "relative_boundary", "spread")


def dataset_card(study: Study, license: str | None = None) -> str:
    """The card of a run: YAML for the Hub, then model, data, figures, versions, and what every column means.

    Absolute paths are cut to their last part. Nothing of the machine but its platform is named.

    Parameters
    ----------
    study : Study
    license : str, optional
        Its identifier at the Hub (``cc-by-4.0``). Left out: the card says that none was chosen.

    Raises
    ------
    UsageError
        ``license`` is no identifier.
    RunFolderError
        A table of the run is missing or was changed.

    Examples
    --------
    >>> import xprobe
    >>> dataset_card(xprobe.load_study("runs/demo")).splitlines()[0]  # doctest: +SKIP
    '---'
    """
    if license is not None and not (isinstance(license, str) and _LICENSE.fullmatch(license)):
        raise UsageError(f"license must be an identifier of the Hub such as cc-by-4.0, got {license!r}")
    manifest = study.manifest
    states = manifest.stages["states"]
    environment = states.executions[-1].environment if states.executions else {}
    model, data = shown_name(manifest.study.model), shown_name(manifest.data.name)
    shown_model, shown_data = escape(model, quote=False), escape(data, quote=False)  # a card is Markdown with HTML
    source = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, trim_blocks=True)
    template = source.from_string(files("xprobe.report").joinpath("card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        license=license,
        name=re.sub(r"[^\w. -]", "-", f"Phases of {Path(model).name}"),
        languages=sorted({str(one).replace("_", "-").partition("-")[0] for one in study.examples["language"]}),
        tables=[_describe(name, frame) for name, frame in tables(study).items()],
        model=shown_model,
        on_hub=manifest.model.kind == "hub",
        data=shown_data,
        manifest=manifest,
        figures=list(_figures(study)),
        study=json.dumps(without_folders(manifest.study.to_dict()), indent=1, ensure_ascii=False),
        versions=[("xprobe", environment.get("xprobe")), ("Python", environment.get("python")),
                  *environment.get("packages", {}).items(), ("platform", environment.get("platform"))],
        device=states.executions[-1].device if states.executions else "",
    )  # fmt: skip


def tables(study: Study) -> dict[str, pd.DataFrame]:
    """The tables of a run by name, without folders of this machine.

    Raises
    ------
    RunFolderError
        A table is missing or was changed.
    """
    found = {}
    for entry in study.manifest.stages.values():
        names = shown_names(entry.results.get("lenses", ()))  # two lenses may have one name without folders
        for name in entry.tables:
            frame = study.table(name)
            kept = {
                column: frame[column].map(lambda one, names=names: names.get(one, shown_name(one)))
                for column in _NAMES_OF_FILES
                if column in frame
            }
            found[Path(name).stem] = frame.assign(**kept)
    return found


def upload(
    study: Study,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    license: str | None = None,
) -> str:
    """Uploads a run to a data set repository of the Hugging Face Hub, which is made if it is not there.

    Tables of an earlier upload that this run lacks are removed; other files of the repository stay. A repository that
    holds files, but no card of xprobe, is refused.

    Parameters
    ----------
    study : Study
    repository : str
        ``NAME`` or ``OWNER/NAME``.
    private : bool
        Whether a new repository is private. One that is there keeps its visibility.
    revision : str, optional
        The branch, which is made if it is not there; ``main`` by default.
    message : str, optional
        Of the commit.
    license : str, optional
        As for ``dataset_card``.

    Returns
    -------
    str
        The address of the commit.

    Raises
    ------
    UsageError
        You are not logged in, may not write there, the name is none, or the repository holds something else.
    XprobeError
        The Hub cannot be reached, or refuses the upload.

    Examples
    --------
    >>> import xprobe
    >>> upload(xprobe.load_study("runs/demo"), "ada/phases", private=True)  # doctest: +SKIP
    'https://huggingface.co/datasets/ada/phases/commit/...'
    """
    from huggingface_hub import HfApi

    from xprobe.report.export import export

    with tempfile.TemporaryDirectory(prefix="xprobe-") as place:
        folder = Path(place) / "tables"
        export(study, folder, "hub", license=license)
        with _errors(repository):
            api = HfApi()
            made = api.create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
            _check_repository(api, made.repo_id, revision, Path(place) / "there")
            if revision:
                api.create_branch(made.repo_id, repo_type="dataset", branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=made.repo_id,
                repo_type="dataset",
                folder_path=folder,
                revision=revision,
                commit_message=message or "Tables of xprobe",
                delete_patterns=[f"{name}.parquet" for name in TABLES],  # no signs of patterns: at the root alone
            )
    return str(commit.commit_url)


def _check_repository(api: HfApi, name: str, revision: str | None, folder: Path) -> None:
    """Refuses a repository with files that are not an upload of xprobe. ``folder`` takes its card."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        held = api.list_repo_files(name, repo_type="dataset", revision=revision)
    except RevisionNotFoundError:  # a branch that will be made from the main one
        held, revision = api.list_repo_files(name, repo_type="dataset"), None
    if not set(held) - {".gitattributes"}:
        return
    if CARD in held:
        card = api.hf_hub_download(name, CARD, repo_type="dataset", revision=revision, local_dir=folder)
        if _is_ours(Path(card).read_text(encoding="utf-8", errors="replace")):
            return
    raise UsageError(
        f"{name!r} is there and holds files, but no card of xprobe: an upload could replace what is not a run of "
        "xprobe. Choose another name, which is made if it is not there"
    )


def _is_ours(card: str) -> bool:
    """Whether the card of a repository has the tag of xprobe."""
    import yaml  # type: ignore[import-untyped]  # huggingface_hub needs it

    head = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---\s*(?:\n|$)", card, re.DOTALL)
    try:
        said = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return False
    tags = said.get("tags") if isinstance(said, dict) else None
    return isinstance(tags, list) and TAG in tags


@contextmanager
def _errors(repository: str) -> Iterator[None]:
    """Turns what the Hub's client raises into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except XprobeError:
        raise
    except errors.HFValidationError as error:
        raise UsageError(f"{repository!r} is no name of a repository: write NAME or OWNER/NAME") from error
    except Exception as error:
        text = " ".join(str(getattr(error, "server_message", None) or error).split())[:300]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401 or isinstance(error, errors.LocalTokenNotFoundError):
            raise UsageError(
                "you are not logged in to the Hugging Face Hub, or your token is not valid: hf auth login, or set "
                "HF_TOKEN"
            ) from error
        if status == 403:
            raise UsageError(
                f"you may not write to {repository!r} ({text}): use a name of your own, or a token that may write"
            ) from error
        families = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, errors.OfflineModeIsEnabled) or families & {"TransportError", "TimeoutException"}:
            text = f"the Hub cannot be reached: {text}"
        raise XprobeError(f"the run was not uploaded to {repository!r}: {text or type(error).__name__}") from error


def _describe(name: str, frame: pd.DataFrame) -> dict[str, Any]:
    columns = [(str(column), describe_column(name, str(column))) for column in frame.columns]
    return {"name": name, "rows": len(frame), "about": describe_table(name), "columns": columns}


def _figures(study: Study) -> Iterator[tuple[str, str, str]]:
    """Setting, name and value with interval of the figures of a run."""
    answers = study.manifest.stages.get("answers")
    for setting, result in study.items():
        scores = answers.results["settings"][setting] if answers is not None else {}
        for name in (*_FIGURES, "f1", "exact_match"):
            estimate = {**result.summary, **scores}.get(name)
            if estimate is not None:
                value, *ends = (
                    "–" if estimate[part] is None else f"{estimate[part]:.3f}" for part in ("value", "lo", "hi")
                )
                yield setting, name, f"{value} [{', '.join(ends)}]"
