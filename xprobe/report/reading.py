"""Sections of the page on what can be read from the states: phases, signals, languages, probes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xprobe.report import charts
from xprobe.report.palette import BOUNDARIES, PHASE_TWO, SERIES, STABILITY, signal_colour
from xprobe.report.parts import (
    ALL,
    Card,
    Cell,
    Figure,
    Section,
    Table,
    figure,
    interval,
    interval_cell,
    languages_of,
    missing,
    records,
    short,
    stage_results,
)

if TYPE_CHECKING:
    from xprobe.results import SettingResult, Study

# columns of the table of languages that a printed page leaves out; most are printed with the figures of their stage
SCREEN = ("examples", "spread", "question used up to", "MRD question", "MRD answer", "exact match")


def cards(study: Study, result: SettingResult) -> list[Card]:
    summary = result.summary
    last = study.manifest.model.n_blocks
    relative = summary["relative_boundary"]["value"]
    share = "" if missing(relative) else f"{relative:.0%} of {last} layers"
    cards = [
        Card("Phase boundary", interval(summary["boundary"]), f"layer; {share}" if share else "layer"),
        Card("Phasing stability α", interval(summary["alpha"]), "over languages; 1: the same onset in all"),
        Card("Phased examples", interval(summary["phased_fraction"]), f"share of {summary['n']}"),
    ]
    if "encoding_depth" in summary:
        cards.append(Card("Encoding depth", interval(summary["encoding_depth"]), "layer"))
    if (patched := stage_results(study, "patching", result.setting)) is not None:
        cards.append(
            Card("Causal boundary", interval(patched["same"]["answer_boundary"]), "layer; answer held from here")
        )
    if (answers := stage_results(study, "answers", result.setting)) is not None:
        cards.append(Card("F1", interval(answers["f1"]), f"exact match {interval(answers['exact_match'])}"))
    return cards


def phases(study: Study, result: SettingResult) -> Section:
    setting, frame = result.setting, result.stability.reset_index()
    columns = {"stability": "S(l)", "phase2": "share in phase 2"}
    rows: list[dict[str, Any]] = []
    for name, series in columns.items():
        part = frame.rename(columns={name: "value", f"{name}_lo": "lo", f"{name}_hi": "hi"})
        names = [column for column in ("layer", "value", "lo", "hi") if column in part]
        rows += [{"series": series, **row} for row in records(part, names) if "value" in row]
    present = [series for series in columns.values() if any(row["series"] == series for row in rows)]
    colours = dict(zip(columns.values(), (STABILITY, PHASE_TWO), strict=True))
    mark: dict[str, Any] = {"mark": result.boundary, "mark_name": "boundary"}
    chart = charts.lines(rows, present, "probability", colours=colours, domain=(0, 1), **mark)
    caption = (
        "S(l): the chance that two random languages of the same question put layer l in the same phase, with a 95 % "
        "interval over paragraphs; share of examples in phase 2. Grey: the boundary, the median retrieval onset."
    )
    if columns["stability"] not in present:
        caption += " S(l) and alpha need at least two languages."
    stability = figure(
        f"{setting}-stability", "Phase stability by layer", caption, chart, rows, "series layer value lo hi"
    )
    return Section(
        f"{setting}-phases", "Phases and stability", "Layers below the retrieval onset are in phase 1 (question "
        "encoding), the others in phase 2 (answer retrieval). In the table, the boundary is the median onset, spread "
        "is the median distance of the onsets from it as a share of all layers, and phased is the share of examples "
        "whose split into two phases is clear.", [stability], [_language_table(study, result)],
    )  # fmt: skip


def _language_table(study: Study, result: SettingResult) -> Table:
    """One row for each language, with the figures of all stages."""
    answers, patched, relevance = (
        (stage_results(study, stage, result.setting) or {}) for stage in ("answers", "patching", "relevance")
    )
    same = patched.get("same", {}).get("languages", {})
    columns: list[tuple[str, Any]] = [
        ("examples", lambda name, own: Cell(str(own["n"]), own["n"])),
        ("boundary", lambda name, own: interval_cell(own["boundary"])),
        ("spread", lambda name, own: interval_cell(own["spread"])),
        ("phased", lambda name, own: interval_cell(own["phased_fraction"])),
    ]
    if "encoding_depth" in result.summary:
        columns.append(("encoding depth", lambda name, own: interval_cell(own.get("encoding_depth"))))
    if same:
        columns.append(("answer held from", lambda name, own: interval_cell(same.get(name, {}).get("answer_boundary"))))
        columns.append(
            ("question used up to", lambda name, own: interval_cell(same.get(name, {}).get("question_boundary")))
        )
    if relevance:
        depths = relevance["languages"]
        for group in ("question", "answer"):
            columns.append(
                (
                    f"MRD {group}",
                    lambda name, own, group=group: interval_cell(depths.get(name, {}).get("mrd", {}).get(group)),
                )
            )
    if answers:
        scores = answers["languages"]
        columns.append(("F1", lambda name, own: interval_cell(scores.get(name, {}).get("f1"))))
        columns.append(("exact match", lambda name, own: interval_cell(scores.get(name, {}).get("exact_match"))))
    rows = [
        [Cell(name, name), *(make(name, own) for _, make in columns)]
        for name, own in result.summary["languages"].items()
    ]
    heads = ["language", *(head for head, _ in columns)]
    return Table("Languages side by side", heads, rows, [False] + [True] * len(columns), SCREEN)


def signals(study: Study, result: SettingResult) -> Section | None:
    names = {
        "readiness": (
            "readiness",
            "Readiness: how far the answer's tokens have risen among all tokens, by rank; 1 is the first place.",
        ),
        "encoding_selectivity": (
            "encoding above its control",
            "Encoding: how well the state matches the same question in other languages, among all questions on its "
            "paragraph. The figure of shuffled pairs (control) is subtracted.",
        ),
    }  # fmt: skip
    signals = result.signals.reset_index()
    figures = []
    for signal, (title, caption) in names.items():
        own = signals[signals["signal"] == signal]
        if own["value"].notna().any():
            rows = [row for row in records(own, ("language", "layer", "value", "lo", "hi")) if "value" in row]
            domain = (0, 1) if signal == "readiness" else None
            chart = charts.by_language(rows, title, colour=signal_colour(signal), domain=domain)
            text = f"{caption} Thick: all languages, with interval. Dashed: English. Grey: the others; point at one."
            figures.append(
                figure(
                    f"{result.setting}-{signal}", title.capitalize(), text, chart, rows, "language layer value lo hi"
                )
            )
    return Section(f"{result.setting}-signals", "Signals", "", figures) if figures else None


def languages(study: Study, result: SettingResult) -> Section:
    examples, languages, figures = result.examples, languages_of(result), []
    counts = examples.dropna(subset=["onset"]).groupby(["language", "onset"]).size()
    totals = examples.groupby("language").size()
    last = study.manifest.model.n_blocks
    rows: list[dict[str, Any]] = [
        {
            "language": language,
            "layer": layer,
            "value": short((n := int(counts.get((language, layer), 0))) / totals[language]),
            "n": n,
        }
        for language in languages
        for layer in range(last + 1)
    ]
    if len(counts):
        highest = max(float(row["value"]) for row in rows)
        chart = charts.grid(rows, languages, "share of examples", domain=(0, highest))
        text = (
            "Where the retrieval onsets of the examples lie. An example's onset is the layer at which its readiness "
            "steps up."
        )
        figures.append(
            figure(f"{result.setting}-onsets", "Retrieval onsets", text, chart, rows, "language layer value n")
        )
    agreement = result.signals.reset_index()
    agreement = agreement[(agreement["signal"] == "agreement_en") & (agreement["language"] != ALL)]
    if agreement["value"].notna().any():
        rows = [row for row in records(agreement, ("language", "layer", "value", "n")) if "value" in row]
        others = [language for language in languages if any(row["language"] == language for row in rows)]
        chart = charts.grid(rows, others, "agreement with English")
        text = "Share of questions whose layer is in the same phase in this language and in English."
        figures.append(
            figure(f"{result.setting}-agreement", "Agreement with English", text, chart, rows, "language layer value n")
        )
    figures.append(_boundaries(study, result))
    return Section(f"{result.setting}-languages", "Languages", "", figures)


def _boundaries(study: Study, result: SettingResult) -> Figure:
    same = ((stage_results(study, "patching", result.setting) or {}).get("same") or {}).get("languages", {})
    sources: dict[str, Any] = {
        "retrieval onset (read)": lambda name, own: own["boundary"],
        "encoding depth (read)": lambda name, own: own.get("encoding_depth"),
        "answer held from (caused)": lambda name, own: same.get(name, {}).get("answer_boundary"),
        "question used up to (caused)": lambda name, own: same.get(name, {}).get("question_boundary"),
    }
    rows = []
    for name, own in result.summary["languages"].items():
        for series, find in sources.items():
            found = find(name, own)
            if found is not None and not missing(found["value"]):
                kept = {key: short(found[key]) for key in ("value", "lo", "hi") if not missing(found.get(key))}
                rows.append({"language": name, "series": series, **kept})
    present = [series for series in sources if any(row["series"] == series for row in rows)]
    colours = dict(zip(sources, (BOUNDARIES[key] for key in ("onset", "depth", "held", "used")), strict=True))
    chart = charts.intervals(rows, languages_of(result), present, study.manifest.model.n_blocks, colours)
    text = "With 95 % intervals over paragraphs. Read: from the states. Caused: found by patching states."
    return figure(
        f"{result.setting}-boundaries", "Boundaries by language", text, chart, rows, "language series value lo hi"
    )


def probes(study: Study, result: SettingResult) -> Section | None:
    if study.probes.empty or not (study.probes["setting"] == result.setting).any():
        return None
    frame, figures = result.probes.reset_index(), []
    for state, part in frame.groupby("state", sort=False):
        rows: list[dict[str, Any]] = []
        for column, suffix in (("score", ""), ("control", ", control")):
            own = part.assign(series=part["probe"] + suffix).rename(columns={column: "value"})
            ends = ["lo", "hi"] if column == "score" and {"lo", "hi"} <= set(part.columns) else []
            rows += [row for row in records(own, ("series", "layer", "value", *ends)) if "value" in row]
        present = list(dict.fromkeys(row["series"] for row in rows))
        caption = "Scores of held-out paragraphs, and the same probe on shuffled labels (control)."
        names = list(dict.fromkeys(part["probe"]))  # a probe and its control have one colour
        colours = {series: SERIES[names.index(series.removesuffix(", control")) % len(SERIES)] for series in present}
        chart = charts.lines(rows, present, "score", colours=colours)
        figures.append(
            figure(
                f"{result.setting}-probes-{state}",
                f"Probes on {state}",
                caption,
                chart,
                rows,
                "series layer value lo hi",
            )
        )
    return Section(f"{result.setting}-probes", "Probes", "", figures)
