"""Stage "oracle": could the model find the answer, whatever it then says? (oracle definition 1)

model -> prompts with words of the context removed -> drops of log-probability -> oracle.jsonl
-> evidence of each answer -> oracle.parquet, summaries
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache

import pandas as pd

from xprobe.capture.plan import rotary_limit
from xprobe.capture.runner import Runner
from xprobe.errors import UsageError
from xprobe.events import Note, Stage, Step
from xprobe.models.anatomy import input_device
from xprobe.runs.identity import checksum_of
from xprobe.runs.lines import KeptLines
from xprobe.runs.manifest import ExecutionEntry
from xprobe.scoring.evidence import DEFINITION
from xprobe.scoring.measures import score
from xprobe.scoring.normalisers import Normaliser, get_normaliser
from xprobe.scoring.oracle_summaries import summarise_oracle
from xprobe.scoring.settings import ORACLE_COLUMNS, TARGETS, OracleSettings
from xprobe.scoring.words import Span, word_spans
from xprobe.stages import answers
from xprobe.stages.evidence import (
    LINES,
    Line,
    Searches,
    answer_settings,
    batch_tokens,
    evidence_line,
    generated_answers,
    kept_evidence,
    removal_for,
)
from xprobe.stages.generation import answers_key
from xprobe.stages.opening import AskedModel, ExampleKey, first_questions, key_of, open_prompts
from xprobe.stages.oracle_forecast import forecast
from xprobe.stages.removal import Text, run_searches
from xprobe.stages.requests import strategy_sample, study_request
from xprobe.stages.run import Run
from xprobe.timing import Stopwatch

NAME = "oracle"
TABLE = "oracle.parquet"
RANDOM_SPANS = 64  # most random spans of a control


def compute(run: Run, settings: OracleSettings, open_model: Callable[[], AskedModel]) -> None:
    """Writes ``oracle.parquet``, and enters the stage in the manifest. Computes the stage "answers" where it lacks.

    Parameters
    ----------
    run : Run
    settings : OracleSettings
    open_model : callable () -> AskedModel
        Called only if ``oracle.jsonl`` lacks an example.

    Raises
    ------
    XprobeError
        Says what is wrong and what is kept.
    """
    if run.execution.stream:
        raise UsageError(
            "a streamed model cannot be searched for evidence: each removal would read the whole model from the disk. "
            "Use a machine that holds the model in memory (stream=False, --no-stream)"
        )
    watch, study = Stopwatch(), run.manifest.study
    normaliser = get_normaliser(settings.normaliser)
    for language in {group.split("/")[1] for group in run.manifest.groups}:
        word_spans("a", language)  # says which package is missing, before anything is generated
    generated = generated_answers(run)
    if answers.NAME not in run.manifest.stages or len(generated) < run.manifest.counts.examples:
        answers.compute(run, answer_settings(run, settings), open_model)
        run.folder.write_manifest(run.manifest)  # the answers stay, whatever happens to the searches
        generated = generated_answers(run)
    for one in generated.values():
        normaliser.check_language(one["context_language"])
    wanted = first_questions(run, settings.limit)
    before, kept = run.manifest.stages.get(NAME), kept_evidence(run, settings)
    if set(wanted) - kept.read().keys():
        executions = [_search_missing(run, open_model(), settings, generated, wanted, watch)]
    else:
        run.notify(Note(f"the evidence is that in {LINES}"))
        executions = before.executions if before is not None else [run.execution_entry()]
    run.notify(Stage("scores"))
    with watch.timed("scores"):
        found = kept.read()
        table = pd.concat([scored(found[key], normaliser) for key in wanted], ignore_index=True)
        summaries = summarise_oracle(table, study.bootstrap, study.seed)
        with run.folder.writing_tables({TABLE: table[list(ORACLE_COLUMNS)]}) as digests:
            pass
    kept.tidy(wanted)
    about = {"definition": DEFINITION, "answers_key": answers_key(run, answer_settings(run, settings))}
    results = {**asdict(settings), **about, "settings": summaries}
    warnings = [warning for one in executions for warning in one.warnings]
    run.entry(NAME, watch, tables=digests, results=results, warnings=warnings, executions=executions)


def _search_missing(
    run: Run,
    asked: AskedModel,
    settings: OracleSettings,
    generated: dict[ExampleKey, Line],
    wanted: Sequence[ExampleKey],
    watch: Stopwatch,
) -> ExecutionEntry:
    """Searches the evidence of the examples that ``oracle.jsonl`` lacks, wave by wave.

    Raises
    ------
    XprobeError
        Says what is wrong and what is kept: lines that were written stay valid.
    """
    runner, tokenizer, prompts = open_prompts(run, asked, watch)
    kept = kept_evidence(run, settings)
    removal = removal_for(settings, tokenizer)
    with run.failing(lambda: f"what {run.folder.path} holds stays"), watch.timed("check of sharing"):
        runner.choose_strategy(strategy_sample([study_request(prompt) for prompt in prompts]))
    execution = run.execution_entry(str(input_device(runner.model)))
    strategy, limit = runner.report().strategy, rotary_limit(runner.model.config)
    run.notify(Note(f"the oracle: {forecast(run, settings, prompts, tokenizer, strategy, limit)}", important=True))
    have, steps = kept.read(), _Steps(kept, runner)
    searches = Searches(prompts, generated, wanted, settings, batch_tokens(run))
    total = len(searches.wanted)
    done = len(searches.wanted.keys() & have.keys())
    run.notify(Step(NAME, done, total))
    with run.failing(lambda: f"{done} of {total} examples are kept in {kept.path}"):
        for wave in searches.waves:
            if all(key_of(prompt) in have for prompt in wave):
                continue
            with watch.timed("removals"):
                cases = searches.cases(wave)
                run_searches([case for own in cases.values() for case in own], removal, steps.measure)
            lines = [
                evidence_line(searches.wanted[key_of(prompt)], prompt, cases[key_of(prompt)])
                for prompt in wave
                if key_of(prompt) not in have
            ]
            kept.append(lines)
            done += len(lines)
            run.notify(Step(NAME, done, total))
    report = runner.report()
    execution.strategy, execution.warnings = report.strategy, list(report.warnings)
    return execution


class _Steps:
    """Measures the steps of searches. Each is kept as a line, so a step is not measured again after a kill."""

    def __init__(self, kept: KeptLines, runner: Runner) -> None:
        self._kept, self._runner = kept, runner
        self._known = {line["step"]: line["values"] for line in kept.own_lines() if "step" in line}

    def measure(self, texts: list[Text]) -> list[float]:
        step = checksum_of({"texts": [[list(prompt), list(answer)] for prompt, answer in texts]})
        if step not in self._known:
            self._known[step] = self._runner.log_probabilities(texts)
            self._kept.append([{"step": step, "values": self._known[step]}])
        return self._known[step]


def scored(line: Line, normaliser: Normaliser) -> pd.DataFrame:
    """One row per search of an example: the evidence and its scores, and those of random spans.

    Examples
    --------
    >>> found = {"target": "own", "question": True, "log_probability": -1.0, "sentence": [0, 11], "sentence_drop": 3.0,
    ...          "evidence": [9, 11], "words": 1, "drop": 2.5}
    >>> line = {"setting": "en-x", "language": "de", "question_id": "q1", "paragraph": "p1", "context_language": "en",
    ...         "context": "Ada sold 40. Bob left.", "gold": ["40"], "answer": "many", "answer_start": 9,
    ...         "words": [[0, 3], [4, 8], [9, 11], [13, 16], [17, 21]], "sentences": [[0, 11], [13, 21]],
    ...         "searches": [found]}
    >>> row = scored(line, get_normaliser("xprobe")).iloc[0]
    >>> print(row["evidence"], row["f1"], row["chance_f1"], row["answer_f1"])
    40 1.0 0.2 0.0
    >>> print(row["sentence_hit"], row["sentence_chance"])
    True 0.5
    """
    context, language, gold = line["context"], line["context_language"], tuple(line["gold"])
    start = line["answer_start"]
    holders = [(a, b) for a, b in line["sentences"] if a < start + len(gold[0]) and b > start]
    shared = {name: line[name] for name in ("setting", "language", "question_id", "paragraph", "context_language")}
    shared |= {
        "sentence_chance": len(holders) / len(line["sentences"]) if line["sentences"] else 0.0,
        "normaliser": normaliser.name,
        "answer_f1": score(line["answer"], gold, language, normaliser).f1,
    }
    words = tuple((a, b) for a, b in line["words"])
    rows = []
    for one in line["searches"]:
        first, last = one["evidence"]
        f1, exact_match = score(context[first:last], gold, language, normaliser)
        rows.append(
            shared
            | {name: one[name] for name in ("target", "question", "words", "drop", "log_probability", "sentence_drop")}
            | {
                "evidence": context[first:last],
                "start": first,
                "stop": last,
                "sentence": context[slice(*one["sentence"])],
                "sentence_hit": tuple(one["sentence"]) in holders,
                "f1": f1,
                "exact_match": exact_match,
                "chance_f1": _chance(context, language, gold, words, one["words"], normaliser),
            }
        )
    for target in TARGETS:  # an answer without tokens hangs on nothing
        for question in {one["question"] for one in line["searches"]} or {True}:
            if not any(one["target"] == target and one["question"] == question for one in line["searches"]):
                rows.append(shared | {"target": target, "question": question, **_NOTHING})
    return pd.DataFrame(rows)


_NOTHING = {
    "words": 0, "drop": float("nan"), "log_probability": float("nan"), "sentence_drop": float("nan"), "evidence": "",
    "start": -1, "stop": -1, "sentence": "", "sentence_hit": False, "f1": 0.0, "exact_match": False, "chance_f1": 0.0,
}  # fmt: skip


@lru_cache(maxsize=4096)
def _chance(
    context: str, language: str, gold: tuple[str, ...], words: tuple[Span, ...], count: int, normaliser: Normaliser
) -> float:
    """Mean F1 of spans of ``count`` words anywhere in the context: all, or ``RANDOM_SPANS`` at equal distances."""
    starts = range(len(words) - count + 1)
    chosen = (
        [starts[len(starts) * i // RANDOM_SPANS] for i in range(RANDOM_SPANS)] if len(starts) > RANDOM_SPANS else starts
    )
    texts = [context[words[start][0] : words[start + count - 1][1]] for start in chosen]
    return sum(score(text, gold, language, normaliser).f1 for text in texts) / len(texts)
