"""Stage "patching": at which layer the model uses the question, and at which it has the answer.

model -> pairs of questions on a paragraph -> states of one in the run of the other, layer by layer -> patching.jsonl
-> curves, causal boundaries -> patching.parquet
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, replace
from itertools import chain, groupby
from typing import Any

import numpy as np
import pandas as pd
import torch
from xprobe_kernels.transfer import upload

from xprobe.capture.edits import Edit, RandomStates, StatesOf
from xprobe.capture.engine import Engine
from xprobe.capture.generation import token_log_probabilities
from xprobe.capture.requests import Each, Request
from xprobe.capture.rows import Rows
from xprobe.errors import DataError, UsageError
from xprobe.events import Note, Stage, Step
from xprobe.models.anatomy import input_device
from xprobe.phases.causes import moved, patching_curves, summarise_patching
from xprobe.phases.patch_settings import MEASURES, PATCHING_COLUMNS, PATCHING_LAYER_COLUMNS, PatchSettings
from xprobe.qa.prompts import Prompt
from xprobe.runs.identity import checksum_of, run_key
from xprobe.runs.lines import KeptLines
from xprobe.runs.manifest import ExecutionEntry
from xprobe.stages.opening import AskedModel, ExampleKey, first_questions, key_of, open_prompts
from xprobe.stages.pairs import Pair, choose_pairs
from xprobe.stages.requests import strategy_sample, study_request
from xprobe.stages.run import Run
from xprobe.timing import Stopwatch

NAME = "patching"
LINES, TABLE, BY_LAYER = "patching.jsonl", "patching.parquet", "patching_by_layer.parquet"
DEFINITION = 2  # raised when lines hold other figures
PLANNED = "planned"
NOTHING = 0.05  # a larger effect below all layers is more than rounding
WAVE = 4  # on a CPU, contexts whose pairs run together; then their lines are written
WAVE_ON_GPU = 16  # larger products, and fewer launches for each pair
Line = dict[str, Any]
PairKey = tuple[ExampleKey, ExampleKey]
_RunKey = tuple[ExampleKey, tuple[int, ...]]  # a prompt, and the answer tokens that it is given


def compute(run: Run, settings: PatchSettings, open_model: Callable[[], AskedModel]) -> None:
    """Writes ``patching.parquet`` and ``patching_by_layer.parquet``, and enters the stage in the manifest.

    Parameters
    ----------
    run : Run
    settings : PatchSettings
    open_model : callable () -> AskedModel
        Called if ``patching.jsonl`` does not hold every pair of these settings.

    Raises
    ------
    DataError
        No two questions on a paragraph have answers that differ in a token.
    XprobeError
        Says what is wrong and what is kept.
    """
    if run.execution.stream:
        raise UsageError(
            "a streamed model cannot be patched: each patch would read its blocks from the disk again. Use a machine "
            "that holds the model in memory (stream=False, --no-stream)"
        )
    watch, study = Stopwatch(), run.manifest.study
    before, kept = run.manifest.stages.get(NAME), kept_pairs(run, settings)
    names = _planned(kept)
    if names is None or set(names) - kept.read().keys():
        names, execution = _compute_missing(run, open_model(), settings, kept, watch)
        executions = [execution]
    else:
        run.notify(Note(f"the patches are those in {LINES}"))
        executions = before.executions if before is not None else [run.execution_entry()]
    run.notify(Stage("curves"))
    with watch.timed("curves"):
        found = kept.read()
        frame, patched = _frame([found[name] for name in names], run.manifest.model.n_blocks + 1)
        curves = patching_curves(frame, patched, tuple(MEASURES), study.bootstrap, study.seed)
        summaries = summarise_patching(frame, patched, study.bootstrap, study.seed)
        tables = {TABLE: _long(frame, patched), BY_LAYER: curves[list(PATCHING_LAYER_COLUMNS)]}
        with run.folder.writing_tables(tables) as digests:
            pass
    kept.tidy([PLANNED, *names])
    results = {**asdict(settings), "definition": DEFINITION, "settings": summaries}
    warnings = [warning for one in executions for warning in one.warnings]
    if (moved_positions := _moved_positions(curves)) is not None:
        run.notify(Note(moved_positions, important=True))
        warnings.append(moved_positions)
    run.entry(NAME, watch, tables=digests, results=results, warnings=warnings, executions=executions)


def _moved_positions(curves: pd.DataFrame) -> str | None:
    """A warning if patches below all layers move the answer, because equal tokens have other states; else None."""
    of_all = curves.query("layer == 0 and kind == 'answer' and measure == 'effect' and language == 'all'")
    largest = of_all["value"].abs().max()
    if not largest > NOTHING:
        return None
    return (
        f"a patch at layer 0 moves the answer (T(0) = {largest:.2f}), although the last tokens are equal: this model "
        "adds positions to its states, and prompts of other lengths end at other positions. So a patched state brings "
        "its position along, and curves and boundaries hold its effect, too"
    )


def patching_key(run: Run, settings: PatchSettings) -> str:
    """Checksum of everything that the patches depend on."""
    parts = {"run": run_key(run.manifest.to_dict()), "definition": DEFINITION, "seed": run.manifest.study.seed}
    return checksum_of(parts | {"settings": asdict(settings)})


def kept_pairs(run: Run, settings: PatchSettings) -> KeptLines:
    """The lines of these settings in ``patching.jsonl``, by pair, and one that lists the pairs (``PLANNED``)."""

    def name(line: Line) -> PairKey | str:
        return PLANNED if PLANNED in line else (tuple(line["own"]), tuple(line["other"]))

    return KeptLines(run.folder.path / LINES, patching_key(run, settings), name)


def _planned(kept: KeptLines) -> list[PairKey] | None:
    """The pairs of these settings, from the line that lists them; None before they were chosen."""
    line = kept.read().get(PLANNED)
    return None if line is None else [(tuple(own), tuple(other)) for own, other in line[PLANNED]]


def _compute_missing(
    run: Run, asked: AskedModel, settings: PatchSettings, kept: KeptLines, watch: Stopwatch
) -> tuple[list[PairKey], ExecutionEntry]:
    """Patches the pairs that ``patching.jsonl`` lacks, a few contexts at a time. Returns the names of all pairs."""
    runner, _, prompts = open_prompts(run, asked, watch)
    if not isinstance(runner, Engine):
        raise UsageError("only a model in memory can be patched")
    wanted = set(first_questions(run, settings.limit))
    pairs = choose_pairs([one for one in prompts if key_of(one) in wanted], settings, run.manifest.study.seed)
    if not pairs:
        raise DataError(
            "no two questions on one paragraph have answers that differ in a token, so there is nothing to patch (a "
            "run needs at least two questions on a paragraph)"
        )
    names = [pair.key for pair in pairs]
    if _planned(kept) != names:
        kept.append([{PLANNED: names}])
    execution = run.execution_entry(str(input_device(runner.model)))
    with run.failing(lambda: f"what {run.folder.path} holds stays"), watch.timed("check of sharing"):
        runner.choose_strategy(strategy_sample([study_request(prompt) for prompt in prompts]))
    have = kept.read().keys()
    contexts = [list(own) for _, own in groupby(pairs, key=lambda pair: pair.own.example.group)]
    size = WAVE if input_device(runner.model).type == "cpu" else WAVE_ON_GPU
    waves = [list(chain.from_iterable(contexts[at : at + size])) for at in range(0, len(contexts), size)]
    done = len(set(names) & have)
    run.notify(Step(NAME, done, len(pairs)))
    with run.failing(lambda: f"{done} of {len(pairs)} pairs are kept in {kept.path}"):
        for wave in waves:
            if all(pair.key in have for pair in wave):
                continue
            with watch.timed("patches"):
                lines = patch(runner, wave)
            kept.append([line for pair, line in zip(wave, lines, strict=True) if pair.key not in have])
            done += sum(pair.key not in have for pair in wave)
            run.notify(Step(NAME, done, len(pairs)))
    report = runner.report()
    execution.strategy, execution.warnings = report.strategy, list(report.warnings)
    return names, execution


def patch(engine: Engine, pairs: Sequence[Pair]) -> list[Line]:
    """Runs every pair with every patch at every layer, and measures the first token in which both answers differ.

    Its log-probability is read where the prompt ends, or the beginning that both answers share. No other answer token
    is run, and the ends are exact: a patch of the last state at the last layer says the other answer, one below the
    first block nothing. Pairs that the model does not tell apart are not patched: no curve counts them.

    Returns
    -------
    list of dict
        One for each pair: ``own`` and ``other`` (examples), ``paragraph``, ``pairs``, ``given`` (tokens that both
        answers share), ``before`` and ``outright`` (log-probabilities of own and other answer), and ``kinds``: by kind
        of patch, ``source`` (an example or null) and ``values`` [L + 1, 2] (null if the pair was not patched).
    """
    requests: list[Request] = []
    index: dict[_RunKey, int] = {}
    for pair in pairs:
        for prompt in (pair.own, pair.other, *(one for one in pair.controls.values() if isinstance(one, Prompt))):
            if (key_of(prompt), pair.given) not in index:
                index[key_of(prompt), pair.given] = len(requests)
                requests.append(_request(prompt, pair.given))
    top = engine.anatomy.n_layers - 1
    rows_of: list[dict[str, list[int]]] = []  # of each pair, by kind: the rows to measure, one for each layer
    for pair in pairs:
        rows_of.append({})
        for kind in kinds_of(pair):
            places = rows_of[-1][kind] = []
            for layer in range(engine.anatomy.n_layers):
                source = pair.own if kind == "question" else pair.controls.get(kind, pair.other)
                if layer == top and isinstance(source, Prompt):  # the row that is read is that of the source
                    places.append(index[key_of(source), pair.given])
                    continue
                places.append(len(requests))
                requests.append(_patched(pair, kind, layer, index))
    ends = [tuple(index[key_of(prompt), pair.given] for prompt in (pair.own, pair.other)) for pair in pairs]
    without: dict[int, list[list[float]]] = {}  # of each pair, what both prompts say without a patch

    def measure(rows: Rows, places: Sequence[int], answers: Sequence[tuple[int, int]]) -> list[list[float]]:
        last = rows["last"][0]
        last = last[upload(torch.tensor(places), last.device)]
        measured = token_log_probabilities(last, answers, engine.anatomy.head)
        return [[round(value, 7) for value in both] for both in measured]

    def select(rows: Rows, ran: Set[int]) -> set[int]:
        new = [p for p, both in enumerate(ends) if p not in without and set(both) <= ran]
        if new:
            places = [place for p in new for place in ends[p]]
            found = iter(measure(rows, places, [pairs[p].answers for p in new for _ in range(2)]))
            without.update((p, [next(found), next(found)]) for p in new)
        kept = (own for p, own in enumerate(rows_of) if p not in without or _told_apart(*without[p]))
        return {place for own in kept for places in own.values() for place in places}

    rows = engine.capture(requests, last_layer=True, select=select)
    select(rows, set(range(len(requests))))
    apart = [p for p in range(len(pairs)) if _told_apart(*without[p])]
    places = [place for p in apart for own in rows_of[p].values() for place in own]
    answers = [pairs[p].answers for p in apart for own in rows_of[p].values() for _ in own]
    values = iter(measure(rows, places, answers) if places else [])
    lines = []
    for p, pair in enumerate(pairs):
        kinds = {}
        for kind, own in rows_of[p].items():
            source = pair.other if kind in ("answer", "question") else pair.controls[kind]
            kinds[kind] = {
                "source": list(key_of(source)) if isinstance(source, Prompt) else None,
                "values": [next(values) for _ in own] if _told_apart(*without[p]) else None,
            }
        lines.append(
            {
                "own": list(key_of(pair.own)), "other": list(key_of(pair.other)),
                "paragraph": pair.own.example.paragraph, "pairs": pair.pairs, "given": len(pair.given),
                "before": without[p][0], "outright": without[p][1], "kinds": kinds,
            }
        )  # fmt: skip
    return lines


def _told_apart(before: Sequence[float], outright: Sequence[float]) -> bool:
    """Whether asking the other question moves the preference towards its answer. Curves are of such pairs."""
    _, whole = moved(np.zeros((1, 1, 2)), np.array([before]), np.array([outright]))
    return bool(whole[0] > 0)


def kinds_of(pair: Pair) -> list[str]:
    """The patches of a pair. "question" needs what follows the question to have as many tokens in both prompts."""
    kinds = ["answer"]
    if _after_question(pair.own) == _after_question(pair.other) > 0:
        kinds.append("question")
    return [*kinds, *pair.controls]


def _after_question(prompt: Prompt) -> int:
    """Tokens of the prompt after the question."""
    return prompt.length - prompt.spans["question"][1]


def _request(prompt: Prompt, given: tuple[int, ...]) -> Request:
    ids = (*prompt.ids[: prompt.length], *given)
    return Request(ids, {"last": Each((len(ids) - 1,))}, prompt.example.group)


def _patched(pair: Pair, kind: str, layer: int, index: dict[_RunKey, int]) -> Request:
    """The request of one patch.

    For "question" the run is that of the *other* prompt with the own states after the question: the other question's
    states, then everything else of the own prompt. So questions may have different lengths.
    """
    own, other, given = pair.own, pair.other, pair.given
    count = 1 if kind != "question" else _after_question(own) + len(given)  # states that are replaced, at the end
    base, source = (own, pair.controls.get(kind, other)) if kind != "question" else (other, own)
    request = _request(base, given)

    def last(length: int) -> tuple[int, ...]:
        return tuple(range(length - count, length))

    if isinstance(source, Prompt):
        taken: StatesOf | RandomStates = StatesOf(index[key_of(source), given], last(source.length + len(given)))
    else:
        taken = RandomStates(source)
    return replace(request, edits=(Edit(layer, last(len(request.ids)), taken),))


def _frame(lines: Sequence[Line], layers: int) -> tuple[pd.DataFrame, np.ndarray]:
    """One row per pair and kind of patch, and the log-probabilities of both answers [N, layers, 2].

    They are NaN where the pair was not patched.
    """
    unknown = [[np.nan] * 2] * layers
    rows, values = [], []
    for line in lines:
        (setting, language, question), (_, other_language, other_question) = line["own"], line["other"]
        for kind, found in line["kinds"].items():
            source = found["source"] or ("", "", "")
            rows.append(
                {
                    "setting": setting, "paragraph": line["paragraph"], "pairs": line["pairs"], "kind": kind,
                    "language": language, "question_id": question, "other_language": other_language,
                    "other_question_id": other_question, "source_language": source[1],
                    "source_question_id": source[2], "given": line["given"], "own_before": line["before"][0],
                    "other_before": line["before"][1], "own_outright": line["outright"][0],
                    "other_outright": line["outright"][1],
                }
            )  # fmt: skip
            values.append(found["values"] or unknown)
    return pd.DataFrame(rows), np.array(values, dtype=np.float64)


def _long(frame: pd.DataFrame, patched: np.ndarray) -> pd.DataFrame:
    """The rows of ``patching.parquet``: one per pair, kind of patch and layer."""
    layers = patched.shape[1]
    long = frame.loc[frame.index.repeat(layers)].reset_index(drop=True)
    long["layer"] = np.tile(np.arange(layers), len(frame))
    long["own"], long["other"] = patched.reshape(-1, 2).T
    return long[list(PATCHING_COLUMNS)]
