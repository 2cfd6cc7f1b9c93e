"""The lens of one prompt: what it shows, in every script and width, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.families import save_tiny_model
from xprobe_cli.main import main

import xprobe
from xprobe.single_prompt.layout import display_width
from xprobe.single_prompt.lens import PromptLens

PROMPT = "who built the old tower"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("lens") / "model"))


def made(texts: list[str], positions: int = 1) -> PromptLens:
    """A lens of two layers that says these texts."""
    best = [[[(text, 0.5) for text in texts] for _ in range(positions)]] * 2
    tokens = [f" t{i}" for i in range(positions)]
    return PromptLens("model", "logit", tokens, tuple(range(positions)), best, np.zeros((2, positions)))


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("positions", [1, 30])
def test_tables_fit_the_terminal_in_every_script(width: int, positions: int) -> None:
    texts = ["東京都知事選挙の結果", "กรุงเทพมหานคร", "القاهرة الكبرى في مصر", "Ⅷ​ x", "a\nb\tc", "naïve"]
    lines = made(texts, positions).to_text(width).splitlines()
    assert max(map(display_width, lines)) <= width
    rows = [line for line in lines if line.strip()[:1].isdigit()]
    assert len(rows) == 2
    if positions == 30:
        assert any(line.startswith("the last ") for line in lines)


def test_the_page_is_one_file_with_every_token(tmp_path: Path) -> None:
    page = made(["<script>alert(1)</script>", "القاهرة"]).to_html()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page
    assert page.startswith("<!doctype html>")
    assert "<html" not in made(["x"])._repr_html_()


def test_positions_and_answers(model: str) -> None:
    last = xprobe.lens_prompt(model, PROMPT, answer="boats sold")
    every = xprobe.lens_prompt(model, PROMPT, answer="boats sold", positions="all")
    answer = xprobe.lens_prompt(model, PROMPT, answer="boats sold", positions="answer", top=1)
    assert len(every.positions) == len(every.tokens)
    assert every.answer_rank is not None
    assert last.answer_rank is not None
    assert every.answer_rank[:, -1].tolist() == last.answer_rank[:, 0].tolist()
    assert len(answer.positions) > 1
    assert answer.positions[0] == last.positions[0]
    assert set(every.table.columns) == {
        "layer", "position", "token", "top", "probability", "entropy", "answer_rank", "answer_probability",
    }  # fmt: skip
    assert "lens logit" in repr(last)
    assert xprobe.lens_prompt(model, PROMPT).answer_rank is None


def test_the_command_prints_a_table_or_json_and_writes_a_page(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["lens", model, PROMPT, "--answer", "boats", "--positions", "all", "--save", str(page)]) == 0
    said = capsys.readouterr()
    assert "rank of the answer" in said.out
    assert f"wrote {page}" in said.err
    assert page.read_text(encoding="utf-8").count("<tr>") == 6
    assert main(["lens", model, PROMPT, "--top", "2", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert len(value["layers"]) == 5
    assert len(value["layers"][0]["positions"][0]["top"]) == 2


def test_the_command_fits_a_lens_and_reads_with_it(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.pt"
    assert main(["fit-lens", model, "--out", str(file), "--texts", "24"]) == 0
    said = capsys.readouterr().out
    assert f"use it   --lens regression:{file}" in said
    assert main(["lens", model, PROMPT, "--lens", f"regression:{file}"]) == 0
    assert f"lens regression:{file}" in capsys.readouterr().out
    options = ["--kind", "jacobian", "--texts", "2", "--tokens", "24", "--json"]
    assert main(["fit-lens", model, "--out", str(file), *options]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["lens"] == f"jacobian:{file}"
    assert [row["layer"] for row in value["layers"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "the prompt '' has no tokens"),
        ({"prompt": 5}, "prompt must be"),
        ({"answer": ""}, "the answer '' has no tokens"),
        ({"positions": "first"}, "unknown positions 'first'; known: last, all, answer"),
        ({"positions": "answer"}, "positions 'answer' needs an answer"),
        ({"top": 0}, "top must be a whole number of at least 1"),
        ({"top": 33}, "top must be a whole number of at most 32"),
        ({"lens": "tuned:/none"}, "there is no folder /none"),
        ({"tokenizer": object()}, "tokenizer belongs to a model in memory"),
    ],
)
def test_bad_arguments_are_refused(model: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(xprobe.XprobeError, match=message):
        xprobe.lens_prompt(**({"model": model, "prompt": PROMPT} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save", "/no/such/folder/x.html"], "there is no folder /no/such/folder"),
        (["--positions", "answer"], "--positions answer needs --answer"),
        (["--top", "0"], "0 is not in the range 1<=x<=32"),
        (["--lens", "focus"], "unknown lens 'focus'"),
    ],
)
def test_bad_options_are_refused(
    model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lens", model, PROMPT, *arguments]) == 2
    assert message in capsys.readouterr().err
