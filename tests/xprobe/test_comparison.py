"""Several runs side by side: the figures are those of the runs, correlations are right, other questions are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr
from support.browser import BROWSER, look
from support.families import save_tiny_model
from xprobe_cli.main import main

import xprobe
from xprobe.comparison import FIGURES, PERFORMANCE
from xprobe.errors import UsageError
from xprobe.phases.across_models import Drawn, correlation
from xprobe.phases.alpha import drawn_alphas, krippendorff_alpha
from xprobe.phases.bootstrap import ClusterBootstrap
from xprobe.report.comparison import comparison_page

OPTIONS: dict[str, Any] = {"languages": ("en", "de"), "probes": (), "bootstrap": 60, "permutations": 20}
SHORT = xprobe.AnswerSettings(max_new_tokens=4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models on the same questions; the first and the second have the same name. The third has one setting."""
    folder = tmp_path_factory.mktemp("comparison")
    models = [
        save_tiny_model(folder / "a" / "model"),
        save_tiny_model(folder / "b" / "model", "gemma2"),
        save_tiny_model(folder / "c" / "other", "qwen3"),
    ]
    found = []
    for number, model in enumerate(models):
        setting = ("en-x", "x-x") if number < 2 else "en-x"
        out = folder / f"run-{number}"
        study = xprobe.run(str(model), setting=setting, limit=12, out=out, template="plain", **OPTIONS)
        study.evaluate(SHORT)
        found.append(out)
    xprobe.patch(found[0])
    return found


def test_the_figures_are_those_of_the_runs(runs: list[Path]) -> None:
    comparison = xprobe.compare(runs)
    assert list(comparison.studies) == ["model (run-0)", "model (run-1)", "other"]
    assert comparison.table["setting"].unique().tolist() == ["en-x"]  # all of them have it
    for row, study in zip(comparison.table.to_dict("records"), comparison.studies.values(), strict=True):
        result, answers = study["en-x"], study.answers[study.answers["setting"] == "en-x"]
        assert row["alpha"] == pytest.approx(result.alpha["value"], nan_ok=True)
        assert row["relative_boundary"] == result.summary["relative_boundary"]["value"]
        assert row["stability"] == pytest.approx(result.stability["stability"].mean())
        assert row["f1"] == pytest.approx(answers["f1"].mean())
        assert row["exact_match"] == pytest.approx(answers["exact_match"].mean())
        assert row["readiness"] == pytest.approx(result.stability["readiness"].iloc[-1])
        assert row["readiness_lo"] <= row["readiness"] <= row["readiness_hi"]
    assert set(comparison.languages["language"]) == {"en", "de"}
    assert len(comparison.languages) == 6
    assert "relative_causal_boundary" in comparison.table
    both = xprobe.compare(runs[:2])
    assert both.table["setting"].unique().tolist() == ["en-x", "x-x"]
    assert both.correlations["value"].isna().all()  # two models


def test_every_figure_is_correlated_with_performance_over_the_models(runs: list[Path]) -> None:
    comparison = xprobe.compare(runs)
    table, found = comparison.table, comparison.correlations
    assert set(found["performance"]) == set(PERFORMANCE)
    assert not set(found["figure"]) & set(PERFORMANCE)
    assert set(found["figure"]) == {name for name in FIGURES if name in table} - set(PERFORMANCE)
    for row in found[found["figure"] == "stability"].to_dict("records"):
        right = {"pearson": pearsonr, "spearman": spearmanr}[row["method"]]
        x, y = table["stability"], table[row["performance"]]
        wanted = right(x, y).statistic if x.nunique() > 1 and y.nunique() > 1 else np.nan
        assert row["value"] == pytest.approx(wanted, nan_ok=True)
        assert row["models"] == 3


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_an_interval_is_wide_with_few_models_and_narrow_with_many(method: str) -> None:
    random = np.random.default_rng(0)

    def models(count: int) -> tuple[list[Drawn], list[Drawn]]:
        x = random.normal(size=count)
        y = 0.8 * x + 0.6 * random.normal(size=count)
        wide = [[Drawn(v, v + 0.05 * random.normal(size=500)) for v in values] for values in (x, y)]
        return wide[0], wide[1]

    too_few, few, many = (correlation(*models(count), method, seed=1) for count in (5, 6, 60))
    assert np.isfinite(too_few.value)
    assert np.isnan([too_few.lo, too_few.hi]).all()
    assert few.hi - few.lo > 0.5
    assert many.hi - many.lo < 0.35
    assert many.lo < 0.8 < many.hi + 0.1
    assert -1 <= few.lo <= few.hi <= 1


def test_intervals_of_unrelated_figures_hold_nothing() -> None:
    """That is, 0, in about 95 of 100 trials."""
    random = np.random.default_rng(3)
    held = 0
    for trial in range(100):
        x, y = ([Drawn(value, np.full(150, value)) for value in random.normal(size=8)] for _ in range(2))
        found = correlation(x, y, "pearson", trial)
        held += found.lo <= 0 <= found.hi
    assert held >= 88


def test_settings_that_make_values_incomparable_are_noted(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[1], tmp_path / "run")
    xprobe.evaluate(tmp_path / "run", xprobe.AnswerSettings(max_new_tokens=2, threshold=0.25))
    notes = xprobe.compare([runs[0], tmp_path / "run"]).notes
    assert any(note.startswith("threshold of the stage answers differs: ") and "0.25" in note for note in notes)
    assert not any(note.startswith("normaliser of the stage answers") for note in notes)


def test_pages_and_notebooks_name_no_folder_of_the_disk(runs: list[Path]) -> None:
    """A name that is given for a run may be a path, with blanks too."""
    keys = ["/home/Ada Lovelace/models/tiny", "/home/Ada Lovelace/other/tiny", "plain"]
    comparison = xprobe.compare(dict(zip(keys, runs, strict=True)))
    comparison.to_html(runs[0].parent / "page.html")
    for html in ((runs[0].parent / "page.html").read_text(), comparison._repr_html_()):
        assert "Lovelace" not in html
        assert "tiny #2" in html
    assert set(comparison.table["model"]) == set(keys)


def test_one_model_twice_is_noted(runs: list[Path]) -> None:
    comparison = xprobe.compare([*runs, runs[0]])
    assert "are the same model: correlations count it once" in " ".join(comparison.notes)
    assert len(comparison.table) == 4
    pd.testing.assert_frame_equal(comparison.correlations, xprobe.compare(runs).correlations)


def test_draws_of_alpha_are_those_of_its_interval() -> None:
    random = np.random.default_rng(1)
    onset = random.integers(3, 9, 40).astype(float)
    questions, paragraphs = np.repeat(np.arange(10), 4), np.repeat(np.arange(5), 8)
    bootstrap = ClusterBootstrap(paragraphs, 200, 0)
    value, drawn, clusters = drawn_alphas(onset, questions, np.arange(40), bootstrap)
    assert value == pytest.approx(krippendorff_alpha(onset, questions).value)
    assert clusters == 5
    weights = bootstrap.weights[7]
    again = np.concatenate([np.flatnonzero(paragraphs == p) for p, n in enumerate(weights) for _ in range(int(n))])
    copies = np.concatenate([np.full(8, i) for i in range(int(weights.sum()))])
    assert drawn[7] == pytest.approx(krippendorff_alpha(onset[again], questions[again] + 100 * copies).value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"limit": 4}, "the selection of questions differs.*limit: 4 and 12"),
        ({"languages": ("en", "th")}, "the set of languages differs .en, th and de, en"),
        ({"template": "chat-less"}, "the wording of the prompt differs"),
    ],
)
def test_runs_on_other_questions_are_refused(
    runs: list[Path], tiny: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    if changed.get("template"):
        own = tmp_path / "own.toml"
        shipped = Path(xprobe.__file__).parent / "qa" / "templates" / "default.toml"
        own.write_text(shipped.read_text(encoding="utf-8").replace("Question", "The question"), encoding="utf-8")
        changed = {"template": str(own)}
    options = {**OPTIONS, "limit": 12, "template": "plain", "setting": "en-x", **changed}
    xprobe.run(str(tiny), out=tmp_path / "run", **options)
    with pytest.raises(UsageError, match=said):
        xprobe.compare([runs[0], tmp_path / "run"])


def test_too_few_runs_and_none_in_common(runs: list[Path], tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least two"):
        xprobe.compare(runs[:1])
    with pytest.raises(UsageError, match="must be a list"):
        xprobe.compare(runs[0])  # type: ignore[arg-type]
    xprobe.run(str(tiny), out=tmp_path / "run", limit=12, template="plain", setting="x-x", **OPTIONS)
    with pytest.raises(UsageError, match="no setting in common"):
        xprobe.compare([runs[2], tmp_path / "run"])


def test_the_same_run_twice_and_a_copy_have_names_of_their_own(runs: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs[0], tmp_path / "run-0")
    names = list(xprobe.compare([runs[0], copy, runs[0]]).studies)
    assert len(set(names)) == 3


def test_the_command_prints_tables_writes_a_page_and_json(runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "correlations" in said
    assert str(tmp_path / "page.html") in said
    assert main(["compare", *map(str, runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["table"]] == list(found["runs"])
    assert main(["compare", str(runs[0])]) == 2
    assert "at least two" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_draws_all_charts(runs: list[Path], tmp_path: Path) -> None:
    html = comparison_page(xprobe.compare(runs))
    found = look(html, "return { places: document.querySelectorAll('[data-chart]').length };", tmp_path)
    assert found["problems"] == []
    assert found["drawn"] == found["places"] > 4


@pytest.mark.parametrize("width", [80, 300])
def test_the_table_fits_the_terminal(
    runs: list[Path], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["compare", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("model  ")]
    assert len(heads) == 1 if width == 300 else len(heads) > 1
    assert max(len(line) for line in lines if line.startswith(("model", "other"))) <= width
    assert {word for line in heads for word in line.split()} >= {"model", "stability", "alpha", "readiness", "f1"}


def test_a_notebook_shows_the_tables(runs: list[Path]) -> None:
    html = xprobe.compare(runs)._repr_html_()
    assert html.count("<table") == 1  # of the models; two different ones have no correlation
    assert "model (run-0)" in html


@pytest.mark.slow
def test_stability_and_f1_fall_together_with_noise_on_the_weights(tmp_path: Path) -> None:
    """The demo model against copies of it whose weights are noisier and noisier."""
    from click.testing import CliRunner

    from benchmarks.noisy_copies import main as noisy_copies

    done = CliRunner().invoke(noisy_copies, [str(tmp_path), "--noise", "0.2,0.4"])
    assert done.exit_code == 0, done.output
    studies = []
    for model in ("smollm2-135m", *done.stdout.split()):
        out = tmp_path / f"run-{Path(model).name}"
        options: dict[str, Any] = {"languages": ("en", "de"), "paragraphs": 6, "questions_per_paragraph": 2}
        study = xprobe.run(model, out=out, probes=(), bootstrap=100, permutations=50, **options)
        studies.append(study.evaluate(xprobe.AnswerSettings(max_new_tokens=16)))
    table = xprobe.compare(studies).table
    assert table["f1"].is_monotonic_decreasing
    assert table["readiness"].is_monotonic_decreasing
