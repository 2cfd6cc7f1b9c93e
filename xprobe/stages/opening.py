"""Opens the model of a run: the runner that gives rows or answers, the tokenizer, and the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xprobe_kernels import available_backends

from xprobe.capture.engine import Engine
from xprobe.capture.layerwise import LayerwiseEngine
from xprobe.capture.runner import Runner
from xprobe.errors import DataError, ModelError, UsageError
from xprobe.events import Note, Stage, Step
from xprobe.models import in_memory, loading
from xprobe.models.anatomy import input_device, inspect
from xprobe.models.loading import LoadedModel
from xprobe.models.streaming import streamed as streaming
from xprobe.qa.prompts import Prompt, build_prompts
from xprobe.qa.selection import order_questions
from xprobe.results import read_tables
from xprobe.runs.folder import EXAMPLES
from xprobe.stages.questions import Questions
from xprobe.stages.run import Run
from xprobe.timing import Stopwatch

ExampleKey = tuple[str, str, str]  # setting, language, question id
Opened = tuple[Runner, Any, list[Prompt]]  # with the tokenizer


@dataclass
class AskedModel:
    """The model of a run and its questions, as they are read again. Stages in one call share ``opened``."""

    questions: Questions
    source: loading.Source
    loaded: LoadedModel | None = None
    opened: Opened | None = None


def open_prompts(run: Run, asked: AskedModel, watch: Stopwatch) -> Opened:
    """The runner of the model, its tokenizer, and the prompts of the run.

    Raises
    ------
    XprobeError
        The model cannot be loaded, or no example can be used.
    """
    if asked.opened is not None:
        return asked.opened
    run.notify(Stage("loading the model"))
    with watch.timed("load"):
        runner, tokenizer = open_runner(run, asked.source, asked.loaded)
    run.notify(Stage("building prompts"))
    with watch.timed("prompts"):
        prompts = usable_prompts(asked.questions, tokenizer, loading.window(runner.model.config))
    check_vocabulary(prompts, runner.anatomy.head.vocab_size, asked.source.name)
    asked.opened = runner, tokenizer, prompts
    return asked.opened


def usable_prompts(questions: Questions, tokenizer: Any, window: int | None) -> list[Prompt]:
    """The prompts of all examples that can be used.

    Raises
    ------
    DataError
        None can: names the first and why.
    """
    prompts, skipped = build_prompts(questions.examples, tokenizer, questions.template, window)
    if not prompts:
        raise DataError(f"none of {len(questions.examples)} examples can be used, the first: {skipped[0]}")
    return prompts


def open_runner(run: Run, source: loading.Source, loaded: LoadedModel | None) -> tuple[Runner, Any]:
    """The runner of the model, whole or block by block, and the model's tokenizer."""
    execution = run.execution
    dtype = run.manifest.model.dtype or run.manifest.study.dtype  # a resumed run keeps its dtype
    device = execution.device if loaded is None else str(input_device(loaded.model))
    backends = available_backends(loading.pick_device(device))
    if execution.backend not in ("auto", *backends):
        raise UsageError(f"unknown backend {execution.backend!r}; available here: auto, {', '.join(backends)}")

    def warn(message: str) -> None:
        run.notify(Note(message))

    warnings: list[str] = []  # of transformers, while it reads weights and tokenizer
    runner: Runner
    if execution.stream:
        trust = execution.trust_remote_code
        streamed = streaming.open_streamed(
            run.manifest.study.model, dtype, execution.device, trust_remote_code=trust, warnings=warnings
        )
        tokenizer = loading.load_tokenizer(source, trust, warnings)
        runner = LayerwiseEngine(
            streamed, execution.tokens_on(loading.pick_device(device)), run.folder.path, warn,
            lambda done, total: run.notify(Step("blocks", done, total)),
        )  # fmt: skip
    else:
        if loaded is not None and (found := in_memory.hooks(loaded.model)):
            warnings.append(
                f"the model has hooks, which are part of what is measured and cannot be recorded: {', '.join(found)}"
            )
        loaded = loaded or loading.load(source, execution, dtype=dtype, warnings=warnings)
        tokenizer = loaded.tokenizer
        tokens = execution.tokens_on(str(input_device(loaded.model)))
        runner = Engine(loaded.model, inspect(loaded.model), tokens, warn)
    for message in warnings:
        runner.warn(message)
    return runner, tokenizer


def check_vocabulary(prompts: Sequence[Prompt], size: int, name: str) -> None:
    largest = max(max(prompt.ids) for prompt in prompts)
    if largest >= size:
        raise ModelError(
            f"the tokenizer of {name} gives token id {largest}, the model knows {size}: the two do not belong together"
        )


def key_of(prompt: Prompt) -> ExampleKey:
    """The name of a prompt's example."""
    return prompt.example.setting, prompt.example.language, prompt.example.question_id


def key_of_line(line: dict[str, Any]) -> ExampleKey | None:
    """The name of the example that a kept line is about; None for a line about none."""
    return (line["setting"], line["language"], line["question_id"]) if "question_id" in line else None


def first_questions(run: Run, limit: int | None) -> list[ExampleKey]:
    """Every example of the first ``limit`` questions, in the order of the run.

    The questions come in the order in which ``limit`` of a study takes them.
    """
    (examples,) = read_tables(run.folder, run.manifest, (EXAMPLES,))
    paragraphs: dict[str, dict[str, None]] = {}
    for paragraph, question in zip(examples["paragraph"], examples["question_id"], strict=True):
        paragraphs.setdefault(paragraph, {})[question] = None
    taken = set(order_questions([list(questions) for questions in paragraphs.values()])[:limit])
    keys = zip(examples["setting"], examples["language"], examples["question_id"], strict=True)
    return [key for key in keys if key[2] in taken]
