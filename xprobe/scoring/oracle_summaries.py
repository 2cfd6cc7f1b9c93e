"""Means of what the oracle found, beside those of the answers and of the controls, with intervals over paragraphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from xprobe.phases.bootstrap import ClusterBootstrap, Estimate

# of each target: name in the summary -> column of oracle.parquet, and whether the prompt held the question
FIGURES = {
    "f1": ("f1", True),
    "exact_match": ("exact_match", True),
    "sentence_hit": ("sentence_hit", True),
    "random_f1": ("chance_f1", True),
    "f1_without_question": ("f1", False),
    "sentence_hit_without_question": ("sentence_hit", False),
}
KEYS = ["setting", "language", "question_id", "paragraph"]


def summarise_oracle(table: pd.DataFrame, draws: int, seed: int) -> dict[str, Any]:
    """Summaries of each setting, and of each of its languages.

    Parameters
    ----------
    table : DataFrame
        One row per search: ``KEYS``, target, question, f1, exact_match, sentence_hit, chance_f1, sentence_chance,
        answer_f1.
    draws : int
        Bootstrap samples of paragraphs.
    seed : int

    Returns
    -------
    dict
        By setting: ``n``, ``answer_f1``, ``random_sentence``, ``oracle_minus_f1`` (own target; both in the same draws),
        and for each target a dict with ``FIGURES``, each {value, lo, hi}; ``languages`` has the same for each language.
        A figure that was not measured is left out.

    Examples
    --------
    >>> table = pd.DataFrame({
    ...     "setting": "en-x", "language": "en", "question_id": list("ab"), "paragraph": list("pq"), "target": "own",
    ...     "question": True, "f1": [1.0, 0.5], "exact_match": [True, False], "sentence_hit": [True, True],
    ...     "chance_f1": [0.1, 0.1], "sentence_chance": [0.2, 0.2], "answer_f1": [0.0, 0.5],
    ... })
    >>> found = summarise_oracle(table, draws=50, seed=0)["en-x"]
    >>> found["own"]["f1"]["value"], found["oracle_minus_f1"]["value"], sorted(found["own"])
    (0.75, 0.5, ['exact_match', 'f1', 'random_f1', 'sentence_hit'])
    """
    wide = _wide(table)
    bootstrap = ClusterBootstrap(wide["paragraph"].to_numpy(), draws, seed)
    found: dict[str, Any] = {}
    for setting, rows in wide.groupby("setting", sort=False):
        languages = {str(name): _summary(own, bootstrap) for name, own in rows.groupby("language", sort=False)}
        found[str(setting)] = {**_summary(rows, bootstrap), "languages": languages}
    return found


def _wide(table: pd.DataFrame) -> pd.DataFrame:
    """One row per example: its answer, and every figure of every target as a column (target, figure)."""
    first = table.drop_duplicates(KEYS).reset_index(drop=True)
    wide = first[KEYS].copy()
    wide["answer_f1"], wide["random_sentence"] = first["answer_f1"], first["sentence_chance"]
    for (target, asked), rows in table.groupby(["target", "question"], sort=False):
        aligned = first[KEYS].merge(rows, on=KEYS, how="left", validate="one_to_one")
        for name, (column, with_question) in FIGURES.items():
            if with_question == asked:
                wide[f"{target}/{name}"] = aligned[column].to_numpy(np.float64)
    if "own/f1" in wide:
        wide["oracle_minus_f1"] = wide["own/f1"] - wide["answer_f1"]
    return wide


def _summary(rows: pd.DataFrame, bootstrap: ClusterBootstrap) -> dict[str, Any]:
    columns = [name for name in rows.columns if name not in KEYS]
    value, lo, hi, _ = bootstrap.mean(rows[columns].to_numpy(np.float64), rows.index.to_numpy())
    found: dict[str, Any] = {"n": len(rows)}
    for name, *part in zip(columns, value.tolist(), lo.tolist(), hi.tolist(), strict=True):
        target, _, figure = name.rpartition("/")
        place = found.setdefault(target, {}) if target else found
        place[figure] = Estimate(*part).to_dict()
    return found
