"""The panels of the figures: each function draws one table of a run into one Axes, and computes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xprobe.report.figure_style import (
    DASH_DOT,
    DASHES,
    DOTS,
    LONG_DASHES,
    Look,
    background,
    curve,
    dots,
    layer_axis,
    legend_above,
    mark_layer,
    numbers,
    rows,
    undefined,
    with_interval,
)
from xprobe.report.palette import (
    BLACK,
    BLUE,
    BOUNDARIES,
    ERROR_TYPES,
    GREEN,
    GREY,
    MAP,
    PATCHES,
    SKY,
    STABILITY,
    STATES,
    TOKENS,
    signal_colour,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ALL = "all"  # the pooled rows of a table by language

ONSET = Look("retrieval onset (read)", BOUNDARIES["onset"], DOTS, "o")
DEPTH = Look("encoding depth (read)", BOUNDARIES["depth"], DASHES, "s")
ONSET_LINE, DEPTH_LINE = (ONSET.colour, ONSET.line), (DEPTH.colour, DEPTH.line)
HELD = Look("answer held from (patched)", BOUNDARIES["held"], "-", "D")
USED = Look("question used up to (patched)", BOUNDARIES["used"], DASH_DOT, "^")

SIGNAL_NAMES = {
    "readiness": "readiness (0 to 1)",
    "encoding": "encoding (0 to 1)",
    "encoding_selectivity": "encoding − control",
    "log_probability": "log-probability (nats)",
    "rank": "median rank",
    "entropy": "entropy (nats)",
    "kl": "KL to the last layer (nats)",
    "phase2": "share of examples in phase 2",
}

CAUSES = {  # (pairs, kind) -> look
    key: Look(label, PATCHES[key], line, marker)
    for key, (label, line, marker) in {
        ("same", "answer"): ("T: last token's state", "-", "D"),
        ("same", "question"): ("Q: question's states", DASH_DOT, "^"),
        ("cross", "answer"): ("T, other language", DASHES, ""),
        ("cross", "question"): ("Q, other language", DOTS, ""),
        ("same", "same_question"): ("control: same question", LONG_DASHES, ""),
    }.items()
}
READ = {
    "readiness": Look("readiness", signal_colour("readiness"), "-", "o"),
    "encoding_selectivity": Look("encoding − control", signal_colour("encoding_selectivity"), DASHES, "s"),
}
GROUPS = {
    "question": Look("question", TOKENS["question"], DASHES, "s"),
    "answer": Look("answer in the context", TOKENS["answer"], "-", "o"),
    "context": Look("other context", TOKENS["context"], DASH_DOT, "^"),
    "template": Look("template", TOKENS["template"], DOTS, "x"),
    "given": Look("answer tokens given", TOKENS["given"], "-", "v"),
}
LOOKS_OF_STATES = {  # state -> look of the score; its control is a thin line of the same colour
    "prompt_end": Look("last prompt token", STATES["prompt_end"], "-", "s"),
    "question_mean": Look("question's tokens", STATES["question_mean"], DASHES, "o"),
}
METRICS = {"encoding": "encoding of the prediction", "accuracy": "accuracy", "roc_auc": "ROC AUC"}
HATCHES = {"content": "....", "wrong language": "////", "gibberish": "xxxx", "refusal": "----"}  # of error types


def by_language(layers: pd.DataFrame, signal: str) -> pd.DataFrame:
    """A signal of ``layers.parquet``: one row per layer, one column per language, in the run's order.

    Examples
    --------
    >>> import pandas as pd
    >>> layers = pd.DataFrame({"signal": "rank", "language": ["th", "de", "all"], "layer": 0, "value": [1.0, 2.0, 1.5]})
    >>> by_language(layers, "rank").to_dict("list")
    {'th': [1.0], 'de': [2.0]}
    """
    part = layers[(layers["signal"] == signal) & (layers["language"] != ALL)]
    return part.pivot(index="layer", columns="language", values="value")[list(dict.fromkeys(part["language"]))]


def pooled(layers: pd.DataFrame, signal: str) -> pd.DataFrame:
    """A signal of all languages together: value, lo and hi by layer."""
    part = layers[(layers["signal"] == signal) & (layers["language"] == ALL)]
    return part.set_index("layer")[["value", "lo", "hi"]]


def draw_stability(axes: Axes, layers: pd.DataFrame, summary: Mapping[str, Any], n_blocks: int) -> None:
    """S(l) with its interval, the boundary, and each language's agreement with English."""
    table, agreement = pooled(layers, "stability"), by_language(layers, "agreement_en")
    lowest = min([table["value"].min(), table["lo"].min(), *agreement.min()], key=lambda low: (math.isnan(low), low))
    if math.isnan(lowest):
        undefined(axes, "stability needs two languages")
        lowest = 0.0
    else:
        curve(axes, table, Look("stability S(l)", STABILITY, "-", "s"))
    if not agreement.empty:
        background(axes, agreement, "each with English")
    mark_layer(axes, summary["boundary"], Look(f"boundary {with_interval(summary['boundary'])}", *ONSET_LINE))
    axes.set_ylim(max(0.0, math.floor(10 * lowest - 0.2) / 10), 1.02)
    axes.set_ylabel("share of agreeing pairs")
    layer_axis(axes, n_blocks)
    legend_above(axes)


def draw_signal(axes: Axes, layers: pd.DataFrame, name: str, summary: Mapping[str, Any], n_blocks: int) -> None:
    """One signal by layer: all languages with interval, each language in the background, and the layer it marks."""
    marks = {"readiness": ("boundary", ONSET_LINE), "encoding": ("encoding_depth", DEPTH_LINE)}
    figure, line = marks.get(name.removesuffix("_selectivity"), ("", ONSET_LINE))
    if figure in summary:
        mark_layer(axes, summary[figure], Look(f"{figure.replace('_', ' ')} {with_interval(summary[figure])}", *line))
    background(axes, by_language(layers, name), "other languages" if "en" in summary["languages"] else "each language")
    colour = signal_colour(name)
    curve(axes, pooled(layers, name), Look("all languages", colour, "-", "s" if colour == BLUE else "o"))
    if name.endswith("selectivity"):
        axes.axhline(0, color=BLACK, linewidth=0.5, zorder=1)
    if name == "rank":
        axes.set_yscale("log")
    axes.set_ylabel(SIGNAL_NAMES.get(name, name.replace("_", " ")))
    layer_axis(axes, n_blocks)
    legend_above(axes)


def draw_onsets(axes: Axes, examples: pd.DataFrame, summary: Mapping[str, Any], n_blocks: int) -> None:
    """A histogram of the retrieval onsets for each language, and the median.

    Examples
    --------
    >>> import pandas as pd
    >>> examples = pd.DataFrame({"language": ["en", "en", "de"], "onset": [2.0, 3.0, 2.0]})
    >>> median = {"boundary": {"value": 2.0, "lo": None, "hi": None}}
    >>> summary = {"languages": {"en": {"boundary": {"value": 2.5, "lo": None, "hi": None}}, "de": median}}
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> draw_onsets(axes, examples, summary, 4)
    >>> axes.get_xlabel(), [label.get_text() for label in axes.get_yticklabels()]
    ('retrieval onset (layer)', ['en', 'de'])
    """
    import numpy as np

    edges = np.arange(n_blocks + 2) - 0.5
    languages = list(summary["languages"])
    onsets = {name: examples.loc[examples["language"] == name, "onset"].dropna() for name in languages}
    shares = {name: np.histogram(some, edges)[0] / max(len(some), 1) for name, some in onsets.items()}
    highest = max(0.01, *(float(some.max()) for some in shares.values()))
    rows(axes, languages)
    for row, name in enumerate(languages):
        tops = row + 0.45 - 0.9 * shares[name] / highest
        axes.stairs(tops, edges, baseline=row + 0.45, fill=True, color=SKY, zorder=2)
        axes.hlines(row + 0.45, 0, n_blocks, color=GREY, linewidth=0.4, zorder=1)
    axes.fill_between([], [], color=SKY, label=f"share of examples (full row: {100 * highest:.0f} %)")
    medians = [{"value": summary["languages"][name]["boundary"]["value"]} for name in languages]
    dots(axes, np.arange(len(languages)) + 0.45, medians, Look("median", BLACK, "", "D"))
    layer_axis(axes, n_blocks, "retrieval onset (layer)")
    legend_above(axes)


def draw_agreement(axes: Axes, layers: pd.DataFrame, summary: Mapping[str, Any], n_blocks: int) -> None:
    """A map of languages by layers: the share of questions in the same phase as in English."""
    table = by_language(layers, "agreement_en")
    axes.set_yticks(range(len(table.columns)), list(table.columns))
    axes.set_ylabel("language")
    low = math.floor(10 * min(float(table.min().min()), 0.9)) / 10
    image = axes.imshow(table.T.to_numpy(), aspect="auto", interpolation="nearest", cmap=MAP, vmin=low, vmax=1.0)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("questions in the same phase\nas in English (share)")
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize="small", length=2, width=0.5)
    value = numbers(summary["boundary"])[0]
    if not math.isnan(value):
        axes.axvline(value, color="white", linestyle=DOTS, linewidth=1.4)
        axes.axvline(value, color=BLACK, linestyle=DOTS, linewidth=0.8, label="boundary")
    layer_axis(axes, n_blocks)
    axes.set_xlim(-0.5, n_blocks + 0.5)
    legend_above(axes)


def draw_boundaries(axes: Axes, summary: Mapping[str, Any], patched: Mapping[str, Any] | None, n_blocks: int) -> None:
    """Layers by language, with intervals: encoding depth and retrieval onset, and what patches show.

    Examples
    --------
    >>> own = {"boundary": {"value": 3.0, "lo": 2.0, "hi": 3.0}, "encoding_depth": {"value": 1.0}}
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> draw_boundaries(axes, {**own, "languages": {"en": own, "de": own}}, None, 4)
    >>> [(line.get_label(), [float(layer) for layer in line.get_xdata()]) for line in axes.lines[:2]]
    [('encoding depth (read)', [1.0, 1.0, 1.0]), ('retrieval onset (read)', [3.0, 3.0, 3.0])]
    """
    names = [*summary["languages"], ALL]
    read = [*summary["languages"].values(), summary]
    shown = [(DEPTH, [one.get("encoding_depth") for one in read]), (ONSET, [one["boundary"] for one in read])]
    if patched is not None:
        causal = [*(patched["languages"].get(name, {}) for name in names[:-1]), patched]
        shown.insert(1, (USED, [one.get("question_boundary") for one in causal]))
        shown.insert(2, (HELD, [one.get("answer_boundary") for one in causal]))
    rows(axes, names)
    for place, (look, entries) in enumerate(shown):
        shift = 0.8 * (place - (len(shown) - 1) / 2) / len(shown)
        dots(axes, [row + shift for row in range(len(names))], entries, look)
    axes.axhline(len(names) - 1.5, color=GREY, linewidth=0.6)
    layer_axis(axes, n_blocks)
    legend_above(axes, 1 if patched is not None else 2)


def draw_effects(axes: Axes, curves: pd.DataFrame, n_blocks: int) -> None:
    """Effects of patches by layer: T and Q with intervals, across languages, and a control."""
    own = curves[(curves["measure"] == "effect") & (curves["language"] == ALL) & (curves["other_language"] == ALL)]
    for (pairs, kind), look in CAUSES.items():
        part = own[(own["pairs"] == pairs) & (own["kind"] == kind)].set_index("layer")
        if len(part):
            curve(axes, part if look.marker else part[["value"]], look, linewidth=1.3 if look.marker else 1.0)
    axes.axhline(0.5, color=GREY, linewidth=0.5, zorder=1)
    axes.set_ylim(-0.3, 1.3)
    axes.set_ylabel("effect of a patch")
    layer_axis(axes, n_blocks)
    legend_above(axes)


def draw_read(axes: Axes, layers: pd.DataFrame, summary: Mapping[str, Any], n_blocks: int) -> None:
    """What can be read from the states: readiness and encoding of all languages, with the layers where they step up."""
    for figure, look in (("encoding_depth", DEPTH), ("boundary", ONSET)):
        if figure in summary:
            mark_layer(
                axes,
                {"value": summary[figure]["value"]},
                Look(look.label.removesuffix(" (read)"), look.colour, look.line),
            )
    for name, look in READ.items():
        table = pooled(layers, name)
        if len(table):
            curve(axes, table, look)
    axes.set_ylabel("signal")
    layer_axis(axes, n_blocks)
    legend_above(axes)


def draw_shares(axes: Axes, shares: pd.DataFrame, n_blocks: int) -> None:
    """The share of the relevance of each group of tokens by layer, with intervals."""
    for group, look in GROUPS.items():
        part = shares[(shares["group"] == group) & (shares["language"] == ALL)].set_index("layer")
        if len(part):
            curve(axes, part, look)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of the relevance")
    layer_axis(axes, n_blocks)
    legend_above(axes)


def draw_depths(axes: Axes, summary: Mapping[str, Any], n_blocks: int) -> None:
    """Major relevance depth of each group of tokens: all languages with interval, each language as a grey dot."""
    groups = [name for name in GROUPS if summary["mrd"].get(name, {}).get("value") is not None]
    rows(axes, [GROUPS[name].label.replace("answer in the context", "answer").replace("answer tokens ", "")
                for name in groups], "tokens")  # fmt: skip
    for row, group in enumerate(groups):
        spoken = [one["mrd"].get(group) for one in summary["languages"].values()]
        values = [{"value": numbers(entry)[0]} for entry in spoken]
        name = "each language" if row == 0 else f"_{group}"
        dots(axes, [row + 0.25] * len(values), values, Look(name, GREY, "", "|"))
        look = GROUPS[group]
        dots(axes, [row - 0.1], [summary["mrd"][group]], Look("_all", look.colour, "", look.marker))
    layer_axis(axes, n_blocks, "major relevance depth (layer)")
    legend_above(axes)


def draw_performance(
    axes: Axes, across: Mapping[str, Any], f1: Mapping[str, Any], name: str, *, whole: bool = False
) -> dict[str, tuple[float, float]]:
    """F1 of each language over another figure of it, both with intervals. Returns the points, to be labelled.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> onsets = {"en": {"value": 17, "lo": 16, "hi": 18}, "de": {"value": None}}
    >>> draw_performance(axes, onsets, {"en": {"value": 0.5}, "de": {"value": 0.4}}, "onset (layer)")
    {'en': (17.0, 0.5)}
    """
    from matplotlib.ticker import MaxNLocator

    points = {}
    for language, entry in across.items():
        (x, left, right), (y, low, high) = numbers(entry), numbers(f1.get(language))
        if math.isnan(x + y):
            continue
        axes.hlines(y, left, right, color=GREY, linewidth=0.6, zorder=1)
        axes.vlines(x, low, high, color=GREY, linewidth=0.6, zorder=1)
        axes.plot([x], [y], "o", color=BLUE, zorder=3, label=f"_{language}")
        points[language] = (x, y)
    if not points:
        undefined(axes, "undefined")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=whole, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlabel(name)
    axes.set_ylabel("F1 of the answers")
    return points


def draw_error_types(axes: Axes, languages: Mapping[str, Mapping[str, float]]) -> None:
    """Shares of the answers by error type, a bar for each language.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> draw_error_types(axes, {"en": {"correct": 0.75, "content": 0.25}, "de": {"correct": 1.0}})
    >>> [(float(bar.get_x()), float(bar.get_width())) for bar in axes.patches[-2:]]
    [(0.75, 0.25), (1.0, 0.0)]
    """
    import numpy as np

    names = list(languages)
    places, left = np.arange(len(names)), np.zeros(len(names))
    for kind, colour in ERROR_TYPES.items():
        widths = np.array([languages[name].get(kind, 0.0) for name in names])
        if widths.any():
            look: dict[str, Any] = {"color": colour, "hatch": HATCHES.get(kind), "edgecolor": "white"}
            axes.barh(places, widths, 0.75, left, linewidth=0.4, label=kind, **look)
        left = left + widths
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the answers")
    axes.set_ylabel("language")
    legend_above(axes)


def draw_probe(axes: Axes, table: pd.DataFrame, n_blocks: int) -> None:
    """The score of a probe by layer for each state, with its interval, beside the control task."""
    for state, part in table.groupby("state", sort=False):
        look = LOOKS_OF_STATES.get(str(state), Look(str(state).replace("_", " "), GREEN, DASH_DOT, "^"))
        part = part.set_index("layer").rename(columns={"score": "value"})
        curve(axes, part[["value", "lo", "hi"]], look)
        control = part[["control"]].rename(columns={"control": "value"})
        curve(axes, control, Look(f"{look.label}: control", look.colour, DOTS), linewidth=0.9)
    axes.set_ylabel(METRICS.get(table["metric"].iloc[0], str(table["metric"].iloc[0])))
    layer_axis(axes, n_blocks)
