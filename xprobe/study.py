"""The pipeline, top to bottom: data, prompts, plan, forward with capture, lens, store, phases, tables."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.config import DEFAULT_MODEL, StudyConfig
from xprobe.disk import check_writable
from xprobe.errors import DataError, ModelError, UsageError, XprobeError
from xprobe.identity import differences, other_device
from xprobe.lock import LOCK, FolderLock
from xprobe.models import loading
from xprobe.provenance import environment
from xprobe.qa.parallel import load_data
from xprobe.qa.records import Dataset, Example
from xprobe.qa.templates import Template, load_template
from xprobe.results import Study
from xprobe.store import EXAMPLES, FORMAT, LAYERS, MANIFEST, RunFolder

if TYPE_CHECKING:
    from xprobe.capture.plan import Group
    from xprobe.qa.prompts import Skipped

# progress(stage, done, total): called from the thread of `run`; a total of 0 means "not known"
Progress = Callable[[str, int, int], None]

PARITY_PROMPTS = 4


def run(
    model: str = DEFAULT_MODEL,
    *,
    data: str = "builtin",
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
    model : str
        Alias, Hugging Face id, local folder or ``.gguf`` file.
    data : str
        ``builtin``, ``xquad``, a folder of ``NAME.<lang>.json`` files or one such file.
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
    settings = (setting,) if isinstance(setting, str) else tuple(setting)
    languages = None if languages is None else tuple([languages] if isinstance(languages, str) else languages)
    try:
        config = StudyConfig(model=model, data=data, settings=settings, languages=languages, **options)
    except TypeError as error:
        raise UsageError(
            f"{str(error).replace('StudyConfig.__init__()', 'xprobe.run()')}; see xprobe.StudyConfig"
        ) from error
    return run_config(config, out=out, resume=resume, progress=progress)


def run_config(
    config: StudyConfig, *, out: str | Path | None = None, resume: bool = False, progress: Progress | None = None
) -> Study:
    """``run`` with a configuration made beforehand."""
    return _Run(config, Path(out) if out is not None else default_out(config), resume, progress or _no_progress).go()


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


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
    timings: dict[str, float] = field(default_factory=dict)
    template: Template = field(init=False)

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
        config = self.config
        self.template = load_template(config.template)
        needed = ("en",) if "en-x" in config.settings else ()
        data = load_data(config.data, config.languages, strict=config.strict, needed=needed)
        examples = data.examples(config.settings, config.languages, config.limit)
        if not examples:
            raise DataError(f"{config.data} holds no question for {', '.join(config.settings)} in these languages")
        source = loading.resolve(config.model)
        identity = self._identity(source, data)
        before, finished = self._earlier(identity)
        if finished:
            self.progress(f"{self.out} holds the finished run: shown from its files", 0, 0)
            manifest, folder = before, RunFolder.open(self.out)
        else:
            manifest, folder = self._compute(source, data, examples, identity)
        manifest = self._analyse(manifest, folder)
        if not finished:
            self.timings["total"] = time.perf_counter() - started
            manifest["timings"] = {name: round(seconds, 3) for name, seconds in self.timings.items()}
        folder.tidy(manifest["groups"])
        manifest["status"] = "done"
        folder.write_manifest(manifest)
        return Study(folder.path, manifest, folder.read_table(LAYERS), folder.read_table(EXAMPLES))

    # -- what the run is made of, and whether it is the one in the folder ------------------------------------

    def _identity(self, source: loading.Source, data: Dataset) -> dict[str, Any]:
        with self._timed("fingerprints"):
            model = {
                "name": source.name,
                "kind": source.kind,
                "location": source.location,
                "files_sha256": source.fingerprint(),
            }
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
        if not (folder.path / MANIFEST).is_file():
            return {}, False
        manifest = folder.read_run()
        found = differences(manifest, identity)
        finished = manifest["status"] == "done" and folder.manifest_is_untouched() and folder.holds(manifest["groups"])
        if not finished and not found:
            found = other_device(manifest, self.config.device)
        if found:
            raise UsageError(f"cannot resume {self.out}: {'; '.join(found)}. Choose another --out")
        return manifest, finished

    # -- forward, lens, shards -------------------------------------------------------------------------------

    def _compute(
        self, source: loading.Source, data: Dataset, examples: list[Example], identity: dict[str, Any]
    ) -> tuple[dict[str, Any], RunFolder]:
        from xprobe_kernels import available_backends

        from xprobe.capture.plan import group_prompts
        from xprobe.models.anatomy import inspect
        from xprobe.models.parity import check_parity
        from xprobe.qa.prompts import build_prompts, is_chat

        config = self.config
        backends = available_backends(loading.pick_device(config.device))
        if config.backend not in ("auto", *backends):
            raise UsageError(f"unknown backend {config.backend!r}; available here: auto, {', '.join(backends)}")
        self.progress("loading the model", 0, 0)
        with self._timed("load"):
            loaded = loading.load(source, config)
            anatomy = inspect(loaded.model)
        self.progress("building prompts", 0, 0)
        with self._timed("prompts"):
            prompts, skipped = build_prompts(examples, loaded.tokenizer, self.template, loaded.window)
        if not prompts:
            raise DataError(f"none of {len(examples)} examples can be used, the first: {skipped[0]}")
        largest = max(max(prompt.ids) for prompt in prompts)
        if largest >= anatomy.head.vocab_size:
            raise ModelError(
                f"the tokenizer of {source.name} gives token id {largest}, the model knows {anatomy.head.vocab_size}: "
                "the two do not belong together"
            )
        with self._timed("parity"):
            parity = check_parity(loaded.model, anatomy, _shortest_and_longest(prompts, PARITY_PROMPTS), config.backend)
        groups = group_prompts(prompts)
        folder = RunFolder.create(self.out, resume=self.resume)
        device = loaded.model.device
        manifest = {
            **identity,
            "status": "running",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": {
                **identity["model"],
                "type": loaded.model.config.model_type,
                "n_blocks": anatomy.n_layers - 1,
                "width": anatomy.head.width,
                "vocab_size": anatomy.head.vocab_size,
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
                "device": str(device),
                "window": loaded.window,
                "modules": anatomy.names,
                "head_sha256": anatomy.head.fingerprint(),
                "scale": anatomy.head.scale,
                "softcap": anatomy.head.softcap,
            },
            "prompt": {
                "template": config.template,
                "chat": is_chat(self.template, loaded.tokenizer),
                "example": loaded.tokenizer.decode(prompts[0].ids),
            },
            "parity_error": parity,
            "counts": _counts(prompts, skipped, data),
            "left_out": {"records": [str(p) for p in data.problems], "examples": [str(s) for s in skipped]},
            "groups": [group.key for group in groups],
            "environment": environment(),
        }
        folder.write_manifest(manifest)
        self._compute_groups(loaded, anatomy, groups, folder)
        return manifest, folder

    def _compute_groups(self, loaded: Any, anatomy: Any, groups: list[Group], folder: RunFolder) -> None:
        import numpy as np

        from xprobe.capture.engine import capture_group
        from xprobe.capture.readout import FIELDS, read_answers

        config = self.config
        have = set(folder.finished_shards())
        todo = [group for group in groups if folder.shard_name(group.key) not in have]
        total = sum(len(group.prompts) for group in groups)
        done = total - sum(len(group.prompts) for group in todo)
        self.progress("forward and lens", done, total)
        for group in todo:
            try:
                with self._timed("forward"):
                    captured = capture_group(loaded.model, anatomy, group, config.batch_tokens)
                with self._timed("lens"):
                    values = read_answers(captured, anatomy.head, config.backend)
                if not np.isfinite(values.logsumexp).all():
                    raise RuntimeError("hidden states hold NaN or infinity; try --dtype float32")
            except (MemoryError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise XprobeError(
                    f"group {group.key} failed: {reason}. {done} of {total} examples are kept in {self.out}; "
                    "if memory ran out, add --resume and a smaller --batch-tokens"
                ) from error
            tensors = {name: getattr(values, name) for name in FIELDS}
            tensors |= {"offsets": captured.offsets, "targets": captured.targets}
            if config.store_rows:
                tensors["prompt_end"] = captured.prompt_ends.transpose(0, 1)
                tensors["question_mean"] = captured.questions.transpose(0, 1)
            with self._timed("write"):
                folder.write_shard(group.key, tensors, {"examples": [_describe(prompt) for prompt in group.prompts]})
            done += len(group.prompts)
            self.progress("forward and lens", done, total)

    # -- phases and tables -----------------------------------------------------------------------------------

    def _analyse(self, manifest: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
        from xprobe.phases.segmentation import PHASE_DEFINITION
        from xprobe.report.tables import example_table, layer_table, summaries

        config = self.config
        self.progress("phases and tables", 0, 0)
        with self._timed("phases"):
            frame, signals = _read_signals(folder, manifest)
            examples = example_table(frame, signals, config.permutations, config.seed)
            layers = layer_table(examples, signals, config.bootstrap, config.seed)
            results = summaries(examples, manifest["model"]["n_blocks"], config.bootstrap, config.seed)
            folder.write_table(EXAMPLES, examples)
            folder.write_table(LAYERS, layers)
        return {
            **manifest,
            "phase_definition": PHASE_DEFINITION,
            "results": {s: results[s] for s in config.settings if s in results},
        }

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - started


def _shortest_and_longest(prompts: list[Any], count: int) -> list[Any]:
    """``count`` prompts (all if fewer): half of them the shortest, half the longest, so that padding is at work."""
    by_length = sorted(prompts, key=lambda prompt: len(prompt.ids))
    return by_length if len(by_length) <= count else [*by_length[: count // 2], *by_length[-(count - count // 2) :]]


def _counts(prompts: list[Any], skipped: list[Skipped], data: Dataset) -> dict[str, Any]:
    return {
        "examples": len(prompts),
        "answer_tokens": sum(len(prompt.targets) for prompt in prompts),
        "languages": len({prompt.example.language for prompt in prompts}),
        "paragraphs": len({prompt.example.paragraph for prompt in prompts}),
        "skipped": dict(Counter(item.reason for item in skipped)),
        "bad_records": dict(Counter(problem.reason for problem in data.problems)),
    }


def _describe(prompt: Any) -> dict[str, Any]:
    """What a shard keeps of an example: enough to analyse it without data or model."""
    example = prompt.example
    return {
        "setting": example.setting,
        "language": example.language,
        "question_id": example.question_id,
        "paragraph": example.paragraph,
        "context_language": example.context_language,
        "prompt_tokens": prompt.length,
        "answer_tokens": len(prompt.targets),
        "spans": {name: list(span) for name, span in prompt.spans.items()},
    }


def _read_signals(folder: RunFolder, manifest: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Example rows (a data frame) and signals [N, L + 1], in the order of the plan, from the shards alone."""
    import numpy as np
    import pandas as pd

    from xprobe.capture.readout import FIELDS, AnswerReadout
    from xprobe.phases.signals import example_signals

    rows: list[dict[str, Any]] = []
    signals: dict[str, list[Any]] = {}
    for key in manifest["groups"]:
        arrays, metadata = folder.read_shard(folder.shard_name(key), (*FIELDS, "offsets"))
        values = AnswerReadout(**{name: arrays[name] for name in FIELDS})
        rows += [{k: v for k, v in row.items() if k != "spans"} for row in metadata["examples"]]
        for name, table in example_signals(values, arrays["offsets"], manifest["model"]["vocab_size"]).items():
            signals.setdefault(name, []).append(table)
    return pd.DataFrame(rows), {name: np.concatenate(tables) for name, tables in signals.items()}
