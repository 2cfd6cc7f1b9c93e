"""Reads question sets with the package ``datasets``: from the Hugging Face Hub, or from a folder in its layout."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from xprobe.errors import DataError, UsageError
from xprobe.qa.codes import is_code
from xprobe.qa.hub_names import LANGUAGE, SPLITS, HubName, languages_of, patterns_in
from xprobe.qa.memory import LANGUAGE_KEYS, read_records
from xprobe.qa.records import Problem
from xprobe.qa.validation import Collector

_HASH = re.compile(r"[0-9a-f]{40}")
_SHOWN = 12  # configurations that a message names
_TIMEOUT = 30  # seconds
_MOST_FILES = 10_000  # in a folder: ``datasets`` looks at every one, for hours in a home folder


@dataclass(frozen=True)
class HubRecords:
    """What was read: records by language, what was left out, which parts, and the commit that holds them.

    ``revision`` is the hash of the commit; ``""`` for a folder on this machine.
    """

    collected: dict[str, Collector]
    problems: list[Problem]
    parts: tuple[str, ...]
    revision: str


def read_hub(spec: str, choose: Callable[[list[str]], list[str]], revision: str = "") -> HubRecords:
    """Reads the data set that ``spec`` names, with as few downloads as its layout allows.

    Languages come from ``language=``, from the names of configurations, from the names of splits, or from a column
    ``language`` (or ``lang``): the first of these that there is.

    Parameters
    ----------
    spec : str
        ``xprobe.qa.hub_names.SYNTAX``.
    choose : callable
        Gives the languages to read of those that there are.
    revision : str
        The commit to read if ``spec`` names no revision.

    Raises
    ------
    UsageError
        No such data set, revision, configuration, split or column; no access; ``datasets`` is not installed.
    DataError
        The Hub cannot be reached, or its files cannot be read.

    Examples
    --------
    >>> read_hub("hf:google/xquad", lambda languages: ["en"]).parts  # doctest: +SKIP
    ('xquad.en/validation',)
    >>> read_hub("hf:google/xquad,branch=main", list)
    Traceback (most recent call last):
    xprobe.errors.UsageError: 'hf:google/xquad,branch=main': unknown part 'branch=main'; write hf:NAME[,config=...
    """
    source = _Source.open(HubName.from_text(spec), revision)
    pattern = source.pattern()
    if LANGUAGE in pattern:
        configs = languages_of(source.configs, pattern)
        if not configs:
            raise source.error(f"has no configuration like {pattern!r}; it has {_few(source.configs)}")
        loaded = {language: source.load(configs[language]) for language in choose(list(configs))}
        revisions = [_commit(splits) for splits in loaded.values()]
        held: Any = {language: source.split(splits, configs[language])[1] for language, splits in loaded.items()}
        parts = [f"{configs[lang]}/{source.split(splits, configs[lang])[0]}" for lang, splits in loaded.items()]
    else:
        splits = source.load(pattern)
        revisions = [_commit(splits)]
        by_split = not source.name.split and not source.name.language and _are_languages(list(splits))
        if by_split:
            held = {language: splits[language] for language in splits}
            parts = [f"{pattern}/{language}" for language in splits]
        else:
            split, held = source.split(splits, pattern)
            parts = [f"{pattern}/{split}"]
            if source.name.language:
                held = {source.name.language: held}
            elif not any(key in held.column_names for key in LANGUAGE_KEYS):
                raise source.error(
                    f"does not say which language it is in: add language=CODE, or config= with {LANGUAGE} where the "
                    f"language stands. It has the configurations {_few(source.configs)}; {pattern!r} has the columns "
                    f"{', '.join(held.column_names)}"
                )
    collected, problems = read_records(held, spec)
    kept = choose(list(collected))
    if len(set(revisions) - {""}) > 1:
        raise DataError(
            f"the cache holds the configurations of {source.name.name!r} at several commits ({', '.join(revisions)}): "
            "try again with a network, which reads all at one, or name revision="
        )
    revision = source.revision if _HASH.fullmatch(source.revision) else revisions[0]
    return HubRecords({one: collected[one] for one in kept}, problems, tuple(parts), revision)


@dataclass(frozen=True)
class _Source:
    """A data set whose revision and configurations are known."""

    name: HubName
    place: str  # what ``datasets`` loads: a name, or a folder
    revision: str
    configs: tuple[str, ...]
    from_cache: bool = False  # the Hub cannot be reached

    @classmethod
    def open(cls, name: HubName, revision: str) -> _Source:
        datasets = _package()
        path = Path(os.path.expanduser(name.name))
        if path.is_dir():
            if name.revision:
                raise UsageError(f"{path} is a folder on this machine, which has no revision: leave out revision=")
            _check_size(path)
            with _errors(name), _quiet(datasets):
                return cls(name, str(path), "", tuple(datasets.get_dataset_config_names(str(path))))
        wanted = name.revision or revision
        try:
            with _errors(name):
                sha = _resolve(name.name, wanted)
        except DataError:
            cached = _cached(datasets, name.name)
            if not cached:
                raise
            return cls(name, name.name, wanted, tuple(cached), from_cache=True)
        with _errors(name), _quiet(datasets):
            return cls(name, name.name, sha, tuple(datasets.get_dataset_config_names(name.name, revision=sha)))

    def error(self, what: str) -> UsageError:
        return UsageError(f"the data set {self.name.name!r} {what}")

    def pattern(self) -> str:
        """The configuration to read, with ``{lang}`` where the language stands if each language has its own."""
        if self.name.config:
            if LANGUAGE not in self.name.config and self.name.config not in self.configs:
                raise self.error(f"has no configuration {self.name.config!r}; it has {_few(self.configs)}")
            return self.name.config
        patterns = [] if self.name.language else patterns_in(self.configs)
        if len(patterns) == 1:
            return patterns[0]
        if len(self.configs) == 1:
            return self.configs[0]
        choices = patterns or self.configs
        raise self.error(f"has several configurations: choose one with config=, of {_few(choices)}")

    def load(self, config: str) -> Any:
        """All splits of a configuration, by name."""
        datasets = _package()
        with _errors(self.name), _quiet(datasets, offline=self.from_cache):
            splits = datasets.load_dataset(self.place, config, revision=self.revision or None)
        commit = _commit(splits)
        if commit and _HASH.fullmatch(self.revision) and commit != self.revision:
            raise DataError(
                f"the Hub cannot be reached, and the cache holds {self.name.name!r} only at revision {commit}, not at "
                f"{self.revision}: try again with a network"
            )
        return splits

    def split(self, splits: Any, config: str) -> tuple[str, Any]:
        """The split that was asked for, or the only one, and its name."""
        wanted, there = self.name.split, list(splits)
        if wanted:
            if wanted not in there:
                raise self.error(f"has no split {wanted!r} in {config!r}; it has {', '.join(there)}")
            return wanted, splits[wanted]
        if len(there) != 1:
            raise self.error(f"has several splits in {config!r}: choose one with split=, of {', '.join(there)}")
        return there[0], splits[there[0]]


def _check_size(folder: Path) -> None:
    """Refuses a folder that holds far more than a data set."""
    files = (file for _, _, files in os.walk(folder) for file in files)
    if next(islice(files, _MOST_FILES, None), None) is not None:
        raise UsageError(f"{folder} holds more than {_MOST_FILES:,} files: name the folder of the data set alone")


def _commit(splits: Any) -> str:
    """The hash of the commit that loaded splits are of: the cache of ``datasets`` has a folder for each."""
    names = [Path(file["filename"]).parent.name for split in splits.values() for file in split.cache_files]
    return next((name for name in names if _HASH.fullmatch(name)), "")


def _are_languages(splits: Sequence[str]) -> bool:
    return len(splits) > 1 and all(is_code(split) and split not in SPLITS for split in splits)


def _package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "data sets of Hugging Face need the package datasets: pip install 'xprobe[datasets]'"
        ) from error
    return datasets


def _resolve(name: str, revision: str) -> str:
    """The hash of the commit that a revision names; of the newest one without a revision."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=revision or None, timeout=_TIMEOUT).sha or ""


def _cached(datasets: Any, name: str) -> dict[str, str]:
    """Configuration -> revision, of those that ``datasets`` keeps in its cache from an earlier time."""
    from datasets.naming import camelcase_to_snakecase

    owner, slash, last = name.rpartition("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}{'___' if slash else ''}{camelcase_to_snakecase(last)}"
    return {path.parent.parent.name: path.name for path in sorted(folder.glob("*/*/*")) if path.is_dir()}


@contextmanager
def _quiet(datasets: Any, *, offline: bool = False) -> Iterator[None]:
    """Without the progress bars of ``datasets``, and without its tries to reach the Hub. Undone afterwards."""
    hidden, was_offline = datasets.are_progress_bars_disabled(), datasets.config.HF_HUB_OFFLINE
    datasets.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = was_offline or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        if not hidden:
            datasets.enable_progress_bars()


@contextmanager
def _errors(name: HubName) -> Iterator[None]:
    """Turns what the two packages raise into one line that says what to do."""
    from huggingface_hub import errors

    what = f"the data set {name.name!r}"
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        if "is a gated dataset" in text or isinstance(error, errors.GatedRepoError):
            raise UsageError(
                f"{what} is gated: ask for access on its page at the Hub, then log in (hf auth login) or set HF_TOKEN"
            ) from error
        if isinstance(error, errors.RevisionNotFoundError):
            raise UsageError(f"{what} has no revision {name.revision!r}: name a branch, a tag or a commit") from error
        if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            raise UsageError(
                f"{what} is not on the Hub, or is private, and is no folder here: check the name; if it is private, "
                "log in (hf auth login) or set HF_TOKEN"
            ) from error
        if "scripts are no longer supported" in text:
            raise UsageError(
                f"{what} is read by a Python script, which the package datasets no longer runs: load "
                "its files by hand, and give them as files or as records (docs/data.md)"
            ) from error
        if _is_network(error):
            raise DataError(
                f"cannot read {what} ({text}): try again with a network. What was read once is kept, and is used again "
                "without one"
            ) from error
        if isinstance(error, MemoryError | KeyboardInterrupt):
            raise
        raise DataError(f"{what} cannot be read: {text or type(error).__name__}") from error


def _is_network(error: BaseException) -> bool:
    """Whether the Hub could not be reached, or did not do what was asked."""
    import huggingface_hub

    network = (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.OfflineModeIsEnabled, ConnectionError)
    families = {kind.__name__ for kind in type(error).__mro__}  # httpx and httpx2 name theirs alike
    return isinstance(error, network) or bool(families & {"TransportError", "TimeoutException"})


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
