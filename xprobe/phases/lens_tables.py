"""Phases under several lenses side by side: the figures of a run, once for each lens, by the same functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.phases.bootstrap import ClusterBootstrap, Estimate
from xprobe.phases.tables import ALL, example_table, layer_table, summaries

DEPTHS = (25, 50, 75)  # in percent of the blocks: where the summary shows single layers
SCRIPT = "script_"  # begins the name of a signal: the share of top tokens in a script
LATENT = ("latent_english", "latent_own", "latent_share")
LENS_LAYER_COLUMNS = ("lens", "setting", "layer", "language", "signal", "value", "lo", "hi", "n")
LENS_EXAMPLE_COLUMNS = (
    "lens", "setting", "language", "question_id", "paragraph", "onset", "sharpness", "rise", "phased", "readiness_last",
)  # fmt: skip
_AT_DEPTHS = ("readiness", "script", "script_share", "latent_share")
LENS_COLUMNS = (
    "lens", "setting", "language", "n", "boundary", "boundary_lo", "boundary_hi", "relative_boundary", "alpha",
    "alpha_lo", "alpha_hi", "stability", "spread", "phased_fraction", "onset_mean", "onset_mean_lo", "onset_mean_hi",
    "onset_shift", "onset_shift_lo", "onset_shift_hi", "readiness_last",
    *(f"{name}_{depth}" for name in _AT_DEPTHS for depth in DEPTHS),
)  # fmt: skip
Floats = NDArray[np.float64]
Signals = Mapping[str, Floats]  # name -> [N, L + 1]


@dataclass(frozen=True, eq=False)
class LensTables:
    """What ``compare_lenses`` finds.

    Attributes
    ----------
    summary : DataFrame
        One row per lens, setting and language, with the columns ``LENS_COLUMNS``.
    by_layer : DataFrame
        Columns ``LENS_LAYER_COLUMNS``.
    by_example : DataFrame
        Columns ``LENS_EXAMPLE_COLUMNS``.
    settings : dict
        The figures of the summary in plain values: by setting, lens, and under ``languages`` by language.
    """

    summary: pd.DataFrame
    by_layer: pd.DataFrame
    by_example: pd.DataFrame
    settings: dict[str, dict[str, Any]]


def depth_layers(n_blocks: int) -> dict[int, int]:
    """The layer at each depth of ``DEPTHS``.

    Examples
    --------
    >>> depth_layers(30)
    {25: 8, 50: 15, 75: 23}
    """
    return {depth: int(n_blocks * depth / 100 + 0.5) for depth in DEPTHS}


def compare_lenses(
    frame: pd.DataFrame,
    readings: Mapping[str, Signals],
    more: Mapping[str, Signals],
    *,
    own: str,
    permutations: int,
    draws: int,
    seed: int,
) -> LensTables:
    """The phases under every lens, by the functions of ``xprobe.phases.tables`` that a run uses.

    Parameters
    ----------
    frame : DataFrame of N rows
        setting, language, question_id, paragraph.
    readings : mapping of str to mapping of str to array [N, L + 1]
        By lens: the signals of ``xprobe.phases.signals.example_signals``, ``readiness`` among them.
    more : mapping of str to mapping of str to array [N, L + 1]
        By lens: signals whose means are taken and that no phase follows from (``script_...``, ``latent_...``). NaN
        where an example has no value; a signal without any value is left out.
    own : str
        The lens of the run: what ``onset_shift`` is measured from.
    permutations, draws, seed : int
        As those of the run.

    Examples
    --------
    >>> frame = pd.DataFrame({"setting": "en-x", "language": "de", "question_id": list("ab"), "paragraph": list("pq")})
    >>> late, early = np.array([[0.25, 0.25, 0.25, 0.75, 0.75]] * 2), np.array([[0.25, 0.25, 0.75, 0.75, 0.75]] * 2)
    >>> found = compare_lenses(frame, {"logit": {"readiness": late}, "j": {"readiness": early}}, {}, own="logit",
    ...                        permutations=20, draws=50, seed=0)
    >>> found.summary.query("language == 'all'")[["lens", "boundary", "onset_shift"]].values.tolist()
    [['logit', 3.0, 0.0], ['j', 2.0, -1.0]]
    """
    examples = {lens: example_table(frame, dict(signals), permutations, seed) for lens, signals in readings.items()}
    by_layer, rows = [], []
    settings: dict[str, dict[str, Any]] = {}
    for lens, signals in readings.items():
        others = {name: values for name, values in more.get(lens, {}).items() if not np.isnan(values).all()}
        layers = layer_table(examples[lens], {**signals, **others}, draws, seed).assign(lens=lens)
        by_layer.append(layers[~layers["signal"].isin(LATENT) | (layers["n"] > 0)])  # en-x has no latent language
        n_blocks = signals["readiness"].shape[1] - 1
        figures = summaries(examples[lens], dict(signals), n_blocks, draws, seed)
        shift = examples[lens]["onset"].to_numpy() - examples[own]["onset"].to_numpy()
        for setting, entry in figures.items():
            inside = np.flatnonzero(frame["setting"].to_numpy() == setting)
            part, of_setting = layers[layers["setting"] == setting], examples[lens].iloc[inside]
            bootstrap = ClusterBootstrap(of_setting["paragraph"].to_numpy(), draws, seed)
            for language, found in ((ALL, entry), *entry["languages"].items()):
                spoken = of_setting["language"].to_numpy() == language
                members = np.arange(len(inside)) if language == ALL else np.flatnonzero(spoken)
                onset = of_setting["onset"].to_numpy()[members]
                found["onset_mean"] = _mean(bootstrap, onset, members)
                found["onset_shift"] = _mean(bootstrap, shift[inside][members], members)
                found |= _single_layers(part[part["language"] == language], n_blocks)
                rows.append({"lens": lens, "setting": setting, "language": language, **_flat(found)})
            settings.setdefault(setting, {})[lens] = entry
    summary = pd.DataFrame(rows).reindex(columns=list(LENS_COLUMNS))
    order = {name: place for place, name in enumerate(settings)}
    summary = summary.sort_values("setting", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    return LensTables(
        summary,
        pd.concat(by_layer, ignore_index=True)[list(LENS_LAYER_COLUMNS)],
        pd.concat([table.assign(lens=lens) for lens, table in examples.items()], ignore_index=True)[
            list(LENS_EXAMPLE_COLUMNS)
        ],
        settings,
    )


def script_shares(scripts: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, Floats]:
    """One signal for each script: 1 where the top token of an example at a layer is in it, else 0.

    Parameters
    ----------
    scripts : N sequences of L + 1 names
    names : sequence of str
        The scripts that get a signal.

    Examples
    --------
    >>> {name: values.tolist() for name, values in script_shares([["han", "latin"]], ["latin", "han"]).items()}
    {'script_latin': [[0.0, 1.0]], 'script_han': [[1.0, 0.0]]}
    """
    found = np.array(scripts, dtype=object)
    return {f"{SCRIPT}{name}": (found == name).astype(np.float64) for name in names}


def latent_signals(values: Floats) -> dict[str, Floats]:
    """Signals of the latent language: both log-probabilities, and the share of the question's own language.

    Parameters
    ----------
    values : array [N, L + 1, 2]
        Log-probabilities, in nats, of the first token of the answer in English and in the language of the question;
        NaN where the tokens are the same or there is no English answer.

    Returns
    -------
    dict of str to array [N, L + 1]
        ``latent_english``, ``latent_own``, and ``latent_share`` = p(own) / (p(English) + p(own)).

    Examples
    --------
    >>> latent_signals(np.log([[[0.6, 0.2], [0.1, 0.3]]]))["latent_share"].round(6).tolist()
    [[0.25, 0.75]]
    """
    english, own = values[..., 0], values[..., 1]
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        share = np.exp(own - np.logaddexp(english, own))
    return dict(zip(LATENT, (english, own, share), strict=True))


def _mean(bootstrap: ClusterBootstrap, values: Floats, members: NDArray) -> dict[str, float | None]:
    return Estimate(*(float(part[0]) for part in bootstrap.mean(values[:, None], members)[:3])).to_dict()


def _single_layers(layers: pd.DataFrame, n_blocks: int) -> dict[str, Any]:
    """Mean S(l), readiness of the last layer, and under ``depths`` the figures of single layers."""
    values = layers.set_index(["signal", "layer"])["value"]
    known = set(layers["signal"])

    def at(signal: str, layer: int) -> float | None:
        value = float(values[signal, layer]) if signal in known else float("nan")
        return None if np.isnan(value) else value

    depths: dict[str, dict[str, Any]] = {}
    for depth, layer in depth_layers(n_blocks).items():
        shares = {name.removeprefix(SCRIPT): at(name, layer) for name in known if name.startswith(SCRIPT)}
        some = {name: share for name, share in sorted(shares.items()) if share}
        script = max(some, key=lambda name: some[name]) if some else None
        depths[str(depth)] = {
            "layer": layer, "readiness": at("readiness", layer), "script": script,
            "script_share": None if script is None else some[script], "latent_share": at("latent_share", layer),
        }  # fmt: skip
    found: dict[str, Any] = {"readiness_last": at("readiness", n_blocks), "depths": depths}
    if "stability" in known:
        mean = float(values["stability"].mean())
        found["stability"] = None if np.isnan(mean) else mean
    return found


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one lens, setting and language as columns of the summary."""
    row: dict[str, Any] = {}
    for name, value in found.items():
        if name == "depths":
            for depth, single in value.items():
                row |= {f"{key}_{depth}": single[key] for key in _AT_DEPTHS}
        elif isinstance(value, dict) and "value" in value:
            row |= {name if part == "value" else f"{name}_{part}": number for part, number in value.items()}
        else:
            row[name] = value
    return row
