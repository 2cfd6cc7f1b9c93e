"""Stage "states": forward passes and the lens. It gives one shard for each context group.

model -> prompts -> requests -> plan -> waves of hidden rows -> lens -> shards
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from xprobe_kernels import Unembedding
from xprobe_kernels.transfer import HostCopy, upload

from xprobe.capture.plan import Plan, Wave
from xprobe.capture.requests import group_requests
from xprobe.capture.rows import Rows
from xprobe.capture.runner import Runner
from xprobe.errors import DataError, UsageError, XprobeError
from xprobe.events import Note, Stage, Step
from xprobe.lenses.files import lens_checksum, load_lens
from xprobe.lenses.reading import AnswerReadout, start_reading
from xprobe.lenses.transport import Transport
from xprobe.models import loading
from xprobe.models.anatomy import input_device
from xprobe.models.loading import LoadedModel
from xprobe.qa.prompts import Prompt, Skipped, build_prompts, describe_format
from xprobe.runs.folder import RunFolder
from xprobe.runs.manifest import Counts, StageEntry
from xprobe.runs.places import study_here
from xprobe.stages.opening import check_vocabulary, open_runner
from xprobe.stages.overlap import in_turn, overlapped
from xprobe.stages.questions import Questions
from xprobe.stages.requests import ANSWER, QUESTION, strategy_sample, study_request, teacher_forced
from xprobe.stages.run import Run
from xprobe.stages.shards import write_wave
from xprobe.timing import Stopwatch

NAME = "states"
STEP = "forward and lens"  # of the events that count examples
PARITY_PROMPTS = 4


def compute(run: Run, questions: Questions, source: loading.Source, loaded: LoadedModel | None = None) -> None:
    """Computes the shards that the folder lacks, and enters the stage in the manifest.

    Parameters
    ----------
    run : Run
    questions : Questions
    source : Source
        Of the model.
    loaded : LoadedModel, optional
        The model, where the caller has it in memory.

    Raises
    ------
    XprobeError
        Says what is wrong and what is kept: shards that were written stay valid.
    """
    watch = Stopwatch()
    before = run.manifest.stages.get(NAME, StageEntry())
    run.notify(Stage("loading the model"))
    with watch.timed("load"):
        runner, tokenizer = open_runner(run, source, loaded)
    if questions.selection.shortfall:
        runner.warn(questions.selection.shortfall)
    window = loading.window(runner.model.config)
    run.notify(Stage("building prompts"))
    with watch.timed("prompts"):
        prompts, skipped = build_prompts(questions.examples, tokenizer, questions.template, window)
    if not prompts:
        raise DataError(f"none of {len(questions.examples)} examples can be used, the first: {skipped[0]}")
    check_vocabulary(prompts, runner.anatomy.head.vocab_size, source.name)
    anatomy = runner.anatomy
    lens = study_here(run.manifest).lens
    if lens_checksum(lens) != run.manifest.lens_sha256:
        raise UsageError(f"the file of the lens {lens!r} has other bytes than it had when the run began")
    transport, remarks = load_lens(lens, anatomy.head.width, anatomy.n_layers, source.name)
    for message in remarks:
        runner.warn(message)
    lacking = questions.template.without_wording(dict.fromkeys(one.example.context_language for one in prompts))
    if lacking:
        runner.warn(
            f"the template has no wording for {', '.join(lacking)}: prompts with contexts in these languages have "
            f"that of {questions.template.fallback} (--template FILE takes your own, docs/prompts.md)"
        )
    requests = [study_request(prompt) for prompt in prompts]
    groups = group_requests(requests)
    with run.failing(lambda: f"what {run.folder.path} holds stays"):
        with watch.timed("parity"):
            runner.check_parity(teacher_forced(prompts, PARITY_PROMPTS), run.execution.backend)
        with watch.timed("check of sharing"):
            runner.choose_strategy(strategy_sample(requests))
    plan = runner.plan(groups)
    run.notify(Note(f"shared beginnings save {plan.saved:.0%} of {plan.tokens} tokens"))

    _describe_model(run, runner, window)
    _describe_prompts(run, questions, prompts, skipped, plan, tokenizer)
    execution = run.execution_entry(str(input_device(runner.model)))
    same = next((one for one in before.executions if one.key == execution.key), None)
    execution = same or execution
    entry = StageEntry([*(one for one in before.executions if one is not same), execution])
    entry.results = {"plan": plan.to_dict(), "parity_error": runner.report().parity_error}
    _describe_execution(entry, runner)
    run.manifest.stages[NAME] = entry
    run.manifest.status = "running"
    run.folder.make()
    run.folder.write_manifest(run.manifest)

    try:
        _compute_missing(run, runner, plan, prompts, watch, execution.key, transport)
    except BaseException:
        _describe_execution(entry, runner)
        with suppress(XprobeError):  # the first error says what is wrong
            run.folder.write_manifest(run.manifest)
        raise
    _describe_execution(entry, runner)
    report = runner.report()
    if report.strategy != plan.strategy:  # it changed during the sweep
        entry.results["plan"] = runner.plan(groups).to_dict()
    entry.results["plan"] |= {"batch_tokens": plan.batch_tokens, "attention_kernel": report.attention_kernel}
    entry.results["parity_error"] = report.parity_error
    entry.seconds = {name: round(seconds, 3) for name, seconds in watch.seconds.items()}
    _count_shards(run, entry)


class WaveReadout:
    """Lens values and rows of one wave, while they are copied to main memory and the device computes the next wave.

    Parameters
    ----------
    rows : Rows
        Of the study's requests; the next wave may overwrite them once this is made.
    prompts : sequence of Prompt
        Of the same wave, in the same order.
    head : Unembedding
    backend : str
    store_rows : bool
        Whether the hidden rows at prompt end and question are kept as well.
    transport : Transport, optional
        Maps of another lens than the logit lens. Rows are kept as they are.
    """

    def __init__(
        self,
        rows: Rows,
        prompts: Sequence[Prompt],
        head: Unembedding,
        backend: str,
        store_rows: bool,
        transport: Transport | None = None,
    ) -> None:
        self.offsets = rows.offsets[ANSWER]
        answers = rows[ANSWER]
        targets = upload(torch.tensor([token for prompt in prompts for token in prompt.targets]), answers.device)
        self._reading = start_reading(answers, targets, head, backend, transport)
        kept = {"targets": targets}
        if store_rows:
            kept |= {"prompt_end": rows.first(ANSWER), "question_mean": rows[QUESTION]}
        self._kept = HostCopy(kept)

    def wait(self) -> tuple[AnswerReadout, dict[str, Tensor]]:
        """Lens values of all positions, and the gold tokens ``targets`` [P] and rows [L + 1, N, D] beside them.

        Raises
        ------
        RuntimeError
            Some row was not a number.
        """
        values = self._reading.values()
        if not values.finite:
            raise RuntimeError("hidden states hold NaN or infinity; try dtype='float32' (--dtype float32)")
        return values, self._kept.wait()


def _compute_missing(
    run: Run,
    runner: Runner,
    plan: Plan,
    prompts: Sequence[Prompt],
    watch: Stopwatch,
    execution: str,
    transport: Transport | None,
) -> None:
    """Computes the groups that have no shard yet, and reports how many examples are done."""
    by_group: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_group.setdefault(prompt.example.group, []).append(prompt)
    have = set(run.folder.finished_shards())
    missing = {key for key in by_group if run.folder.shard_name(key) not in have}
    done = sum(len(members) for key, members in by_group.items() if key not in missing)

    def written(count: int) -> None:
        nonlocal done
        done += count
        run.notify(Step(STEP, done, len(prompts)))

    written(0)
    with run.failing(lambda: f"{done} of {len(prompts)} examples are kept in {run.folder.path}"):
        write_shards(
            runner, plan, by_group, missing, run.folder, watch, written,
            backend=run.execution.backend, store_rows=run.manifest.study.store_rows, execution=execution,
            transport=transport,
        )  # fmt: skip


def write_shards(
    runner: Runner,
    plan: Plan,
    prompts: Mapping[str, Sequence[Prompt]],
    wanted: Container[str],
    folder: RunFolder,
    watch: Stopwatch,
    written: Callable[[int], None],
    *,
    backend: str = "auto",
    store_rows: bool = True,
    execution: str = "",
    transport: Transport | None = None,
) -> None:
    """Computes every wave of ``plan`` that holds a group of ``wanted``, and writes those groups' shards.

    Waves of hidden rows come from the runner, ``WaveReadout`` reads them with the lens. On a CPU a wave is written
    before the next is computed. With a GPU, a writer thread waits for the results and writes them meanwhile; if
    something fails, what was computed is still written. Steps in ``watch``: forward, lens, write.

    Parameters
    ----------
    prompts : mapping of str to sequence of Prompt
        By group key, the prompts of the group's requests, in their order.
    written : callable (count)
        Called from the caller's thread with the number of examples written since the last call.
    execution : str
        Key of the stage's execution, for the journal.
    transport : Transport, optional
        Maps of another lens than the logit lens.

    Raises
    ------
    RuntimeError, MemoryError
        As ``Runner.run``; or hidden states hold NaN or infinity.
    """
    head = runner.anatomy.head
    device = head.weight.device

    def prompts_of(wave: Wave) -> list[Prompt]:
        return [prompt for group in wave.groups for prompt in prompts[group.key]]

    def pending() -> Iterator[tuple[Wave, WaveReadout]]:
        waves = runner.run(plan, wanted)
        while True:
            with watch.timed("forward", device):
                wave, rows = next(waves, (None, None))
            if wave is None or rows is None:
                return
            with watch.timed("lens", device):
                read = WaveReadout(rows, prompts_of(wave), head, backend, store_rows, transport)
            yield wave, read

    def write(piece: tuple[Wave, WaveReadout], kept: Callable[[int], None]) -> None:
        wave, read = piece
        values, rows = read.wait()
        write_wave(folder, wave, prompts_of(wave), wanted, read.offsets, values, rows, watch, execution, kept)

    (overlapped if device.type == "cuda" else in_turn)(pending(), write, written)
    watch.collect()


def _describe_model(run: Run, runner: Runner, window: int | None) -> None:
    """Enters shape and dtype of the model, and where its parts are."""
    entry, head = run.manifest.model, runner.anatomy.head
    entry.type = runner.model.config.model_type
    entry.n_blocks, entry.width, entry.vocab_size = runner.anatomy.n_layers - 1, head.width, head.vocab_size
    entry.dtype = str(runner.model.dtype).removeprefix("torch.")
    entry.window, entry.modules = window, dict(runner.anatomy.names)
    entry.head_sha256, entry.scale, entry.softcap = head.fingerprint(), head.scale, head.softcap


def _describe_execution(entry: StageEntry, runner: Runner) -> None:
    """Enters strategy and warnings of the last execution, and the warnings of all."""
    execution, report = entry.executions[-1], runner.report()
    execution.strategy = report.strategy
    execution.warnings = list(dict.fromkeys([*execution.warnings, *report.warnings]))
    entry.warnings = list(dict.fromkeys(warning for one in entry.executions for warning in one.warnings))


def _count_shards(run: Run, entry: StageEntry) -> None:
    """Enters how many shards each execution wrote; of those that wrote none, only the last can stay."""
    counts, groups = run.folder.shards_by_execution(run.manifest.groups), run.manifest.groups
    for one in entry.executions:
        one.shards = counts[one.key]
    entry.executions = [one for one in entry.executions if one.shards] or entry.executions[-1:]
    unknown = len(groups) - sum(one.shards for one in entry.executions)
    if unknown:
        entry.warnings.append(f"the manifest does not say which execution wrote {unknown} of {len(groups)} shards")
        run.notify(Note(entry.warnings[-1]))


def _describe_prompts(
    run: Run, questions: Questions, prompts: list[Prompt], skipped: list[Skipped], plan: Plan, tokenizer: Any
) -> None:
    """Enters selection, format of the prompt, counts, and what was left out."""
    manifest, problems = run.manifest, questions.data.problems
    manifest.created = manifest.created or datetime.now(UTC).isoformat(timespec="seconds")
    manifest.selection = questions.selection.to_dict()
    manifest.prompt = {
        "template": manifest.study.template,
        **describe_format(questions.template, tokenizer),
        "example": tokenizer.decode(prompts[0].ids, clean_up_tokenization_spaces=False),
    }
    manifest.counts = Counts(
        examples=len(prompts),
        answer_tokens=sum(len(prompt.targets) for prompt in prompts),
        languages=len({prompt.example.language for prompt in prompts}),
        paragraphs=len({prompt.example.paragraph for prompt in prompts}),
        skipped=dict(Counter(item.reason for item in skipped)),
        bad_records=dict(Counter(problem.reason for problem in problems)),
    )
    manifest.left_out = {"records": [str(p) for p in problems], "examples": [str(s) for s in skipped]}
    manifest.groups = [group.key for wave in plan.waves for group in wave.groups]
