"""Stage "answers": what the model says after each prompt, and how good it is.

model -> prompts -> greedy generation -> answers.jsonl -> scores, error types -> answers.parquet, summaries
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from xprobe.config import ANSWER_COLUMNS, AnswerSettings
from xprobe.events import Note, Stage
from xprobe.runs.lines import rewrite_lines
from xprobe.scoring.error_types import classify
from xprobe.scoring.languages import identify
from xprobe.scoring.measures import score
from xprobe.scoring.normalisers import Normaliser, get_normaliser
from xprobe.scoring.summaries import summarise
from xprobe.stages.generation import LINES, AskedModel, Line, generate_missing, read_answers
from xprobe.stages.run import Run
from xprobe.stages.shards import gold_log_probabilities
from xprobe.timing import Stopwatch

NAME = "answers"
ANSWERS = "answers.parquet"
KEYS = ["setting", "language", "question_id", "paragraph"]


def compute(run: Run, settings: AnswerSettings, open_model: Callable[[], AskedModel]) -> None:
    """Writes ``answers.parquet``, and enters the stage in the manifest. Needs the stage "states".

    Parameters
    ----------
    run : Run
    settings : AnswerSettings
    open_model : callable () -> AskedModel
        Called only if answers are missing. Answers that ``answers.jsonl`` holds are scored without it.

    Raises
    ------
    XprobeError
        Says what is wrong and what is kept.
    """
    watch, study = Stopwatch(), run.manifest.study
    normaliser = get_normaliser(settings.normaliser)
    for language in sorted({group.split("/")[1] for group in run.manifest.groups}):
        normaliser.check_language(language)  # before anything is generated
    lines = read_answers(run, settings)
    before = run.manifest.stages.get(NAME)
    if len(lines) < len(run.manifest.groups):
        executions = [generate_missing(run, open_model(), settings, watch)]
        lines = read_answers(run, settings)
    else:
        run.notify(Note(f"the answers are those in {LINES}"))
        executions = before.executions if before is not None else [run.execution_entry()]
    run.notify(Stage("scores"))
    with watch.timed("scores"):
        table = pd.concat([scored(line, normaliser, settings.threshold) for line in lines.values()], ignore_index=True)
        gold = gold_log_probabilities(run.folder, run.manifest)
        table = table.merge(gold, on=KEYS, how="left", validate="one_to_one")[list(ANSWER_COLUMNS)]
        summaries = summarise(table, study.bootstrap, study.seed)
        digest = run.folder.write_table(ANSWERS, table)
    rewrite_lines(run.folder.path / LINES, list(lines.values()))
    results = {
        "normaliser": normaliser.name,
        "threshold": settings.threshold,
        "max_new_tokens": settings.max_new_tokens,
        "settings": summaries,
    }
    warnings = [warning for one in executions for warning in one.warnings]
    run.entry(NAME, watch, tables={ANSWERS: digest}, results=results, warnings=warnings, executions=executions)


def scored(line: Line, normaliser: Normaliser, threshold: float) -> pd.DataFrame:
    """One row per answer of a line of ``answers.jsonl``: the answer and its scores.

    Examples
    --------
    >>> answer = {"language": "de", "question_id": "q1", "gold": ["40"], "answer": "The 40 boats", "tokens": 3,
    ...           "log_probability": -1.5, "stopped": True}
    >>> line = {"setting": "en-x", "paragraph": "p1", "context_language": "en", "context": "Ada sold 40 boats.",
    ...         "answers": [answer]}
    >>> row = scored(line, get_normaliser("xprobe"), 0.5).iloc[0]
    >>> round(row["f1"], 3), bool(row["exact_match"]), row["error_type"]
    (0.667, False, 'correct')
    """
    rows = []
    for answer in line["answers"]:
        f1, exact_match = score(answer["answer"], answer["gold"], line["context_language"], normaliser)
        kind = classify(answer["answer"], f1, line["context_language"], line["context"], threshold)
        rows.append(
            {
                "setting": line["setting"],
                "paragraph": line["paragraph"],
                "context_language": line["context_language"],
                **{name: value for name, value in answer.items() if name != "gold"},
                "gold": answer["gold"][0],
                "f1": f1,
                "exact_match": exact_match,
                "error_type": kind,
                "answer_language": identify(answer["answer"]).language,
                "normaliser": normaliser.name,
            }
        )
    return pd.DataFrame(rows)
