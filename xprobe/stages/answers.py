"""Stage "answers": what the model says after each prompt, and how good it is.

model -> prompts -> greedy generation -> answers.jsonl -> scores, error types -> answers.parquet, summaries
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.events import Note, Stage
from xprobe.results import read_tables
from xprobe.runs.folder import EXAMPLES
from xprobe.scoring.error_types import classify
from xprobe.scoring.languages import identify, is_known
from xprobe.scoring.letters import base_language
from xprobe.scoring.measures import score
from xprobe.scoring.normalisers import Normaliser, get_normaliser, languages_without_articles_rule
from xprobe.scoring.relations import correlations, curves_by_outcome
from xprobe.scoring.settings import ANSWER_COLUMNS, AnswerSettings
from xprobe.scoring.summaries import summarise
from xprobe.stages.generation import LINES, AskedModel, Line, generate_missing, kept_answers
from xprobe.stages.run import Run
from xprobe.stages.shards import read_signals
from xprobe.timing import Stopwatch

NAME = "answers"
ORACLE = "oracle"  # the stage that is about these answers
ANSWERS, CURVES = "answers.parquet", "answers_by_layer.parquet"
KEYS = ["setting", "language", "question_id", "paragraph"]
PHASES = ("onset", "sharpness", "late_readiness", "gold_log_probability")  # which F1 is correlated with
SIGNALS = ("readiness", "rank", "log_probability")  # whose means are taken apart by outcome


def compute(run: Run, settings: AnswerSettings, open_model: Callable[[], AskedModel]) -> None:
    """Writes ``answers.parquet`` and ``answers_by_layer.parquet``, and enters the stage in the manifest.

    Needs the stages "states" and "phases".

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
        normaliser.check_language(language)  # before anything is generated, as the next two lines
        normaliser.words("a", language)  # says which package is missing
    identify("a")  # the same
    kept = kept_answers(run, settings)
    lines = kept.read()
    before = run.manifest.stages.get(NAME)
    if set(run.manifest.groups) - lines.keys():
        executions = [generate_missing(run, open_model(), settings, watch)]
        lines = kept.read()
    else:
        run.notify(Note(f"the answers are those in {LINES}"))
        executions = before.executions if before is not None else [run.execution_entry()]
    run.notify(Stage("scores"))
    with watch.timed("scores"):
        table = pd.concat(
            [scored(lines[group], normaliser, settings.threshold) for group in run.manifest.groups], ignore_index=True
        )
        frame, signals = read_signals(run.folder, run.manifest)
        (examples,) = read_tables(run.folder, run.manifest, (EXAMPLES,))
        table = _with_phases(table, frame, signals, examples)
        summaries = summarise(table, study.bootstrap, study.seed)
        for setting, found in correlations(table, PHASES, study.bootstrap, study.seed).items():
            summaries[setting]["correlations"] = found
        curves = curves_by_outcome(
            table, {name: signals[name] for name in SIGNALS}, (table["error_type"] == "correct").to_numpy(),
            study.bootstrap, study.seed,
        )  # fmt: skip
        with run.folder.writing_tables({ANSWERS: table[list(ANSWER_COLUMNS)], CURVES: curves}) as digests:
            pass
    kept.tidy(run.manifest.groups)
    results = {
        "normaliser": normaliser.name,
        "threshold": settings.threshold,
        "max_new_tokens": settings.max_new_tokens,
        "settings": summaries,
    }
    warnings = [warning for one in executions for warning in one.warnings]
    languages = sorted({str(one) for one in table["context_language"]})
    if missing := _missing_rules(normaliser.name, languages):
        warnings.append(missing)
        run.notify(Note(missing))
    run.entry(NAME, watch, tables=digests, results=results, warnings=warnings, executions=executions)
    oracle = run.manifest.stages.get(ORACLE)
    if oracle is not None and oracle.results.get("answers_key") != kept.key:
        run.forget(ORACLE, "was computed for other answers")


def _missing_rules(normaliser: str, languages: list[str]) -> str:
    """What scoring does not know of languages, in one sentence; ``""`` if there is nothing."""
    facts = {
        "which words are articles in": languages_without_articles_rule(normaliser, languages),
        "how to recognise": [language for language in languages if not is_known(base_language(language))],
    }
    known = [f"{what} {', '.join(of)}" for what, of in facts.items() if of]
    return f"scoring does not know {' and '.join(known)} (docs/data.md, Languages)" if known else ""


def _with_phases(
    table: pd.DataFrame, frame: pd.DataFrame, signals: dict[str, NDArray[np.float64]], examples: pd.DataFrame
) -> pd.DataFrame:
    """The answers in the order of ``frame`` [N], with what the run knows of the same examples.

    ``late_readiness`` is the mean readiness over the last quarter of the layers, without the last one, where the lens
    is the model itself.
    """
    layers = signals["readiness"].shape[1]
    late = signals["readiness"][:, min(layers * 3 // 4, layers - 2) : layers - 1].mean(1)
    known = frame[KEYS].assign(
        gold_log_probability=signals["log_probability"][:, -1] * frame["answer_tokens"].to_numpy(),
        late_readiness=late,
    )
    known = known.merge(examples[[*KEYS, "onset", "sharpness"]], on=KEYS, how="left", validate="one_to_one")
    return known.merge(table, on=KEYS, how="left", validate="one_to_one")


def scored(line: Line, normaliser: Normaliser, threshold: float) -> pd.DataFrame:
    """One row per answer of a line of ``answers.jsonl``: the answer and its scores.

    Examples
    --------
    >>> answer = {"language": "de", "question_id": "q1", "gold": ["40"], "answer": "The 40 boats", "tokens": 3,
    ...           "log_probability": -1.5, "stopped": True}
    >>> line = {"setting": "en-x", "paragraph": "p1", "context_language": "en", "context": "Ada sold 40 boats.",
    ...         "answers": [answer]}
    >>> row = scored(line, get_normaliser("xprobe"), 0.5).iloc[0]
    >>> round(float(row["f1"]), 3), bool(row["exact_match"]), row["error_type"]
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
                **{name: value for name, value in answer.items() if name not in ("gold", "ids")},
                "gold": answer["gold"][0],
                "f1": f1,
                "exact_match": exact_match,
                "error_type": kind,
                "answer_language": identify(answer["answer"]).language,
                "normaliser": normaliser.name,
            }
        )
    return pd.DataFrame(rows)
