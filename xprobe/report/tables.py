"""From example signals to tidy tables: one row per example, and one row per setting x layer x language x signal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.phases.agreement import krippendorff_alpha
from xprobe.phases.bootstrap import ClusterBootstrap, Estimate
from xprobe.phases.segmentation import segment
from xprobe.phases.stability import agreement_with, in_phase_two, layer_stability

ALL = "all"  # the pooled rows of a table by language
MEANS = ("readiness", "log_probability", "entropy", "kl")
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
    the means in ``MEANS``, and the median of rank. Intervals: 95 %, bootstrap over paragraphs.
    """
    blocks = []
    for setting, rows in examples.groupby("setting", sort=False).indices.items():
        part = examples.iloc[rows]
        blocks.append(_setting_layers(str(setting), part, {k: v[rows] for k, v in signals.items()}, draws, seed))
    return pd.concat(blocks, ignore_index=True)


def _setting_layers(setting: str, part: pd.DataFrame, signals: Signals, draws: int, seed: int) -> pd.DataFrame:
    onset, questions, languages = (part[c].to_numpy() for c in ("onset", "question_id", "language"))
    n_layers = signals["readiness"].shape[1]
    bootstrap = ClusterBootstrap(part["paragraph"].to_numpy(), draws, seed)
    tables = [_block("stability", ALL, layer_stability(onset, questions, n_layers, bootstrap))]
    for language, estimate in agreement_with("en", onset, questions, languages, n_layers, bootstrap).items():
        tables.append(_block("agreement_en", language, estimate))
    means = {"phase2": in_phase_two(onset, n_layers), **{name: signals[name] for name in MEANS}}
    for language in (ALL, *dict.fromkeys(languages.tolist())):
        members = np.arange(len(part)) if language == ALL else np.flatnonzero(languages == language)
        for name, values in means.items():
            tables.append(_block(name, language, bootstrap.mean(values[members], members)))
        medians = [bootstrap.median(column, members) for column in signals["rank"][members].T]
        known = (~np.isnan(signals["rank"][members])).sum(0)
        bounds = ([getattr(m, name) for m in medians] for name in ("value", "lo", "hi"))
        tables.append(_block("rank", language, (*map(np.array, bounds), known)))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "setting", setting)
    return table.sort_values(["layer"], kind="stable", ignore_index=True)


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


def summaries(examples: pd.DataFrame, n_blocks: int, draws: int, seed: int) -> dict[str, dict[str, Any]]:
    """Per setting, in plain values: alpha, boundary (median onset in layers), phased fraction; the same by language."""
    result: dict[str, dict[str, Any]] = {}
    for setting, part in examples.groupby("setting", sort=False):
        onset, languages = part["onset"].to_numpy(), part["language"].to_numpy()
        bootstrap = ClusterBootstrap(part["paragraph"].to_numpy(), draws, seed)
        entry = {
            "alpha": krippendorff_alpha(onset, part["question_id"].to_numpy(), bootstrap).to_dict(),
            **_boundary(onset, part["phased"].to_numpy(), n_blocks, bootstrap.median(onset)),
            "n": len(part),
            "paragraphs": bootstrap.n_clusters,
            "languages": {},
        }
        for language in dict.fromkeys(languages.tolist()):
            members = np.flatnonzero(languages == language)
            median = bootstrap.median(onset[members], members)
            values = _boundary(onset[members], part["phased"].to_numpy()[members], n_blocks, median)
            entry["languages"][language] = {**values, "n": len(members)}
        result[str(setting)] = entry
    return result


def _boundary(onset: NDArray, phased: NDArray, n_blocks: int, median: Estimate) -> dict[str, Any]:
    known = onset[~np.isnan(onset)]
    spread = float(np.median(np.abs(known - np.median(known)))) / n_blocks if len(known) else None
    return {
        "boundary": median.to_dict(),
        "relative_boundary": None if not len(known) else median.value / n_blocks,
        "spread": spread,
        "phased_fraction": float(phased.mean()),
        "without_onset": len(onset) - len(known),
    }


def stability_table(layers: pd.DataFrame, setting: str) -> pd.DataFrame:
    """One row per layer: phase, stability with interval, and the pooled value of every signal."""
    pooled = layers[(layers["setting"] == setting) & (layers["language"] == ALL)]
    wide = pooled.pivot(index="layer", columns="signal", values="value")
    stability = pooled[pooled["signal"] == "stability"].set_index("layer")
    phase = np.where(wide["phase2"] > 0.5, 2, 1)  # more than half of the examples have reached their onset
    table = pd.DataFrame({"phase": phase}, index=wide.index)
    table["stability"], table["stability_lo"], table["stability_hi"] = (stability[c] for c in ("value", "lo", "hi"))
    for name in ("readiness", "log_probability", "rank", "entropy", "kl", "phase2"):
        table[name] = wide[name]
    return table
