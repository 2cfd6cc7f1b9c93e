"""Tables and summaries of relevance: depths by group of tokens, shares by layer, and what the rule conserves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.phases.bootstrap import ClusterBootstrap, Estimate

Floats = NDArray[np.float64]
DEPTHS = ("mrd", "mrd_positive", "mrd_with_embeddings")
ALL = "all"


def relevance_by_layer(frame: pd.DataFrame, shares: Mapping[str, Floats], draws: int, seed: int) -> pd.DataFrame:
    """Mean share of \\|R\\| on each group of tokens by layer, for every setting and language, and for all languages.

    Parameters
    ----------
    frame : DataFrame
        Describes the N examples: setting, language, paragraph.
    shares : mapping of str to array [N, L + 1]
        By group. NaN where an example has no token of the group.
    draws, seed : int
        Of the bootstrap over paragraphs.

    Returns
    -------
    DataFrame
        Columns setting, language, layer, group, value, lo, hi, n.

    Examples
    --------
    >>> frame = pd.DataFrame({"setting": "en-x", "language": ["de", "en"], "paragraph": list("pq")})
    >>> table = relevance_by_layer(frame, {"question": np.array([[0.25, 0.5], [0.75, 0.5]])}, draws=9, seed=0)
    >>> table.query("language == 'all'")[["layer", "group", "value"]].values.tolist()
    [[0, 'question', 0.5], [1, 'question', 0.5]]
    """
    tables = []
    for setting, indices in frame.groupby("setting", sort=False).indices.items():
        rows = np.asarray(indices)
        bootstrap = ClusterBootstrap(frame["paragraph"].to_numpy()[rows], draws, seed)
        spoken = frame["language"].to_numpy()[rows]
        for language in (ALL, *dict.fromkeys(spoken)):
            members = np.arange(len(rows)) if language == ALL else np.flatnonzero(spoken == language)
            for group, values in shares.items():
                value, lo, hi, n = bootstrap.mean(values[rows][members], members)
                tables.append(
                    pd.DataFrame(
                        {
                            "setting": setting, "language": language, "layer": np.arange(values.shape[1]),
                            "group": group, "value": value, "lo": lo, "hi": hi, "n": n,
                        }
                    )
                )  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def summarise_relevance(
    table: pd.DataFrame, conserved: Floats, keys: Sequence[str], draws: int, seed: int
) -> dict[str, Any]:
    """Depths of each group, the gap between answer and question, and what is conserved, by setting and language.

    Parameters
    ----------
    table : DataFrame
        One row per example and group: ``keys``, group, and ``DEPTHS``.
    conserved : array [N, L + 1]
        Of the N examples, in the order in which they first appear in ``table``.
    keys : sequence of str
        Columns that name an example; setting, language and paragraph among them.
    draws, seed : int

    Returns
    -------
    dict
        By setting: ``n``; ``mrd``, ``mrd_positive`` and ``mrd_with_embeddings``, each {value, lo, hi} by group;
        ``gap``, ``gap_positive``, ``gap_with_embeddings`` (answer minus question, of the examples that have both);
        ``conservation`` with ``median``, ``least`` and ``most`` by layer; and ``languages`` with the same for each.

    Examples
    --------
    >>> table = pd.DataFrame({
    ...     "setting": "en-x", "language": "de", "paragraph": list("ppqq"), "question_id": list("aabb"),
    ...     "group": ["question", "answer"] * 2, "mrd": [4.0, 7.0, 5.0, 9.0], "mrd_positive": [4.0] * 4,
    ...     "mrd_with_embeddings": [4.0] * 4,
    ... })
    >>> keys = ["setting", "language", "question_id", "paragraph"]
    >>> found = summarise_relevance(table, np.ones((2, 3)), keys, draws=50, seed=0)["en-x"]
    >>> found["mrd"]["answer"]["value"], found["gap"]["value"], found["conservation"]["median"]
    (8.0, 3.5, [1.0, 1.0, 1.0])
    """
    examples = table.drop_duplicates(list(keys))[list(keys)].reset_index(drop=True)
    wide = {}
    for group in dict.fromkeys(table["group"]):
        rows = examples.merge(table[table["group"] == group], on=list(keys), how="left", validate="one_to_one")
        for depth in DEPTHS:
            wide[group, depth] = rows[depth].to_numpy(np.float64)
    bootstrap = ClusterBootstrap(examples["paragraph"].to_numpy(), draws, seed)
    found: dict[str, Any] = {}
    for setting, indices in examples.groupby("setting", sort=False).indices.items():
        members = np.asarray(indices)
        spoken = examples["language"].to_numpy()[members]
        languages = {
            str(language): _summary(wide, conserved, members[spoken == language], bootstrap)
            for language in dict.fromkeys(spoken)
        }
        found[str(setting)] = {**_summary(wide, conserved, members, bootstrap), "languages": languages}
    return found


def _summary(
    wide: Mapping[tuple[str, str], Floats], conserved: Floats, members: NDArray[np.int64], bootstrap: ClusterBootstrap
) -> dict[str, Any]:
    found: dict[str, Any] = {"n": len(members)}
    for depth in DEPTHS:
        found[depth] = {
            group: _mean(values[members], members, bootstrap) for (group, name), values in wide.items() if name == depth
        }
        if ("answer", depth) in wide and ("question", depth) in wide:
            gap = wide["answer", depth] - wide["question", depth]
            found["gap" + depth.removeprefix("mrd")] = _mean(gap[members], members, bootstrap)
    shares = conserved[members]
    parts = {"median": np.median(shares, 0), "least": shares.min(0), "most": shares.max(0)}
    found["conservation"] = {name: [round(float(value), 6) for value in values] for name, values in parts.items()}
    return found


def _mean(values: Floats, members: NDArray[np.int64], bootstrap: ClusterBootstrap) -> dict[str, float | None]:
    value, lo, hi, _ = bootstrap.mean(values[:, None], members)
    return Estimate(float(value[0]), float(lo[0]), float(hi[0])).to_dict()
