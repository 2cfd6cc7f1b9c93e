"""The pipeline, top to bottom: data, prompts, plan, forward with capture, lens, store, phases, tables."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.config import DEFAULT_MODEL, RECORDS_IN_MEMORY, StudyConfig
from xprobe.errors import DataError, ModelError, RunFolderError, UsageError, XprobeError
from xprobe.models import loading
from xprobe.qa.parallel import load_data
from xprobe.qa.records import Dataset, Example
from xprobe.qa.selection import Selection
from xprobe.qa.templates import Template, load_template
from xprobe.results import Study, load_study
from xprobe.runs.disk import check_writable
from xprobe.runs.folder import FORMAT, RunFolder
from xprobe.runs.identity import differences, other_device
from xprobe.runs.lock import LOCK, FolderLock
from xprobe.timing import Stopwatch

if TYPE_CHECKING:
    from xprobe.capture.engine import Engine
    from xprobe.capture.layerwise import LayerwiseEngine
    from xprobe.capture.plan import Group, Plan
    from xprobe.models.loading import LoadedModel
    from xprobe.qa.prompts import Prompt

# progress(stage, done, total): called from the thread of `run`; a total of 0 means "not known"
Progress = Callable[[str, int, int], None]

PARITY_PROMPTS = 4
STAGE = "forward and lens"


def run(
    model: Any = DEFAULT_MODEL,
    *,
    tokenizer: Any = None,
    data: Any = "builtin",
    setting: str | Iterable[str] = "en-x",
    languages: Iterable[str] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Study:
    """Runs a study and returns its results, which are also in its folder.

    Parameters
    ----------
    model : str, path or PreTrainedModel
        Alias, Hugging Face id, local folder or ``.gguf`` file; or a loaded transformers model, which is used as it is
        (dtype, device) and left as it was. The manifest identifies such a model by its configuration, its tokenizer,
        and a sample of every tensor.
    tokenizer : PreTrainedTokenizerBase, optional
        Of a loaded model; needed there, and only there.
    data : str, path, or records
        ``builtin``, ``xquad``, a folder of ``NAME.<lang>.json`` files or one such file; or records in memory: a list of
        dictionaries, a data frame, or a dictionary from language to one of these (docs/data.md).
    setting : str or iterable of str
        ``en-x``, ``x-x`` or both.
    languages : iterable of str, optional
        Question languages; all that the data holds if None.
    out : path, optional
        Run folder; a new one under ``runs/`` if None.
    resume : bool
        Continue the run in ``out``: what its shards hold is not computed again. A run of something else is refused.
    progress : callable (stage, done, total), optional
    **options
        Further fields of ``StudyConfig``: limit, template, dtype, device, seed, ...

    Raises
    ------
    XprobeError
        Says what is wrong, where, and what to do. Shards already written stay valid. A UsageError if another process
        or thread is at work in ``out``.
    """
    from xprobe.models import given

    loaded = None
    if not isinstance(model, str | os.PathLike):
        loaded = given.adopt(model, tokenizer)
        model = loaded.source.name
    elif tokenizer is not None:
        raise UsageError("tokenizer is for a model in memory: the model that is loaded by name has its own")
    if "settings" in options:
        raise UsageError("settings: xprobe.run calls it setting, which takes one or several")
    records = None
    if data is None:
        raise UsageError("data is None: leave it out for the built-in questions")
    if not isinstance(data, str | os.PathLike):
        records, data = data, RECORDS_IN_MEMORY
    settings = (setting,) if isinstance(setting, str) else tuple(setting)
    languages = None if languages is None else tuple([languages] if isinstance(languages, str) else languages)
    try:
        config = StudyConfig(
            model=os.fspath(model), data=os.fspath(data), settings=settings, languages=languages, **options
        )
    except TypeError as error:
        raise UsageError(
            f"{str(error).replace('StudyConfig.__init__()', 'xprobe.run()')}; see xprobe.StudyConfig"
        ) from error
    return run_config(config, out=out, resume=resume, progress=progress, loaded=loaded, records=records)


def run_config(
    config: StudyConfig,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    loaded: LoadedModel | None = None,
    records: Any = None,
) -> Study:
    """``run`` with a configuration made beforehand.

    ``loaded`` (``xprobe.models.given.adopt``) and ``records`` stand for what the configuration can only name.
    """
    folder = Path(out) if out is not None else default_out(config)
    if loaded is None:
        return _Run(config, folder, resume, progress or _no_progress, records=records).go()
    from xprobe.models.given import borrowed, check_options

    check_options(config)
    with borrowed(loaded.model):
        return _Run(config, folder, resume, progress or _no_progress, loaded, records).go()


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


def read_questions(config: StudyConfig, records: Any = None) -> tuple[Template, Dataset, list[Example], Selection]:
    """Template, data, examples and their selection, as a configuration asks for; ``records`` replace its data.

    Raises
    ------
    UsageError, DataError
        The template or the data cannot be read, or holds none of what is asked for.
    """
    template = load_template(config.template)
    needed = ("en",) if "en-x" in config.settings else ()
    source = config.data if records is None else records
    bounds = {name: getattr(config, name) for name in ("limit", "paragraphs", "questions_per_paragraph")}
    limited = any(bounds.values())
    data = load_data(source, config.languages, strict=config.strict, needed=needed, with_reference=limited)
    examples, selection = data.select(config.settings, config.languages, **bounds)
    if not examples:
        raise DataError(f"{config.data} holds no question for {', '.join(config.settings)} in these languages")
    return template, data, examples, selection


def default_out(config: StudyConfig) -> Path:
    """A new folder under ``runs/``, named after model, settings and time."""
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(config.model).name) or "model"
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{stem}_{'+'.join(config.settings)}_{now}"


@dataclass
class _Run:
    config: StudyConfig
    out: Path
    resume: bool
    progress: Progress
    loaded: LoadedModel | None = None  # a model that the caller has in memory
    records: Any = None  # and questions
    watch: Stopwatch = field(default_factory=Stopwatch)
    template: Template = field(init=False)
    selection: Selection = field(init=False)
    told: Exception | None = None  # what the caller's ``progress`` raised

    def go(self) -> Study:
        check_writable(self.out)
        if not (self.out / LOCK).exists():  # else who works there is the better answer than what lies there
            RunFolder.check(self.out, resume=self.resume)
        with FolderLock(self.out) as lock:
            if lock.remark:
                self.progress(lock.remark, 0, 0)
            RunFolder.check(self.out, resume=self.resume)
            return self._go()

    def _go(self) -> Study:
        started = time.perf_counter()
        from xprobe.stages.phases import analyse

        config = self.config
        self.template, data, examples, self.selection = read_questions(config, self.records)
        source = loading.resolve(config.model) if self.loaded is None else self.loaded.source
        identity = self._identity(source, data)
        before, finished = self._earlier(identity)
        if finished:
            self.progress(f"{self.out} holds the finished run: shown from its files", 0, 0)
            manifest, folder = before, RunFolder.open(self.out)
        else:
            manifest, folder = self._compute(source, data, examples, identity, before)
        stale = _stale(folder) if finished else None
        if stale:
            self.progress(f"tables are written again from the shards: {stale}", 0, 0)
        if stale or not finished:
            manifest = analyse(config, manifest, folder, self.watch.seconds, self.progress)
        if not finished:
            self.watch.add("total", time.perf_counter() - started)
            manifest["timings"] = {name: round(seconds, 3) for name, seconds in self.watch.seconds.items()}
        folder.tidy(manifest["groups"])
        manifest["status"] = "done"
        folder.write_manifest(manifest)
        return load_study(folder.path)

    # -- what the run is made of, and whether it is the one in the folder ------------------------------------

    def _identity(self, source: loading.Source, data: Dataset) -> dict[str, Any]:
        from xprobe.models.given import IDENTITY

        with self.watch.timed("fingerprints"):
            model = {
                "name": source.name,
                "kind": source.kind,
                "location": source.location,
                "files_sha256": source.fingerprint(),
            }
            if self.loaded is not None:
                model["identity"] = IDENTITY
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "model": model,
            "data": {"name": data.name, "files": list(data.files), "files_sha256": data.fingerprint},
            "template_sha256": hashlib.sha256(repr(self.template).encode()).hexdigest(),
        }

    def _earlier(self, identity: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Manifest of the run to continue ({} if none), and whether it is finished and all of it still there.

        Raises
        ------
        UsageError
            The run was made of something else: names every difference.
        """
        if not self.resume:
            return {}, False
        folder = RunFolder.create(self.out, resume=True)
        if not folder.has_manifest():
            return {}, False
        manifest = folder.read_run()
        found = differences(manifest, identity)
        finished = folder.is_finished(manifest)
        if not finished and not found:
            found = other_device(manifest, self._device())
        if found:
            raise UsageError(f"cannot resume {self.out}: {'; '.join(found)}. Choose another --out")
        return manifest, finished

    def _device(self) -> str:
        """The device as asked for; that of a model in memory."""
        if self.loaded is None:
            return self.config.device
        from xprobe.models.anatomy import input_device

        return str(input_device(self.loaded.model))

    # -- forward, lens, shards -------------------------------------------------------------------------------

    def _compute(
        self, source: loading.Source, data: Dataset, examples: list[Example], identity: dict[str, Any],
        before: dict[str, Any],
    ) -> tuple[dict[str, Any], RunFolder]:  # fmt: skip
        from xprobe.capture.plan import group_prompts
        from xprobe.models.parity import COARSE
        from xprobe.qa.prompts import build_prompts
        from xprobe.stages.describe import describe_model, describe_work

        config = self.config
        self.progress("loading the model", 0, 0)
        with self.watch.timed("load"):
            engine, tokenizer = self._open(source)
        window = loading.window(engine.model.config)
        self.progress("building prompts", 0, 0)
        with self.watch.timed("prompts"):
            prompts, skipped = build_prompts(examples, tokenizer, self.template, window)
        if not prompts:
            raise DataError(f"none of {len(examples)} examples can be used, the first: {skipped[0]}")
        _check_vocabulary(prompts, engine.anatomy.head.vocab_size, source.name)
        groups = group_prompts(prompts)
        with self._failing(lambda: f"what {self.out} holds stays"):
            with self.watch.timed("parity"):
                parity = engine.check(_shortest_and_longest(prompts, PARITY_PROMPTS), config.backend)
                if parity is not None and parity > COARSE:
                    engine.warn(
                        f"rounding changes log-probabilities by up to {parity:.2g} nats: --dtype float32 is finer"
                    )
            with self.watch.timed("check of sharing"):
                engine.settle(_sample(groups))
        plan = engine.plan(groups)
        self.progress(f"shared beginnings save {plan.saved:.0%} of {plan.tokens} tokens", 0, 0)
        folder = RunFolder.create(self.out, resume=self.resume)
        manifest: dict[str, Any] = {
            **identity,
            **describe_work(prompts, skipped, data, plan, config, self.template, tokenizer),
            "model": {**identity["model"], **describe_model(engine.model, engine.anatomy, window)},
            "parity_error": parity,
            **{name: before[name] for name in ("created", "probes") if name in before},
        }
        folder.write_manifest(manifest)
        self._compute_waves(engine, plan, folder)
        way = {} if engine.way == plan.way else engine.plan(groups).to_dict()  # a sweep found out that it must change
        kernel = engine.kernel and engine.way == "tree"
        manifest["plan"] |= {**way, "batch_tokens": plan.batch_tokens, "attention_kernel": kernel}
        manifest["plan"]["remarks"] = engine.remarks
        return {**manifest, "parity_error": engine.parity_error}, folder

    def _open(self, source: loading.Source) -> tuple[Engine | LayerwiseEngine, Any]:
        """The engine that runs the model, whole or block by block, and the model's tokenizer."""
        from xprobe_kernels import available_backends

        from xprobe.capture.engine import Engine
        from xprobe.models.anatomy import inspect

        config = self.config
        backends = available_backends(loading.pick_device(self._device()))
        if config.backend not in ("auto", *backends):
            raise UsageError(f"unknown backend {config.backend!r}; available here: auto, {', '.join(backends)}")

        def say(message: str) -> None:
            self.progress(message, 0, 0)

        heard: list[str] = []  # of transformers, while it reads weights and tokenizer
        engine: Engine | LayerwiseEngine
        if config.stream:
            from xprobe.capture.layerwise import LayerwiseEngine
            from xprobe.models.streaming.streamed import open_streamed

            trust = config.trust_remote_code
            streamed = open_streamed(config.model, config.dtype, config.device, trust_remote_code=trust, heard=heard)
            tokenizer = loading.load_tokenizer(source, config, heard)
            engine = LayerwiseEngine(streamed, config.batch_tokens, self.out, say, self.progress)
        else:
            loaded = self.loaded or loading.load(source, config, heard)
            tokenizer = loaded.tokenizer
            engine = Engine(loaded.model, inspect(loaded.model), config.batch_tokens, say)
        for message in heard:
            engine.warn(message)
        return engine, tokenizer

    def _compute_waves(self, engine: Engine | LayerwiseEngine, plan: Plan, folder: RunFolder) -> None:
        from xprobe.stages.waves import run_waves

        have = set(folder.finished_shards())
        todo = {g.key for wave in plan.waves for g in wave.groups if folder.shard_name(g.key) not in have}
        total = sum(len(wave.prompts) for wave in plan.waves)
        done = total - sum(len(g.prompts) for wave in plan.waves for g in wave.groups if g.key in todo)

        def written(count: int) -> None:
            nonlocal done
            done += count
            try:
                self.progress(STAGE, done, total)
            except Exception as error:  # the caller's, and no failure of the run
                self.told = error
                raise

        written(0)
        with self._failing(lambda: f"{done} of {total} examples are kept in {self.out}"):
            run_waves(
                engine, plan, todo, folder, self.watch, written,
                backend=self.config.backend, store_rows=self.config.store_rows,
            )  # fmt: skip

    @contextmanager
    def _failing(self, kept: Callable[[], str]) -> Iterator[None]:
        """Turns what the machine or a model's own code raises into an error that says what is kept."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if error is self.told:
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise XprobeError(
                f"the run failed: {reason}. {kept()}; if memory ran out, add --resume and a smaller --batch-tokens"
            ) from error


def _stale(folder: RunFolder) -> str | None:
    """What is wrong with the tables of a finished run; None if nothing is."""
    try:
        load_study(folder.path)
    except RunFolderError as error:
        return str(error)
    return None


def _shortest_and_longest(prompts: list[Prompt], count: int) -> list[Prompt]:
    """``count`` prompts (all if fewer): half of them the shortest, half the longest, so that padding is at work."""
    by_length = sorted(prompts, key=lambda prompt: len(prompt.ids))
    return by_length if len(by_length) <= count else [*by_length[: count // 2], *by_length[-(count - count // 2) :]]


def _sample(groups: list[Group]) -> list[Prompt]:
    """A few prompts with a common beginning, the longest of all among them, and one of another group."""
    longest = max(groups, key=lambda group: max(len(prompt.ids) for prompt in group.prompts))
    by_length = sorted(longest.prompts, key=lambda prompt: len(prompt.ids))
    chosen = {0: by_length[0], 1: by_length[len(by_length) // 2], 2: by_length[-1]}
    others = [group for group in groups if group is not longest]
    return [*{id(p): p for p in chosen.values()}.values(), *(other.prompts[0] for other in others[:1])]


def _check_vocabulary(prompts: list[Prompt], size: int, name: str) -> None:
    largest = max(max(prompt.ids) for prompt in prompts)
    if largest >= size:
        raise ModelError(
            f"the tokenizer of {name} gives token id {largest}, the model knows {size}: the two do not belong together"
        )
