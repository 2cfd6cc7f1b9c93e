"""Small SQuAD v1.1 documents to spoil, and the folder of the real XQuAD."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

# (context, [(id, question, answer), ...]) of one paragraph
Paragraph = tuple[str, Sequence[tuple[str, str, str]]]


def squad(paragraphs: Sequence[Paragraph]) -> dict[str, Any]:
    """A valid document with one article; every answer stands where its text is first found."""
    return {
        "version": "1.1",
        "data": [
            {
                "title": "T",
                "paragraphs": [
                    {
                        "context": context,
                        "qas": [
                            {
                                "id": id_,
                                "question": question,
                                "answers": [{"text": answer, "answer_start": context.index(answer)}],
                            }
                            for id_, question, answer in questions
                        ],
                    }
                    for context, questions in paragraphs
                ],
            }
        ],
    }


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``NAME.<lang>.json`` for every language given as paragraphs; returns the folder."""

    def write(languages: Mapping[str, Sequence[Paragraph]], name: str = "small", folder: str = "set") -> Path:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        for language, paragraphs in languages.items():
            text = json.dumps(squad(paragraphs), ensure_ascii=False)
            (path / f"{name}.{language}.json").write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def xquad_folder() -> Path:
    named = os.environ.get("XPROBE_XQUAD_DIR")
    if not named:
        pytest.skip("XPROBE_XQUAD_DIR is not set: point it at a folder of xquad.<lang>.json to check the real XQuAD")
    return Path(named)
