"""Stage "oracle": could the model find the answer, whatever it then says? (oracle definition 1)

model -> prompts with words of the context removed -> drops of log-probability -> oracle.jsonl -> evidence -> oracle.parquet
"""  # noqa: E501 - the flow is one line

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from xprobe.capture.plan import Strategy, make_plan, rotary_limit
from xprobe.capture.requests import group_requests
from xprobe.capture.runner import Runner
from xprobe.errors import UsageError
from xprobe.events import Note, Stage, Step
from xprobe.models import loading
from xprobe.models.anatomy import input_device
from xprobe.qa.prompts import Prompt
from xprobe.qa.selection import order_questions
from xprobe.runs.identity import checksum_of
from xprobe.runs.lines import append_lines, read_lines, rewrite_lines
from xprobe.runs.manifest import ExecutionEntry
from xprobe.scoring.evidence import DEFINITION, Search, Words
from xprobe.scoring.measures import score
from xprobe.scoring.normalisers import Normaliser, get_normaliser
from xprobe.scoring.oracle_summaries import summarise_oracle
from xprobe.scoring.settings import ORACLE_COLUMNS, TARGETS, AnswerSettings, OracleSettings
from xprobe.scoring.words import Span, word_spans
from xprobe.stages import answers
from xprobe.stages.generation import answers_key, read_answers
from xprobe.stages.opening import AskedModel, open_prompts, usable_prompts
from xprobe.stages.removal import (
    MOST_TARGET_TOKENS,
    Case,
    Hidden,
    Text,
    Tokens,
    count_tokens,
    filler_token,
    run_searches,
)
from xprobe.stages.requests import strategy_sample, study_request
from xprobe.stages.run import Run
from xprobe.timing import Stopwatch

NAME = "oracle"
LINES, TABLE = "oracle.jsonl", "oracle.parquet"
MOST_SPAN = 8  # words of the evidence
WAVE = 16  # a wave of examples runs about so many times the tokens of one pass; then it is written
RANDOM_SPANS = 64  # most random spans of a control
SAMPLE = 3  # waves of which a forecast counts the tokens
Line = dict[str, Any]
Key = tuple[str, str, str]  # setting, language, question id


@dataclass(frozen=True)
class OracleForecast:
    """What the oracle would take.

    Attributes
    ----------
    examples : int
    removals : int
        Texts to run, each with a span removed. An estimate: which words are removed depends on the results.
    tokens : int
        Tokens of the forward passes, likewise.
    states_tokens : int
        Tokens that the passes of the stage "states" ran, for comparison.
    seconds : float, optional
        At the speed of the stage "states"; None where it is not known.
    """

    examples: int
    removals: int
    tokens: int
    states_tokens: int
    seconds: float | None

    def __str__(self) -> str:
        times = f", {self.tokens / self.states_tokens:.0f} times those of the states" if self.states_tokens else ""
        speed = "" if self.seconds is None else f"; {_duration(self.seconds)} at their speed"
        return (
            f"{self.examples} answers, about {self.removals:,} removals, {_millions(self.tokens)} million tokens{times}"
            f"{speed}"
        )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}" if count >= 1e5 else f"{count / 1e6:.2g}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{max(1, round(minutes))} minutes"


def compute(run: Run, settings: OracleSettings, open_model: Callable[[], AskedModel]) -> None:
    """Writes ``oracle.parquet``, and enters the stage in the manifest. Computes the stage "answers" where it is missing.

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
    watch, study = Stopwatch(), run.manifest.study
    normaliser = get_normaliser(settings.normaliser)
    generated = _generated(run)
    if len(generated) < run.manifest.counts.examples:
        answers.compute(run, _answer_settings(run, settings), open_model)
        generated = _generated(run)
    for one in generated.values():
        normaliser.check_language(one["context_language"])
    wanted = _chosen(generated, settings.limit)
    before = run.manifest.stages.get(NAME)
    if wanted.keys() - _read(run, settings).keys():
        executions = [_search_missing(run, open_model(), settings, wanted, watch)]
    else:
        run.notify(Note(f"the evidence is that in {LINES}"))
        executions = before.executions if before is not None else [run.execution_entry()]
    run.notify(Stage("scores"))
    with watch.timed("scores"):
        found = _read(run, settings)
        table = pd.concat([scored(found[key], normaliser) for key in wanted], ignore_index=True)
        summaries = summarise_oracle(table, study.bootstrap, study.seed)
        with run.folder.writing_tables({TABLE: table[list(ORACLE_COLUMNS)]}) as digests:
            pass
    _tidy(run, settings, wanted)
    results = {**asdict(settings), "definition": DEFINITION, "settings": summaries}
    warnings = [warning for one in executions for warning in one.warnings]
    run.entry(NAME, watch, tables=digests, results=results, warnings=warnings, executions=executions)


def forecast(
    run: Run,
    settings: OracleSettings,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    strategy: Strategy = "tree",
    max_shared_tokens: int | None = None,
) -> OracleForecast:
    """What the oracle would take, counted on a few waves of examples. No weights are read.

    Which words are removed depends on the results. The forecast takes the sentence and the words of the gold answer.
    """
    budget = _budget(run)
    wanted = _chosen(_generated(run), settings.limit)
    waves = _waves(prompts, wanted, settings, budget, guess=True)
    sample = waves[:: max(1, len(waves) // SAMPLE)][:SAMPLE]
    hidden = _hidden(settings, tokenizer)
    removals = tokens = 0

    def measure(texts: list[Text]) -> list[float]:
        nonlocal removals, tokens
        removals += len(texts)
        tokens += count_tokens(texts, budget, strategy, max_shared_tokens)
        return [0.0] * len(texts)

    for wave in sample:
        run_searches([case for cases in wave.values() for case in cases], hidden, measure)
    scale = len(wanted) / max(1, sum(map(len, sample)))
    groups = group_requests([study_request(prompt) for prompt in prompts])
    whole = make_plan(groups, budget, strategy, max_shared_tokens).tokens_run
    forward = run.manifest.stages["states"].seconds.get("forward")
    tokens = round(tokens * scale)
    return OracleForecast(
        len(wanted), round(removals * scale), tokens, whole, forward * tokens / whole if forward else None
    )


def forecast_run(run: Run, settings: OracleSettings, asked: AskedModel) -> OracleForecast:
    """The forecast of a run that has answers. Reads the tokenizer and the model's configuration, no weights.

    Raises
    ------
    UsageError
        The run has no answers, or those of an older version.
    """
    if len(_generated(run)) < run.manifest.counts.examples:
        raise UsageError(f"the run in {run.folder.path} has no answers yet: xprobe.evaluate, or `xprobe evaluate`")
    trust = run.execution.trust_remote_code
    config = loading.load_config(asked.source, trust)
    tokenizer = loading.load_tokenizer(asked.source, trust)
    prompts = usable_prompts(asked.questions, tokenizer, loading.window(config))
    strategy = run.manifest.stages["states"].results["plan"]["strategy"]
    return forecast(run, settings, prompts, tokenizer, strategy, rotary_limit(config))


# -- what to search --------------------------------------------------------------------------------------------------


def _answer_settings(run: Run, settings: OracleSettings) -> AnswerSettings:
    """Those of the run's answers; the defaults if it has none."""
    entry = run.manifest.stages.get(answers.NAME)
    if entry is None:
        return AnswerSettings(normaliser=settings.normaliser)
    return AnswerSettings(**{name: entry.results[name] for name in ("max_new_tokens", "normaliser", "threshold")})


def _generated(run: Run) -> dict[Key, Line]:
    """Every generated answer of the run, with its context and gold answers, in the order of the run."""
    lines = read_answers(run, _answer_settings(run, OracleSettings())).values()
    shared = ("setting", "paragraph", "context_language", "context")
    return {
        (line["setting"], answer["language"], answer["question_id"]): {
            **{name: line[name] for name in shared}, **answer
        }
        for line in lines
        for answer in line["answers"]
    }  # fmt: skip


def _chosen(generated: dict[Key, Line], limit: int | None) -> dict[Key, Line]:
    """The answers to the first ``limit`` questions, in the order in which a study takes them."""
    paragraphs: dict[str, dict[str, None]] = {}
    for (_, _, question), line in generated.items():
        paragraphs.setdefault(line["paragraph"], {})[question] = None
    taken = set(order_questions([list(questions) for questions in paragraphs.values()])[:limit])
    return {key: line for key, line in generated.items() if key[2] in taken}


def _waves(
    prompts: Sequence[Prompt], wanted: dict[Key, Line], settings: OracleSettings, budget: int, *, guess: bool = False
) -> list[dict[Key, list[Case]]]:
    """The searches of all wanted examples, in waves: examples on one context, then on one question, lie together.

    The waves depend on the wanted examples alone, so a resumed run computes each as before.
    """
    places: dict[tuple[str, str], int] = {}
    for prompt in prompts:
        places.setdefault((prompt.example.context, prompt.example.question_id), len(places))
        places.setdefault((prompt.example.context, ""), len(places))
    chosen = sorted(
        (prompt for prompt in prompts if _key(prompt) in wanted),
        key=lambda one: (places[one.example.context, ""], places[one.example.context, one.example.question_id]),
    )
    waves: list[dict[Key, list[Case]]] = []
    filled = 0
    searches: dict[Text, Search] = {}
    longest = _longest_answers(wanted.values())
    for prompt in chosen:
        cases = _cases(prompt, wanted[_key(prompt)], settings, longest[prompt.example.context_language], searches, guess)
        size = sum(map(_rough_tokens, cases))
        if not waves or filled + size > WAVE * budget:
            waves.append({})
            filled = 0
            searches.clear()
        filled += size
        waves[-1][_key(prompt)] = cases
    return waves


@dataclass
class _Guess(Search):
    """A search that takes the words of the gold answer for the evidence."""

    gold: Span = (0, 0)

    def take(self, drops: Sequence[float]) -> None:
        overlaps = [min(stop, self.gold[1]) - max(start, self.gold[0]) for start, stop in self.wanted()]
        super().take([float(max(0, overlap)) for overlap in overlaps])


def _cases(
    prompt: Prompt, line: Line, settings: OracleSettings, most: int, searches: dict[Text, Search], guess: bool
) -> list[Case]:
    """The searches of one example: own and gold answer, with and without the question."""
    example = prompt.example
    words = _words(example.context, example.context_language, prompt.context_offsets)
    if not words.sentences:
        return []
    gold = words.overlapping((example.answer_start, example.answer_start + len(example.answer)))
    targets: dict[str, Tokens] = {"own": tuple(line["ids"]), "gold": prompt.targets}
    found = []
    for asked in (True, False) if settings.without_question else (True,):
        for name, ids in targets.items():
            if not ids:
                continue  # a blank answer hangs on nothing
            new = _Guess(words, most, settings.spans, gold=gold) if guess else Search(words, most, settings.spans)
            case = Case(prompt, name, ids[:MOST_TARGET_TOKENS], asked, new)
            case.search = searches.setdefault(case.text(None, Hidden()), new)
            found.append(case)
    return found


@lru_cache(maxsize=16)
def _words(context: str, language: str, offsets: tuple[Span, ...]) -> Words:
    return Words.find(context, language, offsets)


def _longest_answers(lines: Iterable[Line]) -> dict[str, int]:
    """Words of the longest gold answer in each language, at most ``MOST_SPAN``."""
    longest: dict[str, int] = {}
    for line in lines:
        language = line["context_language"]
        count = max(len(word_spans(gold, language)) for gold in line["gold"])
        longest[language] = min(MOST_SPAN, max(longest.get(language, 1), count))
    return longest


def _rough_tokens(case: Case) -> int:
    """Tokens that the removals of a search run, roughly: the sentences, then as many again for words and spans."""
    words, most = case.search.words, case.search.most
    removals = len(words.sentences) + len(words.tokens) // max(1, len(words.sentences)) + most * (most + 1) // 2
    prompt = case.prompt
    return removals * (prompt.length - prompt.spans["context"][1] + len(case.target))


def _hidden(settings: OracleSettings, tokenizer: Any) -> Hidden:
    return Hidden(filler_token(tokenizer) if settings.removal == "replace" else None)


def _budget(run: Run) -> int:
    return run.execution.tokens_on(loading.pick_device(run.execution.device))


def _key(prompt: Prompt) -> Key:
    return prompt.example.setting, prompt.example.language, prompt.example.question_id


# -- searching, and the lines of oracle.jsonl ---------------------------------------------------------------------------


def oracle_key(run: Run, settings: OracleSettings) -> str:
    """Checksum of everything that the evidence of an example depends on."""
    parts = {"answers": answers_key(run, _answer_settings(run, settings)), "definition": DEFINITION}
    names = ("removal", "spans", "without_question")
    return checksum_of(parts | {name: getattr(settings, name) for name in names})


def _read(run: Run, settings: OracleSettings) -> dict[Key, Line]:
    key = oracle_key(run, settings)
    lines = [line for line in read_lines(run.folder.path / LINES) if line.get("key") == key and "step" not in line]
    return {(line["setting"], line["language"], line["question_id"]): line for line in lines}


def _tidy(run: Run, settings: OracleSettings, wanted: Iterable[Key]) -> None:
    """Rewrites ``oracle.jsonl``: the wanted examples in their order, then all others; no steps of searches."""
    own, key = _read(run, settings), oracle_key(run, settings)
    lines = [line for line in read_lines(run.folder.path / LINES) if "step" not in line]
    first = {name: own[name] for name in wanted}
    rest = {name: line for name, line in own.items() if name not in first}
    others = [line for line in lines if line.get("key") != key]
    rewrite_lines(run.folder.path / LINES, [*first.values(), *rest.values(), *others])


def _search_missing(
    run: Run, asked: AskedModel, settings: OracleSettings, wanted: dict[Key, Line], watch: Stopwatch
) -> ExecutionEntry:
    """Searches the evidence of the examples that ``oracle.jsonl`` lacks, wave by wave."""
    runner, tokenizer, prompts = open_prompts(run, asked, watch)
    path, key = run.folder.path / LINES, oracle_key(run, settings)
    hidden = _hidden(settings, tokenizer)
    with run.failing(lambda: f"what {run.folder.path} holds stays"), watch.timed("check of sharing"):
        runner.choose_strategy(strategy_sample([study_request(prompt) for prompt in prompts]))
    execution = run.execution_entry(str(input_device(runner.model)))
    strategy = runner.report().strategy
    expected = forecast(run, settings, prompts, tokenizer, strategy, rotary_limit(runner.model.config))
    run.notify(Note(f"the oracle: {expected}"))
    have = _read(run, settings)
    done = len(wanted.keys() & have.keys())
    run.notify(Step(NAME, done, len(wanted)))
    with run.failing(lambda: f"{done} of {len(wanted)} examples are kept in {path}"):
        for wave in _waves(prompts, wanted, settings, _budget(run)):
            if wave.keys() <= have.keys():
                continue
            with watch.timed("removals"):
                steps = _Steps(path, key, runner)
                run_searches([case for cases in wave.values() for case in cases], hidden, steps.measure)
            lines = [{"key": key, **_line(wanted[name], cases)} for name, cases in wave.items() if name not in have]
            append_lines(path, lines)
            done += len(lines)
            run.notify(Step(NAME, done, len(wanted)))
    report = runner.report()
    execution.strategy, execution.warnings = report.strategy, list(report.warnings)
    return execution


class _Steps:
    """The steps of the searches of one wave. Each is kept as a line, and not measured again after a kill."""

    def __init__(self, path: Path, key: str, runner: Runner) -> None:
        self._path, self._key, self._runner = path, key, runner
        self._kept = {line["step"]: line["values"] for line in read_lines(path) if "step" in line}

    def measure(self, texts: list[Text]) -> list[float]:
        step = checksum_of({"key": self._key, "texts": [[list(prompt), list(answer)] for prompt, answer in texts]})
        if step not in self._kept:
            values = self._runner.log_probabilities(texts)
            append_lines(self._path, [{"key": self._key, "step": step, "values": values}])
            self._kept[step] = values
        return self._kept[step]


def _line(generated: Line, cases: Sequence[Case]) -> Line:
    """The line of one example: what was found, as places in the context, and what scoring needs."""
    names = ("setting", "language", "question_id", "paragraph", "context_language", "context", "gold", "answer")
    words = cases[0].search.words if cases else Words((), (), ())
    example = cases[0].prompt.example if cases else None
    return {
        **{name: generated[name] for name in names},
        "answer_start": example.answer_start if example else -1,
        "words": words.characters,
        "sentences": [words.characters_of(span) for span in words.sentences],
        "searches": [_found(case) for case in cases],
    }


def _found(case: Case) -> Line:
    search, place = case.search, case.search.words.characters_of
    drops = [[*place(span), round(drop, 5)] for step in search.steps for span, drop in step.items()]
    return {
        "target": case.name,
        "question": case.asked,
        "log_probability": case.log_probability,
        "sentence": place(search.sentence.span),
        "sentence_drop": search.sentence.drop,
        "evidence": place(search.evidence.span),
        "words": search.evidence.span[1] - search.evidence.span[0],
        "drop": search.evidence.drop,
        **({"drops": drops} if case.asked else {}),
    }


# -- scores ---------------------------------------------------------------------------------------------------------


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
    >>> print(row["evidence"], row["f1"], row["chance_f1"], row["sentence_hit"], row["sentence_chance"], row["answer_f1"])
    40 1.0 0.2 True 0.5 0.0
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
    """Mean F1 of spans of ``count`` words anywhere in the context: of all, or of ``RANDOM_SPANS`` at equal distances."""
    starts = range(len(words) - count + 1)
    chosen = [starts[len(starts) * i // RANDOM_SPANS] for i in range(RANDOM_SPANS)] if len(starts) > RANDOM_SPANS else starts
    texts = [context[words[start][0] : words[start + count - 1][1]] for start in chosen]
    return sum(score(text, gold, language, normaliser).f1 for text in texts) / len(texts)
