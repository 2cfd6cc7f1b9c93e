"""Stage "relevance": which tokens matter at which depth for the gold answer.

model -> prompts -> one backward pass for each answer -> relevance.jsonl -> depths, shares -> relevance.parquet
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.arguments import check_instance
from xprobe.attribution.relevance import GradientRunner, Relevance
from xprobe.attribution.settings import GROUPS, RELEVANCE_COLUMNS, RELEVANCE_LAYER_COLUMNS, RelevanceSettings
from xprobe.errors import UsageError
from xprobe.events import Note, Stage, Step
from xprobe.models.anatomy import input_device
from xprobe.phases.depth import major_relevance_depth, relevance_shares, weighted_depth
from xprobe.phases.relevance import relevance_by_layer, summarise_relevance
from xprobe.qa.prompts import Prompt
from xprobe.runs.identity import checksum_of, run_key
from xprobe.runs.lines import KeptLines
from xprobe.runs.manifest import ExecutionEntry
from xprobe.stages.opening import AskedModel, ExampleKey, first_questions, key_of, key_of_line, open_prompts
from xprobe.stages.run import Run
from xprobe.timing import Stopwatch

NAME = "relevance"
LINES, TABLE, BY_LAYER = "relevance.jsonl", "relevance.parquet", "relevance_by_layer.parquet"
DEFINITION = 2  # raised when lines hold other figures
WRITTEN, WRITTEN_ON_GPU = 16, 64  # examples that run in batches together; then their lines are written
UNREADABLE = "\ufffd"
LONGEST_CHARACTER = 8  # tokens that are decoded together to find a character
KEYS = ("setting", "language", "question_id", "paragraph")
Line = dict[str, Any]


def compute(run: Run, settings: RelevanceSettings, open_model: Callable[[], AskedModel]) -> None:
    """Writes ``relevance.parquet`` and ``relevance_by_layer.parquet``, and enters the stage in the manifest.

    Parameters
    ----------
    run : Run
    settings : RelevanceSettings
    open_model : callable () -> AskedModel
        Called only if ``relevance.jsonl`` lacks an example.

    Raises
    ------
    XprobeError
        Says what is wrong and what is kept.
    """
    _refuse_streamed(run)
    watch, study = Stopwatch(), run.manifest.study
    wanted = first_questions(run, settings.limit)
    before, kept = run.manifest.stages.get(NAME), kept_relevance(run, settings)
    if set(wanted) - kept.read().keys():
        executions = [_compute_missing(run, open_model(), settings, wanted, watch)]
    else:
        run.notify(Note(f"the relevance is that in {LINES}"))
        executions = before.executions if before is not None else [run.execution_entry()]
    run.notify(Stage("depths"))
    with watch.timed("depths"):
        found = kept.read()
        lines = [found[key] for key in wanted]
        frame = pd.DataFrame([{name: line[name] for name in KEYS} for line in lines])
        table = pd.DataFrame([row for line in lines for row in _rows(line, settings)])[list(RELEVANCE_COLUMNS)]
        every = np.array([line["shares"] for line in lines], dtype=np.float64)  # [N, L + 1, groups]
        present = {name for line in lines for name in line["groups"]}
        shares = {name: every[:, :, i] for i, name in enumerate(GROUPS) if name in present}  # 0 without tokens
        curves = relevance_by_layer(frame, shares, study.bootstrap, study.seed)[list(RELEVANCE_LAYER_COLUMNS)]
        conserved = np.array([line["conserved"] for line in lines], dtype=np.float64)
        summaries = summarise_relevance(table, conserved, KEYS, study.bootstrap, study.seed)
        with run.folder.writing_tables({TABLE: table, BY_LAYER: curves}) as digests:
            pass
    kept.tidy(wanted)
    results = {**asdict(settings), "definition": DEFINITION, "settings": summaries}
    warnings = [warning for one in executions for warning in one.warnings]
    run.entry(NAME, watch, tables=digests, results=results, warnings=warnings, executions=executions)


@dataclass(frozen=True, eq=False)
class ExampleRelevance:
    """The relevance of every token of one example.

    Attributes
    ----------
    id : str
        setting/language/question id.
    tokens : list of str
        What each token decodes to; a character of several tokens stands at the first of them (``readable_tokens``).
    groups : list of str
        Names of ``xprobe.attribution.settings.GROUPS``.
    values : array [L + 1, T]
    mrd : array [T]
        Major relevance depth.
    conserved : array [L + 1]
    rule, attributed : str
        As ``RelevanceSettings`` has them.
    y : float
        What the relevance is of.
    """

    id: str
    tokens: list[str]
    groups: list[str]
    values: NDArray[np.float64]
    mrd: NDArray[np.float64]
    conserved: NDArray[np.float64]
    rule: str
    attributed: str
    y: float


def relevance_of_example(run: Run, settings: RelevanceSettings, name: str, asked: AskedModel) -> ExampleRelevance:
    """The relevance of one example of a run, computed now.

    Raises
    ------
    UsageError
        The run has no such example.
    """
    _refuse_streamed(run)
    check_instance("example", name, str)
    wanted = tuple(name.split("/", 2))
    known = first_questions(run, None)
    if wanted not in known:
        raise UsageError(f"the run in {run.folder.path} has no example {name!r}; the first is {'/'.join(known[0])}")
    runner, tokenizer, prompts = open_prompts(run, asked, Stopwatch())
    prompt = next(prompt for prompt in prompts if key_of(prompt) == wanted)
    gradients = GradientRunner(runner.model, runner.anatomy, settings.rule, settings.attributed)
    (result,) = gradients.run([(prompt.ids[: prompt.length], prompt.targets)])
    values = result.values.double().cpu().numpy()
    names = list(GROUPS)
    return ExampleRelevance(
        name,
        readable_tokens(tokenizer, prompt.ids[:-1]),
        [names[group] for group in token_groups(prompt)],
        values,
        major_relevance_depth(values),
        result.conserved.double().cpu().numpy(),
        settings.rule,
        settings.attributed,
        result.attributed,
    )


def readable_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token decodes to. Where a character has several tokens, the first has the text and the others ``+``."""
    found = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]
    start = 0
    while start < len(found):
        stop = start + 1
        if UNREADABLE in found[start]:
            together = found[start]
            while UNREADABLE in together and stop < min(len(found), start + LONGEST_CHARACTER):
                stop += 1
                together = tokenizer.decode(list(ids[start:stop]), clean_up_tokenization_spaces=False)
            if UNREADABLE not in together:
                found[start:stop] = [together, *["+"] * (stop - start - 1)]
            else:
                stop = start + 1
        start = stop
    return found


def _refuse_streamed(run: Run) -> None:
    if run.execution.stream:
        raise UsageError(
            "a streamed model cannot be attributed: the backward pass needs its blocks again. Use a machine that holds "
            "the model in memory (stream=False, --no-stream)"
        )


def relevance_key(run: Run, settings: RelevanceSettings) -> str:
    """Checksum of everything that the relevance of an example depends on."""
    parts = {"run": run_key(run.manifest.to_dict()), "definition": DEFINITION}
    return checksum_of(parts | {"rule": settings.rule, "attributed": settings.attributed})


def kept_relevance(run: Run, settings: RelevanceSettings) -> KeptLines:
    """The lines of this rule in ``relevance.jsonl``, by example."""
    return KeptLines(run.folder.path / LINES, relevance_key(run, settings), key_of_line)


def _compute_missing(
    run: Run, asked: AskedModel, settings: RelevanceSettings, wanted: Sequence[ExampleKey], watch: Stopwatch
) -> ExecutionEntry:
    """Computes the relevance of the examples that ``relevance.jsonl`` lacks, a few at a time."""
    runner, _, prompts = open_prompts(run, asked, watch)
    execution = run.execution_entry(str(input_device(runner.model)))
    tokens = run.execution.tokens_on(str(input_device(runner.model)))
    gradients = GradientRunner(
        runner.model, runner.anatomy, settings.rule, settings.attributed, tokens, lambda text: run.notify(Note(text))
    )
    kept = kept_relevance(run, settings)
    missing = set(wanted) - kept.read().keys()
    chosen = [prompt for prompt in prompts if key_of(prompt) in missing]
    done, total = len(wanted) - len(chosen), len(wanted)
    run.notify(Step(NAME, done, total))
    with run.failing(lambda: f"{done} of {total} examples are kept in {run.folder.path / LINES}"):
        size = WRITTEN if input_device(runner.model).type == "cpu" else WRITTEN_ON_GPU
        for start in range(0, len(chosen), size):
            some = chosen[start : start + size]
            with watch.timed("backward"):
                results = gradients.run([(prompt.ids[: prompt.length], prompt.targets) for prompt in some])
            lines = [_line(prompt, result) for prompt, result in zip(some, results, strict=True)]
            kept.append(lines)
            done += len(some)
            run.notify(Step(NAME, done, total))
    execution.warnings = [*runner.report().warnings, *gradients.warn.messages]
    return execution


def token_groups(prompt: Prompt) -> np.ndarray:
    """The group of every token that the model is fed, as an index into ``GROUPS``: [T], int64.

    Examples
    --------
    >>> from xprobe.qa.records import Example
    >>> example = Example("en-x", "en", "q1", "p1", "en", "Ada sold 40", "How many", "40", 9)
    >>> spans = {"context": (1, 4), "question": (4, 6), "answer_in_context": (3, 4)}
    >>> token_groups(Prompt(example, (1, 11, 12, 13, 14, 15, 9, 13, 16), 7, spans)).tolist()
    [3, 2, 2, 1, 0, 0, 3, 4]
    """
    order = {name: index for index, name in enumerate(GROUPS)}
    groups = np.full(len(prompt.ids) - 1, order["template"], dtype=np.int64)
    for name, span in (("context", "context"), ("question", "question"), ("answer", "answer_in_context")):
        groups[slice(*prompt.spans[span])] = order[name]
    groups[prompt.length :] = order["given"]
    return groups


def _line(prompt: Prompt, result: Relevance) -> Line:
    """The line of one example: shares by layer, what is conserved, and the depths of every group."""
    values = result.values.double().cpu().numpy()
    groups = token_groups(prompt)
    depths = {
        "mrd": major_relevance_depth(values),
        "mrd_positive": major_relevance_depth(values, positive=True),
        "mrd_with_embeddings": major_relevance_depth(values, embeddings=True),
    }
    weights = {  # what each depth is a mean over: the relevance that it counts
        "mrd": np.abs(values[1:]).sum(0),
        "mrd_positive": np.maximum(values[1:], 0).sum(0),
        "mrd_with_embeddings": np.abs(values).sum(0),
    }
    found: dict[str, Any] = {}
    for index, name in enumerate(GROUPS):
        members = np.flatnonzero(groups == index)
        if not len(members):
            continue
        means = {key: weighted_depth(own[members], weights[key][members])[0] for key, own in depths.items()}
        quartiles = weighted_depth(depths["mrd"][members], weights["mrd"][members])[1]
        found[name] = {
            "tokens": len(members),
            "share": float(weights["mrd"][members].sum() / weights["mrd"].sum()),
            **means,
            **{f"mrd_q{i + 1}": float(value) for i, value in enumerate(quartiles)},
        }
    example = prompt.example
    return {
        **{name: getattr(example, name) for name in KEYS},
        "y": result.attributed,
        "conserved": [round(float(share), 7) for share in result.conserved],
        "shares": [[round(float(share), 7) for share in row] for row in relevance_shares(values, groups, len(GROUPS))],
        "groups": found,
    }


def _rows(line: Line, settings: RelevanceSettings) -> list[dict[str, Any]]:
    """The rows of ``relevance.parquet`` of one example."""
    shared = {name: line[name] for name in KEYS}
    return [
        {**shared, "rule": settings.rule, "group": name, "attributed": settings.attributed, "y": line["y"], **figures}
        for name, figures in line["groups"].items()
    ]
