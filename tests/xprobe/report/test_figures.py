"""``study.plot``: every figure shows the values of the tables, and changes nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprobe
from xprobe.errors import UnknownNameError, UsageError
from xprobe.report.figures import FIGURES, Plots, save_causes

matplotlib = pytest.importorskip("matplotlib")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

OPTIONS: dict[str, Any] = {"bootstrap": 30, "permutations": 20, "template": "plain"}
ONE_PANEL = ("stability", "onsets", "agreement", "boundaries")
PANELS = {"signals": 2, "causes": 2, "relevance": 2, "performance": 3, "probes": 1}
BEGINNINGS = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run in two settings, with every stage that has a figure."""
    out = tmp_path_factory.mktemp("figures") / "run"
    settings = ("en-x", "x-x")
    study = xprobe.run(
        tiny, languages=["en", "de", "th"], setting=settings, limit=8, probes=("language",), out=out, **OPTIONS
    )
    study.evaluate(xprobe.AnswerSettings(max_new_tokens=4))
    study.attribute(xprobe.RelevanceSettings(limit=4))
    study.patch(xprobe.PatchSettings(pairs=1))
    return out


@pytest.fixture(scope="module")
def study(run: Path) -> xprobe.Study:
    return xprobe.load_study(run)


@pytest.fixture(scope="module")
def bare(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> xprobe.Study:
    """One language, one paragraph, no probes: no stability, no agreement, no interval."""
    return xprobe.run(
        tiny, languages=["de"], limit=2, probes=(), out=tmp_path_factory.mktemp("bare") / "run", **OPTIONS
    )


@pytest.fixture(autouse=True)
def no_open_figures() -> Iterator[None]:
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def line(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the only line of an Axes with this label."""
    (found,) = [one for one in axes.lines if one.get_label() == label]
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


def drawn(plots: Plots, name: str) -> list[Axes]:
    return list(np.atleast_1d(np.asarray(getattr(plots, name)(), dtype=object)))


@pytest.mark.parametrize("setting", ["en-x", "x-x"])
@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_has_a_name(study: xprobe.Study, name: str, setting: str) -> None:
    panels = drawn(study[setting].plot, name)
    for place, axes in enumerate(panels):
        assert axes.get_ylabel()
        assert axes.get_xlabel() or (name == "causes" and place == 0)  # it shares the layers with the one below
    width, height = panels[0].figure.get_size_inches()
    assert width in (3.3, 7.0)
    assert height < 5


def test_one_panel_gives_axes_and_several_an_array(study: xprobe.Study) -> None:
    plots = study["en-x"].plot
    assert {*ONE_PANEL, *PANELS} == set(FIGURES)
    assert all(isinstance(getattr(plots, name)(), Axes) for name in ONE_PANEL)
    for name, count in PANELS.items():
        panels = getattr(plots, name)()
        assert isinstance(panels, np.ndarray)
        assert panels.shape == (count,)


def test_stability_shows_the_table(study: xprobe.Study) -> None:
    result = study["x-x"]
    axes = result.plot.stability()
    x, y = line(axes, "stability S(l)")
    assert x.tolist() == result.stability.index.tolist()
    assert y == pytest.approx(result.stability["stability"].to_numpy())
    assert line(axes, "_th")[1] == pytest.approx(result.signals.loc["agreement_en", "th"]["value"].to_numpy())
    (boundary,) = [one for one in axes.lines if str(one.get_label()).startswith("boundary")]
    assert boundary.get_xdata()[0] == result.boundary["value"]
    low, high = axes.get_ylim()
    assert low <= result.stability["stability_lo"].min()
    assert high > 1


def test_the_interval_is_the_band(study: xprobe.Study) -> None:
    axes = study["en-x"].plot.signals("readiness")[0]
    table = study["en-x"].signals.loc["readiness", "all"]
    corners = axes.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(table["lo"].min())
    assert corners[:, 1].max() == pytest.approx(table["hi"].max())


@pytest.mark.parametrize("name", ["readiness", "encoding_selectivity", "rank", "entropy"])
def test_signals_show_all_languages_and_each(study: xprobe.Study, name: str) -> None:
    result = study["en-x"]
    (axes,) = result.plot.signals(name)
    for label, language in (("all languages", "all"), ("English", "en"), ("_de", "de"), ("_th", "th")):
        assert line(axes, label)[1] == pytest.approx(result.signals.loc[name, language]["value"].to_numpy())
    assert axes.get_yscale() == ("log" if name == "rank" else "linear")


def test_an_unknown_signal_is_named(study: xprobe.Study) -> None:
    with pytest.raises(UnknownNameError, match="no signal 'loudness'; it has phase2, readiness"):
        study["en-x"].plot.signals("loudness")


def test_onsets_show_the_shares_of_the_examples(study: xprobe.Study) -> None:
    result = study["en-x"]
    axes = result.plot.onsets()
    examples = result.examples
    shares = {
        language: part["onset"].value_counts(normalize=True)
        for language, part in examples.dropna(subset="onset").groupby("language")
    }
    highest = max(one.max() for one in shares.values())
    for row, language in enumerate(result.summary["languages"]):
        tops, edges, baseline = axes.patches[-len(shares) :][row].get_data()
        heights = (baseline - tops) / 0.9 * highest
        found = {edge + 0.5: height for edge, height in zip(edges[:-1], heights, strict=True) if height > 0}
        assert found == pytest.approx(shares[language].to_dict())
    medians = [entry["boundary"]["value"] for entry in result.summary["languages"].values()]
    assert line(axes, "median")[0].tolist() == medians


def test_agreement_is_the_table_of_languages_by_layers(study: xprobe.Study) -> None:
    axes = study["en-x"].plot.agreement()
    table = study["en-x"].signals.loc["agreement_en"]["value"].unstack("layer")
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["de", "th"]
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(table.loc[names].to_numpy())


def test_boundaries_are_those_of_the_manifest(study: xprobe.Study) -> None:
    result = study["en-x"]
    axes = result.plot.boundaries()
    entries = [*result.summary["languages"].values(), result.summary]
    for label, figure in (("retrieval onset (read)", "boundary"), ("encoding depth (read)", "encoding_depth")):
        known = [entry[figure]["value"] for entry in entries if entry[figure]["value"] is not None]
        if known:
            assert line(axes, label)[0].tolist() == known
    assert [label.get_text() for label in axes.get_yticklabels()] == ["en", "de", "th", "all"]
    patched = study.manifest.stages["patching"].results["settings"]["en-x"]["same"]
    held = [entry["answer_boundary"]["value"] for entry in [*patched["languages"].values(), patched]]
    shown = [one for one in axes.lines if str(one.get_label()).startswith("answer held from")]
    assert [x for one in shown for x in one.get_xdata()] == [value for value in held if value is not None]


def test_causes_are_the_effects_beside_what_is_read(study: xprobe.Study) -> None:
    effects, read = study["en-x"].plot.causes()
    curves = study.table("patching_by_layer.parquet")
    curves = curves.query("setting == 'en-x' and measure == 'effect' and language == 'all' and other_language == 'all'")
    for label, pairs, kind in (
        ("T: last token's state", "same", "answer"),
        ("Q: question's states", "same", "question"),
        ("T, other language", "cross", "answer"),
        ("control: same question", "same", "same_question"),
    ):
        expected = curves[(curves["pairs"] == pairs) & (curves["kind"] == kind)]["value"].to_numpy()
        assert line(effects, label)[1] == pytest.approx(expected)
    signals = study["en-x"].signals
    assert line(read, "readiness")[1] == pytest.approx(signals.loc["readiness", "all"]["value"].to_numpy())


def test_relevance_shows_shares_and_depths(study: xprobe.Study) -> None:
    shares, depths = study["en-x"].plot.relevance()
    table = study.table("relevance_by_layer.parquet").query("setting == 'en-x' and language == 'all'")
    expected = table[table["group"] == "question"]["value"].to_numpy()
    assert line(shares, "question")[1] == pytest.approx(expected)
    summary = study.manifest.stages["relevance"].results["settings"]["en-x"]
    pooled = [one.get_xdata()[0] for one in depths.lines if one.get_label() == "_all"]
    known = [name for name in ("question", "answer", "context", "template", "given") if name in summary["mrd"]]
    assert pooled == [summary["mrd"][name]["value"] for name in known if summary["mrd"][name]["value"] is not None]


def test_performance_shows_f1_and_error_types(study: xprobe.Study) -> None:
    over_onset, over_agreement, errors = study["en-x"].plot.performance()
    answers = study.manifest.stages["answers"].results["settings"]["en-x"]["languages"]
    for language, entry in study["en-x"].summary["languages"].items():
        x, y = line(over_onset, f"_{language}")
        assert (x[0], y[0]) == (entry["boundary"]["value"], answers[language]["f1"]["value"])
    assert [text.get_text() for text in over_agreement.texts if text.get_text() in answers] in (
        ["de", "th"],
        ["th", "de"],
    )
    widths = np.array([bar.get_width() for bar in errors.patches]).reshape(-1, len(answers)).sum(0)
    assert widths == pytest.approx(np.ones(len(answers)))


def test_probes_show_scores_and_controls(study: xprobe.Study) -> None:
    (axes,) = study["en-x"].plot.probes()
    table = study["en-x"].probes.loc["language", "prompt_end"]
    assert line(axes, "last prompt token")[1] == pytest.approx(table["score"].to_numpy(), nan_ok=True)
    assert line(axes, "last prompt token: control")[1] == pytest.approx(table["control"].to_numpy(), nan_ok=True)
    assert axes.get_title() == "language"


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_into_given_axes(study: xprobe.Study, name: str) -> None:
    count = PANELS.get(name, 1)
    figure, own = plt.subplots(1, count, squeeze=False)
    given = {"ax": own[0, 0]} if name in ONE_PANEL else {"axes": own[0]}
    size = own[0, 0].xaxis.label.get_size()
    panels = getattr(study["en-x"].plot, name)(**given)
    assert list(np.atleast_1d(panels)) == list(own[0])
    assert own[0, 0].xaxis.label.get_size() == size
    assert plt.get_fignums() == [figure.number]


def test_the_wrong_number_of_axes_is_refused(study: xprobe.Study) -> None:
    _, own = plt.subplots(1, 3)
    with pytest.raises(UsageError, match="this figure has 2 panels, and got 3 Axes"):
        study["en-x"].plot.signals(axes=own)


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_files_are_written_for_all_settings(study: xprobe.Study, tmp_path: Path, kind: str) -> None:
    names = ("stability", "causes")
    written = study.plot.save(tmp_path / "new" / "figures", kind, names=names, dpi=60)
    assert [path.name for path in written] == [f"{name}_{one}.{kind}" for name in names for one in ("en-x", "x-x")]
    assert all(path.read_bytes().startswith(BEGINNINGS[kind]) and path.stat().st_size > 2000 for path in written)
    assert plt.get_fignums() == []


def test_one_setting_is_saved_alone(study: xprobe.Study, tmp_path: Path) -> None:
    written = study["x-x"].plot.save(tmp_path, ["png", "svg"], names=["onsets"], dpi=50)
    assert [path.name for path in written] == ["onsets_x-x.png", "onsets_x-x.svg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": "docx"}, "no format 'docx'; there are .*pdf"),
        ({"names": ["beauty"]}, "no figure 'beauty'; there are stability, signals"),
        ({"dpi": 0}, "dpi must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_saved_is_refused(
    study: xprobe.Study, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        study.plot.save(tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_matplotlib_has_the_same_settings_afterwards(study: xprobe.Study, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for name in FIGURES:
        getattr(study["en-x"].plot, name)()
    study["en-x"].plot.save(tmp_path, "png", names=["stability"], dpi=50)
    save_causes(study, tmp_path / "causes.png")
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend().lower() == "agg"


def test_ticks_that_come_later_have_the_size_of_the_figure(study: xprobe.Study) -> None:
    axes = study["en-x"].plot.stability()
    axes.set_xticks(range(5))
    axes.figure.canvas.draw()
    assert {label.get_size() for label in axes.get_xticklabels()} == {7.0}


def test_several_settings_must_be_chosen_from(study: xprobe.Study) -> None:
    with pytest.raises(UsageError, match=r'holds 2 settings: choose study\["en-x"\] or study\["x-x"\]'):
        study.plot.stability()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("causes", "has no patches: .*`xprobe patch`"),
        ("relevance", "has no relevance: .*`xprobe attribute`"),
        ("performance", "has no answers: .*`xprobe evaluate`"),
        ("probes", "has no probes: `xprobe probe"),
        ("agreement", "has no agreement with English"),
    ],
)
def test_a_figure_without_its_stage_says_what_to_run(bare: xprobe.Study, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        getattr(bare.plot, name)()


def test_one_language_without_intervals_is_drawn(bare: xprobe.Study, tmp_path: Path) -> None:
    assert bare.plot.available == ("stability", "signals", "onsets", "boundaries")
    assert repr(bare.plot) == "Plots(stability, signals, onsets, boundaries)"
    written = bare.plot.save(tmp_path, "png", dpi=50)
    assert [path.name for path in written] == ["stability.png", "signals.png", "onsets.png", "boundaries.png"]
    axes = bare.plot.stability()
    assert [text.get_text() for text in axes.texts] == ["stability needs two languages"]
    (readiness,) = bare.plot.signals("readiness")
    assert not readiness.collections  # no interval, no band


def test_stages_without_intervals_are_drawn(bare: xprobe.Study, tmp_path: Path) -> None:
    out = shutil.copytree(bare.path, tmp_path / "run")
    xprobe.evaluate(out, xprobe.AnswerSettings(max_new_tokens=2))
    xprobe.attribute(out)
    study = xprobe.patch(out)
    written = study.plot.save(tmp_path / "figures", "png", names=("performance", "relevance", "causes"), dpi=50)
    assert len(written) == 3


def test_the_picture_of_the_command_has_a_row_for_each_setting(study: xprobe.Study, tmp_path: Path) -> None:
    from matplotlib.image import imread

    save_causes(study, tmp_path / "causes.png")
    height, width, _ = imread(tmp_path / "causes.png").shape
    assert (width, height) == (1980, 2 * 470)


def test_without_matplotlib_the_message_says_what_to_install(
    study: xprobe.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (study["en-x"].plot.stability, lambda: study.plot.save(tmp_path / "none")):
        with pytest.raises(UsageError, match=r"figures need matplotlib: pip install 'xprobe\[plot\]'"):
            draw()


def test_reading_a_run_loads_no_matplotlib(run: Path) -> None:
    code = f"import sys, xprobe; xprobe.load_study({str(run)!r}).plot.available; print('matplotlib' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
