"""Generates the answers of a run, and keeps them line by line in ``answers.jsonl``: one line for each context group.

A line holds the context and the gold answers too, so that answers are scored without the model and the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xprobe.capture.generation import Generated
from xprobe.capture.plan import Wave
from xprobe.capture.requests import Each, Group, Request
from xprobe.capture.runner import Runner
from xprobe.events import Step
from xprobe.models.anatomy import input_device
from xprobe.qa.prompts import Prompt
from xprobe.qa.stopping import stop_tokens
from xprobe.runs.identity import checksum_of, run_key
from xprobe.runs.lines import KeptLines
from xprobe.runs.manifest import ExecutionEntry
from xprobe.scoring.settings import AnswerSettings
from xprobe.stages.opening import AskedModel, open_prompts
from xprobe.stages.requests import strategy_sample
from xprobe.stages.run import Run
from xprobe.timing import Stopwatch

LINES = "answers.jsonl"
STEP = "answers"  # of the events that count examples
FEWEST_TOKENS, MOST_TOKENS = 32, 128  # bounds of the default number of new tokens
DEFINITION = 2  # raised when other answers would be generated, or lines hold other things
Line = dict[str, Any]


def answers_key(run: Run, settings: AnswerSettings) -> str:
    """Checksum of everything that generated answers depend on."""
    return checksum_of(
        {"run": run_key(run.manifest.to_dict()), "most": settings.max_new_tokens, "definition": DEFINITION}
    )


def kept_answers(run: Run, settings: AnswerSettings) -> KeptLines:
    """The lines of this run in ``answers.jsonl``, by group."""
    return KeptLines(run.folder.path / LINES, answers_key(run, settings), lambda line: line["group"])


def generate_missing(run: Run, asked: AskedModel, settings: AnswerSettings, watch: Stopwatch) -> ExecutionEntry:
    """Generates the answers that ``answers.jsonl`` lacks, wave by wave.

    A wave of prompts that share their beginnings generates together, and is written before the next one begins.

    Raises
    ------
    XprobeError
        Says what is wrong and what is kept: lines that were written stay valid.
    """
    runner, tokenizer, prompts = open_prompts(run, asked, watch)
    stop = stop_tokens(tokenizer, asked.questions.template, getattr(runner.model, "generation_config", None))
    limits = most_tokens(prompts, settings.max_new_tokens)
    requests = {id(prompt): _request(prompt) for prompt in prompts}
    by_group: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_group.setdefault(prompt.example.group, []).append(prompt)
    groups = [Group(key, tuple(requests[id(one)] for one in members)) for key, members in by_group.items()]
    with run.failing(lambda: f"what {run.folder.path} holds stays"), watch.timed("check of sharing"):
        runner.choose_strategy(strategy_sample(list(requests.values())))
    execution = run.execution_entry(str(input_device(runner.model)))
    kept = kept_answers(run, settings)
    have = kept.read()
    done = sum(len(by_group[key]) for key in have if key in by_group)
    run.notify(Step(STEP, done, len(prompts)))
    with run.failing(lambda: f"{done} of {len(prompts)} answers are kept in {run.folder.path / LINES}"):
        for wave in runner.plan(groups).waves:
            if all(group.key in have for group in wave.groups):
                continue
            with watch.timed("generation"):
                answers = _generate_wave(runner, wave, by_group, limits, stop)
            lines = [
                _line(members, texts, tokenizer) for members, texts in answers if members[0].example.group not in have
            ]
            kept.append(lines)
            done += sum(len(line["answers"]) for line in lines)
            run.notify(Step(STEP, done, len(prompts)))
    report = runner.report()
    execution.strategy, execution.warnings = report.strategy, list(report.warnings)
    return execution


def most_tokens(prompts: Sequence[Prompt], given: int | None) -> dict[str, int]:
    """The most tokens of an answer, by the language of the context.

    By default, as many as the longest gold answer in that language has, but at least 32 and at most 128: a tokenizer
    may need many tokens for a language that it hardly knows.
    """
    longest: dict[str, int] = {}
    for prompt in prompts:
        language = prompt.example.context_language
        longest[language] = max(longest.get(language, FEWEST_TOKENS), len(prompt.targets))
    return {language: given or min(count, MOST_TOKENS) for language, count in longest.items()}


def _request(prompt: Prompt) -> Request:
    ids = prompt.ids[: prompt.length]
    return Request(ids, {"last": Each((len(ids) - 1,))}, prompt.example.group)


def _generate_wave(
    runner: Runner, wave: Wave, prompts: Mapping[str, Sequence[Prompt]], limits: Mapping[str, int], stop: frozenset[int]
) -> list[tuple[Sequence[Prompt], list[Generated]]]:
    """The prompts of each group of a wave, and their answers."""
    members = [prompt for group in wave.groups for prompt in prompts[group.key]]
    answers = iter(
        runner.generate(
            [prompt.ids[: prompt.length] for prompt in members],
            [limits[prompt.example.context_language] for prompt in members],
            stop,
        )
    )
    return [(prompts[group.key], [next(answers) for _ in prompts[group.key]]) for group in wave.groups]


def _line(prompts: Sequence[Prompt], answers: Sequence[Generated], tokenizer: Any) -> Line:
    """The line of one group."""
    first = prompts[0].example
    return {
        "group": first.group,
        "setting": first.setting,
        "paragraph": first.paragraph,
        "context_language": first.context_language,
        "context": first.context,
        "answers": [
            {
                "language": prompt.example.language,
                "question_id": prompt.example.question_id,
                "gold": list(prompt.example.answers),
                "answer": tokenizer.decode(
                    answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                ).strip(),
                "ids": list(answer.ids),
                "tokens": len(answer.ids),
                "log_probability": sum(answer.log_probabilities),
                "stopped": answer.stopped,
            }
            for prompt, answer in zip(prompts, answers, strict=True)
        ],
    }
