"""From example signals to tidy tables: one row per example, and one row per setting x layer x language x signal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.phases.alpha import krippendorff_alpha
from xprobe.phases.bootstrap import ClusterBootstrap, Estimate
from xprobe.phases.segmentation import encoding_depths, segment
from xprobe.phases.stability import agreement_with, in_phase_two, layer_stability

ALL = "all"  # the pooled rows of a table by language
LEADING = ("phase", "stability", "stability_lo", "stability_hi", "readiness", "encoding", "encoding_selectivity",
           "log_probability", "rank", "entropy", "kl", "phase2")  # fmt: skip
Signals = dict[str, NDArray[np.float64]]  # name -> [N, L + 1]


def example_table(frame: pd.DataFrame, signals: Signals, permutations: int, seed: int) -> pd.DataFrame:
    """Adds onset, sharpness, rise and phased, and the last layer's signals, to one row per example.

    ``frame`` holds setting, language, question_id, paragraph; rows in the order of the signals' rows.
    """
    phases = segment(signals["readiness"], permutations, seed)
    last = {f"{name}_last": values[:, -1] for name, values in signals.items()}
    return frame.assign(onset=phases.onset, sharpness=phases.sharpness, rise=phases.rise, phased=phases.phased, **last)


def layer_table(examples: pd.DataFrame, signals: Signals, draws: int, seed: int) -> pd.DataFrame:
    """Columns setting, layer, language, signal, value, lo, hi, n; one setting after the other, layers in depth order.

    Signals: stability (S(l), language ``all``), agreement_en (per language), phase2 (share of examples in phase 2),
    the median of rank, and the means of all other signals. Intervals: 95 %, bootstrap over paragraphs.
    """
    n_layers = signals["readiness"].shape[1]
    settings = []
    for setting, rows in examples.groupby("setting", sort=False).indices.items():
        part, own = examples.iloc[rows], {name: values[rows] for name, values in signals.items()}
        onset, questions, languages = (part[c].to_numpy() for c in ("onset", "question_id", "language"))
        bootstrap = ClusterBootstrap(part["paragraph"].to_numpy(), draws, seed)
        tables = [_block("stability", ALL, layer_stability(onset, questions, n_layers, bootstrap))]
        for language, estimate in agreement_with("en", onset, questions, languages, n_layers, bootstrap).items():
            tables.append(_block("agreement_en", language, estimate))
        tables += _means_and_ranks({"phase2": in_phase_two(onset, n_layers), **own}, languages, bootstrap)
        settings.append(_joined(str(setting), tables))
    return pd.concat(settings, ignore_index=True)


def _means_and_ranks(signals: Signals, languages: NDArray, bootstrap: ClusterBootstrap) -> list[pd.DataFrame]:
    """Of every signal the mean, of rank the median: pooled, and by language."""
    tables = []
    for language in (ALL, *dict.fromkeys(languages.tolist())):
        members = np.arange(len(languages)) if language == ALL else np.flatnonzero(languages == language)
        for name, values in signals.items():
            if name != "rank":
                tables.append(_block(name, language, bootstrap.mean(values[members], members)))
                continue
            medians = [bootstrap.median(column, members) for column in values[members].T]
            known = (~np.isnan(values[members])).sum(0)
            bounds = ([getattr(m, name) for m in medians] for name in ("value", "lo", "hi"))
            tables.append(_block(name, language, (*map(np.array, bounds), known)))
    return tables


def _joined(setting: str, tables: list[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "setting", setting)
    return table.sort_values(["layer"], kind="stable", ignore_index=True)


def replace_signals(
    layers: pd.DataFrame, examples: pd.DataFrame, signals: Signals, draws: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Layer and example tables with the rows and columns of ``signals`` anew, everything else as it was."""
    fresh = []
    for setting, rows in examples.groupby("setting", sort=False).indices.items():
        part = examples.iloc[rows]
        bootstrap = ClusterBootstrap(part["paragraph"].to_numpy(), draws, seed)
        own = {name: values[rows] for name, values in signals.items()}
        old = layers[(layers["setting"] == setting) & ~layers["signal"].isin(list(signals))].drop(columns="setting")
        languages = part["language"].to_numpy()
        table = _joined(str(setting), [old, *_means_and_ranks(own, languages, bootstrap)])
        fresh.append(_in_order(table, languages))
    last = {f"{name}_last": values[:, -1] for name, values in signals.items()}
    return pd.concat(fresh, ignore_index=True), examples.assign(**last)


def _in_order(table: pd.DataFrame, languages: NDArray) -> pd.DataFrame:
    """Rows of one setting in the order of ``layer_table``: in each layer, all signals of one language together."""
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
    """Per setting, in plain values: alpha, boundary, spread, phased fraction, encoding depth; the same by language."""
    result: dict[str, Any] = {}
    for setting, rows in examples.groupby("setting", sort=False).indices.items():
        part, own = examples.iloc[rows], {name: values[rows] for name, values in signals.items()}
        languages = part["language"].to_numpy()
        bootstrap = ClusterBootstrap(part["paragraph"].to_numpy(), draws, seed)
        alpha = krippendorff_alpha(part["onset"].to_numpy(), part["question_id"].to_numpy(), bootstrap)
        everyone = np.arange(len(part))
        result[str(setting)] = {
            "alpha": alpha.to_dict(),
            **_phases(part, own, n_blocks, bootstrap, everyone),
            "paragraphs": bootstrap.n_clusters,
            "languages": {
                language: _phases(part, own, n_blocks, bootstrap, np.flatnonzero(languages == language))
                for language in dict.fromkeys(languages.tolist())
            },
        }
    return result


def _phases(
    part: pd.DataFrame, signals: Signals, n_blocks: int, bootstrap: ClusterBootstrap, members: NDArray
) -> dict[str, Any]:
    """Boundary and what belongs to it, of the examples ``members``."""
    onset = part["onset"].to_numpy()[members]
    boundary, spread = bootstrap.median(onset, members), bootstrap.spread(onset, members)
    phased = bootstrap.mean(part["phased"].to_numpy()[members, None].astype(np.float64), members)[:3]
    entry: dict[str, Any] = {
        "boundary": boundary.to_dict(),
        "relative_boundary": _scaled(boundary, n_blocks).to_dict(),
        "spread": _scaled(spread, n_blocks).to_dict(),
        "phased_fraction": Estimate(*(float(v[0]) for v in phased)).to_dict(),
        "without_onset": int(np.isnan(onset).sum()),
        "n": len(members),
    }
    if "encoding" in signals:
        entry |= _encoding_phase(signals["encoding"][members], onset, bootstrap, members)
    return entry


def _scaled(estimate: Estimate, n_blocks: int) -> Estimate:
    return Estimate(*(value / n_blocks for value in (estimate.value, estimate.lo, estimate.hi)))


def _encoding_phase(
    encoding: NDArray, onset: NDArray, bootstrap: ClusterBootstrap, members: NDArray
) -> dict[str, dict[str, float | None]]:
    """Encoding depth and peak of the mean encoding curve, and whether the depth lies below the median onset.

    ``phase_order``: 1 or 0, with ``share``, the share of draws in which it is 1; None where one of the two is missing.
    """
    mean, drawn, counts = bootstrap.drawn_means(encoding, members)
    depths, peaks = encoding_depths(np.concatenate([mean[None], drawn]))
    clusters = np.array([int((counts > 0).any(1).sum())])
    found: dict[str, dict[str, float | None]] = {}
    for name, values in (("encoding_depth", depths), ("encoding_peak", peaks)):
        lo, hi = bootstrap.interval(values[1:, None], clusters)
        found[name] = Estimate(float(values[0]), float(lo[0]), float(hi[0])).to_dict()
    tau, taus, _ = bootstrap.drawn_medians(onset, members)
    both = ~np.isnan(depths[1:] + taus)
    known = not np.isnan(depths[0] + tau)
    found["phase_order"] = {
        "value": float(depths[0] < tau) if known else None,
        "share": float((depths[1:] < taus)[both].mean()) if known and both.any() and clusters[0] > 1 else None,
    }
    return found


def stability_table(layers: pd.DataFrame, setting: str) -> pd.DataFrame:
    """One row per layer: phase, stability with interval, and the pooled value of every signal."""
    pooled = layers[(layers["setting"] == setting) & (layers["language"] == ALL)]
    wide = pooled.pivot(index="layer", columns="signal", values="value")
    stability = pooled[pooled["signal"] == "stability"].set_index("layer")
    phase = np.where(wide["phase2"] > 0.5, 2, 1)  # more than half of the examples have reached their onset
    table = pd.DataFrame({"phase": phase}, index=wide.index)
    table["stability"], table["stability_lo"], table["stability_hi"] = (stability[c] for c in ("value", "lo", "hi"))
    for name in wide.columns.drop("stability"):
        table[name] = wide[name]
    first = [c for c in LEADING if c in table]
    return table[[*first, *(c for c in table if c not in first)]]
