"""What a notebook shows: the figures of the tables, escaped, with nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.browser import BROWSER, look
from support.families import save_tiny_model

import xprobe
from xprobe.report.parts import interval

HOSTILE = '<img src=x onerror="window.hacked=1"></div><script>window.hacked=2</script>\'&amp;\u202e'
NAME = "<img src=x onerror=window.hacked=3>"  # of a folder


class Elements(HTMLParser):
    """Elements with their attributes, and the text of each cell of a table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # every element is closed in its turn

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> xprobe.Study:
    folder = tmp_path_factory.mktemp("notebook")
    model = save_tiny_model(folder / NAME)
    context = f"{HOSTILE} The ball is red, the car is blue."
    rows = [
        {"id": f"{HOSTILE}{word}", "language": language, "context": context, "question": f"Which? {HOSTILE}",
         "answers": {"text": [word], "answer_start": [context.index(word)]}}
        for language in ("en", "de") for word in ("red", "blue")
    ]  # fmt: skip
    return xprobe.run(
        str(model), data=rows, setting=("en-x", "x-x"), template="plain", probes=(), bootstrap=20, out=folder / "run"
    )


@pytest.fixture(scope="module")
def shown(study: xprobe.Study) -> dict[str, Any]:
    """One of each object that a notebook shows; names and texts hold markup."""
    best = [[[(HOSTILE, 0.9), ("b", 0.1)], [("a\n", 0.5), (HOSTILE, 0.2)]]] * 2
    ranks = np.array([[3, 2], [1, 1]])
    lens = xprobe.PromptLens(
        NAME, HOSTILE, [HOSTILE, " b"], (0, 1), best, np.zeros((2, 2)), HOSTILE, ranks, ranks / 4
    )  # fmt: skip
    table = pd.DataFrame(
        {"layer": [np.nan, 3], "position": [np.nan, 1], "token": [None, HOSTILE], HOSTILE: [-1.5, np.nan],
         "top": [[(HOSTILE, -1.5)], [("b", -0.25)]], "effect": [0.0, 1.25]},
        index=pd.Index(["before", 0], name="run"),
    )  # fmt: skip
    comparison = xprobe.compare([study, study])
    return {
        "study": study, "setting": study["x-x"], "comparison": comparison, "lens": lens,
        "patched": xprobe.PatchedPrompt([HOSTILE, " b"], table),
    }  # fmt: skip


OBJECTS = ["study", "setting", "comparison", "lens", "patched"]


@pytest.mark.parametrize("name", OBJECTS)
def test_markup_stays_text_and_nothing_comes_from_elsewhere(shown: dict[str, Any], name: str) -> None:
    html = shown[name]._repr_html_()
    found = Elements(html)
    allowed = {"div", "style", "p", "b", "span", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "bdi",
               "small"}  # fmt: skip
    assert {tag for tag, _ in found.tags} <= allowed
    for _, attributes in found.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "href")]
    assert not re.search(r"https?:|url\(|@import", html)
    assert "&lt;img" in html
    assert found.open == []


def test_a_study_shows_the_figures_of_every_setting(study: xprobe.Study) -> None:
    html = study._repr_html_()
    for setting, result in study.items():
        assert f"Setting {setting}" in html
        assert interval(result.boundary) in html
    assert str(study.path) in html
    assert html.count("<table") == 2


def test_a_setting_shows_every_layer(study: xprobe.Study) -> None:
    result = study["en-x"]
    cells = Elements(result._repr_html_()).cells
    heads = cells[: cells.index("entropy") + 1]
    rows = [cells[i : i + len(heads)] for i in range(len(heads), len(cells), len(heads))]
    assert [row[0] for row in rows] == [str(layer) for layer in result.stability.index]
    assert [float(row[heads.index("readiness")]) for row in rows] == pytest.approx(
        result.stability["readiness"].tolist(), rel=5e-3
    )
    ranks = [float(row[heads.index("rank")].replace(",", "")) for row in rows]
    assert ranks == pytest.approx(result.stability["rank"].tolist(), abs=0.51)


def test_patched_prompts_show_what_is_missing_as_a_dash(shown: dict[str, Any]) -> None:
    cells = Elements(shown["patched"]._repr_html_()).cells
    before, edited = cells[-14:-7], cells[-7:]
    assert before[:4] == ["before", "–", "–", "–"]
    assert (edited[0], edited[4], edited[5], edited[6]) == ("0", "–", "1.25", "b -0.250")


def test_a_comparison_shows_each_model_and_its_notes(shown: dict[str, Any]) -> None:
    comparison = shown["comparison"]
    html = comparison._repr_html_()
    assert html.count("<table") == 2  # one for each setting; two runs are too few for correlations
    assert html.count("note: ") == len(comparison.notes) > 0


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    ("paper", "ink"), [("rgb(255, 255, 255)", "rgb(17, 17, 17)"), ("rgb(17, 17, 17)", "rgb(238, 238, 238)")]
)
def test_outputs_take_the_colours_of_the_notebook(shown: dict[str, Any], tmp_path: Path, paper: str, ink: str) -> None:
    body = "".join(shown[name]._repr_html_() for name in OBJECTS)
    html = (
        f'<!doctype html><html data-drawn="0"><head><meta charset="utf-8"></head>'
        f'<body style="background:{paper};color:{ink}">{body}</body></html>'
    )
    script = """
      const cells = [...document.querySelectorAll("th, td:not([style*=fff]), p, dd")];
      return { inks: [...new Set(cells.map((one) => getComputedStyle(one).color))], hacked: window.hacked ?? null,
               images: document.images.length };
    """
    found = look(html, script, tmp_path)
    assert found["inks"] == [ink]
    assert (found["hacked"], found["images"], found["problems"]) == (None, 0, [])
