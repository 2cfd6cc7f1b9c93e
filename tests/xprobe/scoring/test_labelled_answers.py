"""The rules of error types against labels by hand, on wrong answers of real models to the built-in questions.

``labelled_answers.json`` holds answers with an F1 under 0.5. One person read them and labelled each ``blank``,
``refusal``, ``wrong language``, ``gibberish`` or ``content``. The rule on repetition was chosen on those of SmolLM2;
the labels of Qwen2.5-Coder came later, by a reader who did not know the rules.
``python tests/xprobe/scoring/test_labelled_answers.py`` prints the confusion table.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from xprobe.qa.parallel import load_data
from xprobe.scoring.error_types import ERROR_TYPES, classify

ANSWERS: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("labelled_answers.json").read_text(encoding="utf-8")
)
MODELS = sorted({answer["model"] for answer in ANSWERS})


def confusion(model: str) -> Counter[tuple[str, str]]:
    """How many answers of a model have each (label, type)."""
    records = load_data("builtin").records
    found: Counter[tuple[str, str]] = Counter()
    for answer in ANSWERS:
        if answer["model"] == model:
            language = "en" if answer["setting"] == "en-x" else answer["language"]
            context = records[language][answer["question_id"]].context
            found[answer["label"], classify(answer["answer"], 0.0, language, context)] += 1
    return found


@pytest.mark.parametrize("model", MODELS)
def test_the_rules_agree_with_labels_by_hand(model: str) -> None:
    table = confusion(model)
    agreed = sum(count for (label, kind), count in table.items() if label == kind)
    assert agreed >= 0.9 * table.total(), table


def test_there_are_enough_labels() -> None:
    assert len(ANSWERS) >= 150
    assert len(MODELS) == 2
    assert {answer["label"] for answer in ANSWERS} <= set(ERROR_TYPES)
    assert min(Counter(answer["label"] for answer in ANSWERS).values()) >= 40


if __name__ == "__main__":
    for name in MODELS:
        table = confusion(name)
        agreed = sum(count for (label, kind), count in table.items() if label == kind)
        print(f"{name}: {agreed} of {table.total()} agree")
        for (label, kind), count in sorted(table.items()):
            print(f"  label {label:15} rule {kind:15} {count}")
