"""Sections of the page on stages that are added to a finished run: causes, relevance, performance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xprobe.report import charts
from xprobe.report.palette import ERROR_TYPES, PATCHES, TOKENS
from xprobe.report.parts import (
    ALL,
    Cell,
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
from xprobe.report.places import shown_names

if TYPE_CHECKING:
    from xprobe.results import SettingResult, Study


CAUSES = {
    ("same", "answer"): "T: last token's state replaced",
    ("same", "question"): "Q: question's states replaced",
    ("cross", "answer"): "T, other language",
    ("cross", "question"): "Q, other language",
    ("same", "same_question"): "control: same question, other language",
    ("same", "random"): "control: random state",
}


def causes(study: Study, result: SettingResult) -> Section | None:
    found = stage_results(study, "patching", result.setting)
    if found is None:
        return None
    frame = study.table("patching_by_layer.parquet")
    frame = frame[(frame["setting"] == result.setting) & (frame["measure"] == "effect") & (frame["language"] == ALL)]
    rows: list[dict[str, Any]] = []
    for (pairs, kind), series in CAUSES.items():
        part = frame[(frame["pairs"] == pairs) & (frame["kind"] == kind)]
        rows += [{"series": series, **row} for row in records(part, ("layer", "value", "lo", "hi")) if "value" in row]
    present = [series for series in CAUSES.values() if any(row["series"] == series for row in rows)]
    same = found["same"]
    text = (
        "Two prompts differ in the question alone; states of one are put into the run of the other. The effect is 0 "
        "if nothing changes, and 1 if the answer is that of the other question. The model told "
        f"{same['n']} of {same['pairs']} pairs apart; only these count. Gain: the layer from which the log-probability "
        "of the other answer alone has risen by one half of its way."
    )
    heads = ["pairs", "pairs told apart", "answer held from", "gain", "question used up to"]
    cells = [
        [
            Cell(name, name), Cell(f"{one['n']} of {one['pairs']}", one["n"]),
            *(interval_cell(one.get(key)) for key in ("answer_boundary", "gain_boundary", "question_boundary")),
        ]
        for name, one in ((name, found[name]) for name in ("same", "cross") if name in found)
    ]  # fmt: skip
    figures = []
    if rows:
        mark = {"mark": same["answer_boundary"], "mark_name": "answer held from layer"}
        random = CAUSES["same", "random"]  # its interval would hide all other curves
        drawn = [{**row, "lo": None, "hi": None} if row["series"] == random else row for row in rows]
        colours = {series: PATCHES[key] for key, series in CAUSES.items()}
        chart = charts.lines(drawn, present, "effect", colours=colours, domain=(-0.5, 1.5), **mark)
        caption = (
            "Grey: the causal boundary, where the effect of the last token's state rises to one half. Values below "
            "-0.5 and above 1.5 are cut off here, and the random states have no interval; the numbers have both."
        )
        figures = [
            figure(f"{result.setting}-causes", "Effect of patches", caption, chart, rows, "series layer value lo hi")
        ]
    return Section(
        f"{result.setting}-causes-section", "Causes", text, figures,
        [Table("Causal boundaries", heads, cells, [False] + [True] * 4)],
    )  # fmt: skip


def relevance(study: Study, result: SettingResult) -> Section | None:
    found = stage_results(study, "relevance", result.setting)
    if found is None:
        return None
    frame = study.table("relevance_by_layer.parquet")
    frame = frame[(frame["setting"] == result.setting) & (frame["language"] == ALL)].rename(columns={"group": "series"})
    rows = [row for row in records(frame, ("series", "layer", "value", "lo", "hi")) if "value" in row]
    present = list(dict.fromkeys(row["series"] for row in rows))
    chart = charts.lines(rows, present, "share of relevance", colours=TOKENS)
    caption = "Share of the relevance of all tokens that lies on each group of tokens, layer by layer."
    heads = ["tokens", "major relevance depth (MRD)"]
    depths = [[Cell(group, group), interval_cell(value)] for group, value in found["mrd"].items()]
    depths.append([Cell("gap: answer less question", "gap"), interval_cell(found.get("gap"))])
    rule = study.manifest.stages["relevance"].results["rule"]
    return Section(
        f"{result.setting}-relevance", "Relevance", f"Relevance of {found['n']} of {result.summary['n']} examples, "
        f"by the rule {rule} (docs/attribution.md). The depth of a group of tokens (MRD) is the layer up to which 95 % "
        "of its relevance lies.",
        [figure(f"{result.setting}-shares", "Relevance by layer", caption, chart, rows, "series layer value lo hi")],
        [Table("Relevance depth", heads, depths, [False, True])],
    )  # fmt: skip


def performance(study: Study, result: SettingResult) -> Section | None:
    found = stage_results(study, "answers", result.setting)
    if found is None:
        return None
    languages, scores = languages_of(result), found["languages"]
    signals = result.signals.reset_index()
    agreement = signals[signals["signal"] == "agreement_en"].groupby("language")["value"].mean()
    points = [
        {"language": name, "agreement": short(agreement[name]), "f1": short(own["f1"]["value"])}
        for name, own in scores.items()
        if not missing(agreement.get(name)) and not missing(own["f1"]["value"])
    ]
    figures = []
    if points:
        title = "agreement with English, mean over layers"
        text = "One point for each language other than English: how far its phases are those of English, and its F1."
        chart = charts.scatter(points, "agreement", title, "f1", "F1")
        figures.append(figure(f"{result.setting}-f1", "F1 and stability", text, chart, points, "language agreement f1"))
    present = {kind for one in scores.values() for kind in one["error_types"]}
    kinds = [kind for kind in ERROR_TYPES if kind in present]
    bars = [
        {"language": name, "part": kind, "value": short(one["error_types"].get(kind, 0.0)), "order": order}
        for name, one in scores.items()
        for order, kind in enumerate(kinds)
    ]
    results = study.manifest.stages["answers"].results
    text = (
        f"Correct: an F1 of at least {results['threshold']:g} with the normaliser {results['normaliser']}. The other "
        "answers are wrong, each for one reason."
    )
    figures.append(
        figure(
            f"{result.setting}-errors", "Types of errors", text,
            charts.shares(bars, [name for name in languages if name in scores], kinds, "share of answers", ERROR_TYPES),
            bars,
            "language part value",
        )
    )  # fmt: skip
    heads = ["language", "answers", "F1", "F1 / English", "exact match"]
    rows = [
        [Cell(name, name), Cell(str(one["n"]), one["n"]),
         *(interval_cell(one.get(key)) for key in ("f1", "f1_ratio", "exact_match"))]
        for name, one in scores.items()
    ]  # fmt: skip
    return Section(
        f"{result.setting}-performance",
        "Performance",
        "",
        figures,
        [Table("Scores", heads, rows, [False] + [True] * 4)],
    )


TARGETS = {"own": "the model's own answer", "gold": "the gold answer"}


def evidence(study: Study, result: SettingResult) -> Section | None:
    found = stage_results(study, "oracle", result.setting)
    if found is None:
        return None
    columns = {
        "f1": "F1 of the evidence", "exact_match": "exact match", "sentence_hit": "right sentence",
        "random_f1": "F1 of random words", "sentence_hit_without_question": "right sentence without the question",
    }  # fmt: skip
    rows = [
        [Cell(text, text), *(interval_cell(found[target].get(key)) for key in columns)]
        for target, text in TARGETS.items()
        if target in found
    ]
    text = (
        "The evidence of an answer is the part of the context whose removal makes the answer least likely. Computed "
        f"for {found['n']} of {result.summary['n']} examples, whose own answers have an F1 of "
        f"{interval(found['answer_f1'])}; F1 of the evidence minus F1 of the answers: "
        f"{interval(found.get('oracle_minus_f1'))}. A sentence drawn at random is the right one with probability "
        f"{interval(found.get('random_sentence'))}."
    )
    table = Table("Evidence", ["evidence of", *columns.values()], rows, [False] + [True] * len(columns))
    return Section(f"{result.setting}-evidence", "Evidence (oracle)", text, (), [table])


LENS_FIGURES = {
    "boundary": "boundary", "alpha": "alpha", "onset_shift": "shift of the onset", "stability": "mean S(l)",
    "script_50": "script at half depth", "script_share_50": "its share",
}  # fmt: skip


def lenses(study: Study, result: SettingResult) -> Section | None:
    if "lenses" not in study.manifest.stages:
        return None
    frame = study.lenses
    frame = frame[(frame["setting"] == result.setting) & (frame["language"] == ALL)]
    rows, names = [], shown_names(frame["lens"])
    for row in frame.to_dict("records"):
        cells = [Cell(names[row["lens"]], names[row["lens"]])]
        for name in LENS_FIGURES:
            value = row[name]
            found = {"value": value, "lo": row.get(f"{name}_lo"), "hi": row.get(f"{name}_hi")}
            cells.append(Cell(value, value) if isinstance(value, str) else interval_cell(found))
        rows.append(cells)
    numbers = [False, True, True, True, True, False, True]
    table = Table("Phases under each lens", ["lens", *LENS_FIGURES.values()], rows, numbers)
    layers = study.table("lenses_by_layer.parquet")
    layers = layers[(layers["setting"] == result.setting) & (layers["language"] == ALL)]
    figures = []
    for signal, (title, caption) in LENS_SIGNALS.items():
        own = layers[layers["signal"] == signal].assign(series=layers["lens"].map(names))
        points = [row for row in records(own, ("series", "layer", "value", "lo", "hi")) if "value" in row]
        if points:
            chart = charts.lines(points, list(dict.fromkeys(row["series"] for row in points)), title, domain=(0, 1))
            figures.append(
                figure(f"{result.setting}-lens-{signal}", f"{title.capitalize()} by lens", caption, chart, points,
                       "series layer value lo hi")
            )  # fmt: skip
    examples = int(frame["n"].max()) if len(frame) else 0
    text = (
        f"The same states of {examples} of {result.summary['n']} examples, read by several lenses; the first is that "
        "of the run. The shift is paired by example. A script that does not fit the language is a sign that the lens "
        "itself prefers a language."
    )
    return Section(f"{result.setting}-lenses", "Lenses", text, figures, [table])


LENS_SIGNALS = {
    "readiness": ("readiness", "Mean over examples, with 95 % intervals over paragraphs."),
    "latent_share": (
        "share of the own language",
        "p(own) / (p(English) + p(own)) of the first token of the answer, where the two tokens differ.",
    ),
}
