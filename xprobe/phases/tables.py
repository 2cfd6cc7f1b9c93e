"""From example signals to tidy tables: one row per example, and one row per setting x layer x language x signal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.phases.alpha import krippendorff_alpha
from xprobe.phases.bootstrap import ClusterBootstrap, Estimate
from xprobe.phases.segmentation import encoding_depths, segment
from xprobe.phases.stability import agreement_with, in_phase_two, layer_stability

ALL = "all"  # the pooled rows of a table by language
# the first columns of `stability_table`; the other signals follow
LEADING = ("phase", "stability", "stability_lo", "stability_hi", "readiness", "encoding", "encoding_selectivity",
           "log_probability", "rank", "entropy", "kl", "phase2")  # fmt: skip
Floats = NDArray[np.float64]
Signals = dict[str, Floats]  # name -> [N, L + 1]


@dataclass(frozen=True, eq=False)
class _Setting:
    """The examples of one setting, their signals, and the draws of their paragraphs."""

    name: str
    examples: pd.DataFrame
    signals: Signals
    bootstrap: ClusterBootstrap

    @property
    def languages(self) -> NDArray:
        return self.examples["language"].to_numpy()


def _settings(examples: pd.DataFrame, signals: Signals, draws: int, seed: int) -> Iterator[_Setting]:
    """The settings in the order of their first examples."""
    for name, rows in examples.groupby("setting", sort=False).indices.items():
        members = examples.iloc[rows]
        bootstrap = ClusterBootstrap(members["paragraph"].to_numpy(), draws, seed)
        yield _Setting(str(name), members, {key: values[rows] for key, values in signals.items()}, bootstrap)


def example_table(frame: pd.DataFrame, signals: Signals, permutations: int, seed: int) -> pd.DataFrame:
    """Adds onset, sharpness, rise and phased, and the signals at the last layer, to one row per example.

    Parameters
    ----------
    frame : DataFrame
        setting, language, question_id, paragraph; rows in the order of the rows of the signals.
    signals : dict of str to array [N, L + 1]
        ``readiness`` is split into the phases.
    permutations, seed : int
        Of the test whether an example is phased.

    Examples
    --------
    >>> frame = pd.DataFrame({"setting": "en-x", "language": ["en", "de"], "question_id": "q", "paragraph": "p"})
    >>> readiness = np.array([[0.25, 0.25, 0.25, 0.75, 0.75], [0.25, 0.25, 0.75, 0.75, 0.75]])
    >>> example_table(frame, {"readiness": readiness}, 20, 0)[["language", "onset", "rise", "readiness_last"]]
      language  onset  rise  readiness_last
    0       en    3.0   0.5            0.75
    1       de    2.0   0.5            0.75
    """
    phases = segment(signals["readiness"], permutations, seed)
    last = {f"{name}_last": values[:, -1] for name, values in signals.items()}
    return frame.assign(onset=phases.onset, sharpness=phases.sharpness, rise=phases.rise, phased=phases.phased, **last)


def layer_table(examples: pd.DataFrame, signals: Signals, draws: int, seed: int) -> pd.DataFrame:
    """One row for each setting, layer, language and signal; one setting after the other, layers in depth order.

    Signals: stability (S(l), language ``all``), agreement_en (per language), phase2 (share of examples in phase 2),
    the median of rank, and the means of all other signals. Intervals: 95 %, bootstrap over paragraphs.

    Parameters
    ----------
    examples : DataFrame of N rows
        As ``example_table`` gives it.
    signals : dict of str to array [N, L + 1]
    draws, seed : int
        Of the bootstrap.

    Returns
    -------
    DataFrame
        Columns setting, layer, language, signal, value, lo, hi, n.

    Examples
    --------
    >>> frame = pd.DataFrame({"setting": "en-x", "language": ["en", "de"], "question_id": "q", "paragraph": "p"})
    >>> readiness = np.array([[0.25, 0.25, 0.25, 0.75, 0.75], [0.25, 0.25, 0.75, 0.75, 0.75]])
    >>> examples = example_table(frame, {"readiness": readiness}, 20, 0)
    >>> table = layer_table(examples, {"readiness": readiness}, draws=50, seed=0)
    >>> pooled = table[(table["layer"] == 2) & (table["language"] == "all")]
    >>> dict(zip(pooled["signal"], pooled["value"].tolist()))
    {'stability': 0.0, 'phase2': 0.5, 'readiness': 0.5}
    """
    n_layers = signals["readiness"].shape[1]
    tables = []
    for setting in _settings(examples, signals, draws, seed):
        bootstrap, languages = setting.bootstrap, setting.languages
        onset, questions = (setting.examples[column].to_numpy() for column in ("onset", "question_id"))
        parts = [_block("stability", ALL, layer_stability(onset, questions, n_layers, bootstrap))]
        for language, estimate in agreement_with("en", onset, questions, languages, n_layers, bootstrap).items():
            parts.append(_block("agreement_en", language, estimate))
        parts += _means_and_ranks({"phase2": in_phase_two(onset, n_layers), **setting.signals}, languages, bootstrap)
        tables.append(_joined(setting.name, parts))
    return pd.concat(tables, ignore_index=True)


def _means_and_ranks(signals: Signals, languages: NDArray, bootstrap: ClusterBootstrap) -> list[pd.DataFrame]:
    """The mean of every signal, but the median of rank: pooled, and by language."""
    tables = []
    for language in (ALL, *dict.fromkeys(languages.tolist())):
        members = np.arange(len(languages)) if language == ALL else np.flatnonzero(languages == language)
        for name, values in signals.items():
            if name != "rank":
                tables.append(_block(name, language, bootstrap.mean(values[members], members)))
                continue
            medians = [bootstrap.median(column, members) for column in values[members].T]
            known = (~np.isnan(values[members])).sum(0)
            columns = (np.array([getattr(median, column) for median in medians]) for column in ("value", "lo", "hi"))
            tables.append(_block(name, language, (*columns, known)))
    return tables


def _joined(setting: str, tables: list[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "setting", setting)
    return table.sort_values(["layer"], kind="stable", ignore_index=True)


def replace_signals(
    layers: pd.DataFrame, examples: pd.DataFrame, signals: Signals, draws: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Layer and example tables with new rows and columns for ``signals``; everything else stays as it was.

    Parameters
    ----------
    layers, examples : DataFrame
        As ``layer_table`` and ``example_table`` give them.
    signals : dict of str to array [N, L + 1]
        New ones, or ones that the tables hold already.
    draws, seed : int
        Of the bootstrap.

    Examples
    --------
    >>> frame = pd.DataFrame({"setting": "en-x", "language": ["en", "de"], "question_id": "q", "paragraph": "p"})
    >>> signals = {"readiness": np.array([[0.25, 0.25, 0.25, 0.75, 0.75], [0.25, 0.25, 0.75, 0.75, 0.75]])}
    >>> examples = example_table(frame, signals, 20, 0)
    >>> layers = layer_table(examples, signals, draws=50, seed=0)
    >>> layers, examples = replace_signals(layers, examples, {"new": np.ones((2, 5))}, draws=50, seed=0)
    >>> layers["signal"].unique().tolist(), examples["new_last"].tolist()
    (['stability', 'agreement_en', 'phase2', 'readiness', 'new'], [1.0, 1.0])
    """
    tables = []
    for setting in _settings(examples, signals, draws, seed):
        of_setting = layers[(layers["setting"] == setting.name) & ~layers["signal"].isin(list(signals))]
        new = _means_and_ranks(setting.signals, setting.languages, setting.bootstrap)
        table = _joined(setting.name, [of_setting.drop(columns="setting"), *new])
        tables.append(_in_order(table, setting.languages))
    last = {f"{name}_last": values[:, -1] for name, values in signals.items()}
    return pd.concat(tables, ignore_index=True), examples.assign(**last)


def _in_order(table: pd.DataFrame, languages: NDArray) -> pd.DataFrame:
    """Rows of one setting in the order of ``layer_table``: in a layer, all signals of one language together."""
    order = {name: rank for rank, name in enumerate((ALL, *dict.fromkeys(languages.tolist())))}
    ranks = table["language"].map(order).to_numpy()
    ranks = np.where(table["signal"] == "agreement_en", -1, ranks)
    ranks = np.where(table["signal"] == "stability", -2, ranks)
    return table.iloc[np.lexsort((ranks, table["layer"]))].reset_index(drop=True)


def _block(signal: str, language: str, estimate: tuple[NDArray, ...]) -> pd.DataFrame:
    value, lo, hi, n = estimate
    return pd.DataFrame(
        {
            "layer": np.arange(len(value)),
            "language": language,
            "signal": signal,
            "value": value,
            "lo": lo,
            "hi": hi,
            "n": n,
        }
    )


def summaries(examples: pd.DataFrame, signals: Signals, n_blocks: int, draws: int, seed: int) -> dict[str, Any]:
    """Figures of every setting, in plain values.

    Parameters
    ----------
    examples : DataFrame of N rows
        As ``example_table`` gives it.
    signals : dict of str to array [N, L + 1]
        ``encoding`` adds encoding depth, its peak and the phase order.
    n_blocks : int
        L: what boundaries are divided by.
    draws, seed : int
        Of the bootstrap.

    Returns
    -------
    dict of setting to dict
        alpha, boundary, relative_boundary, spread, phased_fraction, ..., and all but alpha by language. Figures are
        {value, lo, hi}, None where they are not defined.

    Examples
    --------
    >>> frame = pd.DataFrame({"setting": "en-x", "language": ["en", "de"], "question_id": "q", "paragraph": "p"})
    >>> readiness = np.array([[0.25, 0.25, 0.25, 0.75, 0.75], [0.25, 0.25, 0.75, 0.75, 0.75]])
    >>> examples = example_table(frame, {"readiness": readiness}, 20, 0)
    >>> figures = summaries(examples, {"readiness": readiness}, n_blocks=4, draws=50, seed=0)["en-x"]
    >>> figures["boundary"], figures["relative_boundary"]["value"]
    ({'value': 2.5, 'lo': None, 'hi': None}, 0.625)
    """
    result: dict[str, Any] = {}
    for setting in _settings(examples, signals, draws, seed):
        onset, questions = (setting.examples[column].to_numpy() for column in ("onset", "question_id"))
        languages = setting.languages
        result[setting.name] = {
            "alpha": krippendorff_alpha(onset, questions, setting.bootstrap).to_dict(),
            **_phases(setting, n_blocks, np.arange(len(languages))),
            "paragraphs": setting.bootstrap.n_clusters,
            "languages": {
                language: _phases(setting, n_blocks, np.flatnonzero(languages == language))
                for language in dict.fromkeys(languages.tolist())
            },
        }
    return result


def _phases(setting: _Setting, n_blocks: int, members: NDArray) -> dict[str, Any]:
    """The figures of the examples ``members``."""
    bootstrap, onset = setting.bootstrap, setting.examples["onset"].to_numpy()[members]
    boundary, spread = bootstrap.median(onset, members), bootstrap.spread(onset, members)
    is_phased = setting.examples["phased"].to_numpy()[members, None].astype(np.float64)
    phased = bootstrap.mean(is_phased, members)[:3]
    entry: dict[str, Any] = {
        "boundary": boundary.to_dict(),
        "relative_boundary": _scaled(boundary, n_blocks).to_dict(),
        "spread": _scaled(spread, n_blocks).to_dict(),
        "phased_fraction": Estimate(*(float(column[0]) for column in phased)).to_dict(),
        "without_onset": int(np.isnan(onset).sum()),
        "n": len(members),
    }
    if "encoding" in setting.signals:
        entry |= _encoding_phase(setting.signals["encoding"][members], onset, bootstrap, members)
    return entry


def _scaled(estimate: Estimate, n_blocks: int) -> Estimate:
    return Estimate(*(value / n_blocks for value in (estimate.value, estimate.lo, estimate.hi)))


def _encoding_phase(
    encoding: NDArray, onset: NDArray, bootstrap: ClusterBootstrap, members: NDArray
) -> dict[str, dict[str, float | None]]:
    """Encoding depth and peak of the mean encoding curve, and whether the depth lies below the median onset.

    ``phase_order`` is 1 or 0, and ``share`` is the share of draws in which it is 1; both are None where depth or onset
    is missing.
    """
    mean, drawn, counts = bootstrap.drawn_means(encoding, members)
    depths, peaks = encoding_depths(np.concatenate([mean[None], drawn]))
    n_clusters = np.array([int((counts > 0).any(1).sum())])
    figures: dict[str, dict[str, float | None]] = {}
    for name, values in (("encoding_depth", depths), ("encoding_peak", peaks)):
        lo, hi = bootstrap.interval(values[1:, None], n_clusters)
        figures[name] = Estimate(float(values[0]), float(lo[0]), float(hi[0])).to_dict()
    boundary, boundaries, _ = bootstrap.drawn_medians(onset, members)
    known = not np.isnan(depths[0] + boundary)
    in_draw = ~np.isnan(depths[1:] + boundaries)
    holds = (depths[1:] < boundaries)[in_draw]
    figures["phase_order"] = {
        "value": float(depths[0] < boundary) if known else None,
        "share": float(holds.mean()) if known and in_draw.any() and n_clusters[0] > 1 else None,
    }
    return figures


def stability_table(layers: pd.DataFrame, setting: str) -> pd.DataFrame:
    """One row per layer of a setting: phase, stability with interval, and the pooled value of every signal.

    Examples
    --------
    >>> frame = pd.DataFrame({"setting": "en-x", "language": ["en", "de"], "question_id": "q", "paragraph": "p"})
    >>> readiness = np.array([[0.25, 0.25, 0.25, 0.75, 0.75], [0.25, 0.25, 0.75, 0.75, 0.75]])
    >>> examples = example_table(frame, {"readiness": readiness}, 20, 0)
    >>> layers = layer_table(examples, {"readiness": readiness}, draws=50, seed=0)
    >>> table = stability_table(layers, "en-x")
    >>> table["phase"].tolist(), table["stability"].tolist()
    ([1, 1, 1, 2, 2], [1.0, 1.0, 0.0, 1.0, 1.0])
    """
    pooled = layers[(layers["setting"] == setting) & (layers["language"] == ALL)]
    wide = pooled.pivot(index="layer", columns="signal", values="value")
    stability = pooled[pooled["signal"] == "stability"].set_index("layer")
    phase = np.where(wide["phase2"] > 0.5, 2, 1)  # more than half of the examples have reached their onset
    table = pd.DataFrame({"phase": phase}, index=wide.index)
    table["stability"], table["stability_lo"], table["stability_hi"] = (stability[c] for c in ("value", "lo", "hi"))
    for name in wide.columns.drop("stability"):
        table[name] = wide[name]
    leading = [column for column in LEADING if column in table]
    return table[[*leading, *(column for column in table if column not in leading)]]
