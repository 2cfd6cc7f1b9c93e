"""The tables of `xprobe patch`: effects by layer, boundaries by language and pair of languages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xprobe_cli.tables import bar, estimate, last_lines, number

if TYPE_CHECKING:
    from xprobe.results import Study

CONTROLS = {"same_question": "same question", "other_paragraph": "other paragraph", "random": "random"}


def patching_report(study: Study) -> str:
    """Effects and boundaries of every setting, and the path of the run."""
    results = study.manifest.stages["patching"].results
    parts = [_setting(study, setting, summary) for setting, summary in results["settings"].items()]
    return "\n\n".join([*parts, last_lines(study)])


def _setting(study: Study, setting: str, summary: dict[str, Any]) -> str:
    title = f"{study.manifest.model.name} · {setting} · the answer moved by states of another question: effect by layer"
    lines = [title, "", *_layers(study, setting), "", *_boundaries(study, setting, summary)]
    if "cross" in summary:
        lines += ["", *_language_pairs(summary["cross"])]
    return "\n".join(lines)


def _layers(study: Study, setting: str) -> list[str]:
    curves = study.table("patching_by_layer.parquet")
    own = curves[(curves["setting"] == setting) & (curves["measure"] == "effect") & (curves["language"] == "all")]
    values = own.set_index(["pairs", "kind", "layer"])["value"]
    columns = [("same", "answer", "answer"), ("same", "question", "question")]
    known = set(zip(own["pairs"], own["kind"], strict=True))
    columns += [("cross", kind, f"{kind} (cross)") for kind in ("answer", "question")]
    columns += [("same", kind, title) for kind, title in CONTROLS.items()]
    columns = [column for column in columns if column[:2] in known]
    widths = [max(len(title), 15 if i < 2 else 7) for i, (*_, title) in enumerate(columns)]
    header = "  ".join(["layer", *(f"{title:<{width}}" for (*_, title), width in zip(columns, widths, strict=True))])
    lines = [header, "─" * len(header)]
    for layer in sorted(set(own["layer"])):
        cells = []
        for i, ((pairs, kind, _), width) in enumerate(zip(columns, widths, strict=True)):
            value = values[pairs, kind, layer]
            text = f"{number(value, 2):>6} {bar(value)}" if i < 2 else f"{number(value, 2):>6}"
            cells.append(f"{text:<{width}}")
        lines.append("  ".join([f"{layer:>5}", *cells]).rstrip())
    return lines


def _boundaries(study: Study, setting: str, summary: dict[str, Any]) -> list[str]:
    read = study[setting].summary
    header = "  ".join(
        ["language", f"{'told apart':<10}", f"{'contrast (nats)':<19}", f"{'question used up to':<19}",
         f"{'answer held from':<16}", "retrieval onset (read)"]
    )  # fmt: skip
    lines = [header, "─" * len(header)]
    for pairs, entry in summary.items():
        rows = [*entry["languages"].items(), ("all", entry)]
        for name, row in rows if pairs == "same" else rows[-1:]:
            onset = read["languages"].get(name, read)["boundary"] if name != "all" else read["boundary"]
            lines.append(
                "  ".join(
                    [
                        f"{name if pairs == 'same' else 'cross':<8}", f"{row['n']:>3} of {row['pairs']:<3}",
                        f"{estimate(row['contrast'], 1):<19}", f"{_boundary(row.get('question_boundary')):<19}",
                        f"{_boundary(row['answer_boundary']):<16}", _boundary(onset),
                    ]
                ).rstrip()
            )  # fmt: skip
    return lines


def _boundary(value: dict[str, float | None] | None) -> str:
    return "–" if value is None or value["value"] is None else estimate(value, 0)


def _language_pairs(cross: dict[str, Any]) -> list[str]:
    """A row for each language of the question that is run, a column for each language of the other question."""
    known = cross.get("language_pairs", {})
    names = list(dict.fromkeys(name for pair in known for name in pair.split(">")))
    lines = ["answer held from, by language (rows) and language of the other question (columns)"]
    lines.append("  ".join([f"{'':<8}", *(f"{name:>5}" for name in names)]))
    if all(one["answer_boundary"]["value"] is None for one in known.values()):
        return ["no boundary for any pair of languages: too few pairs that the model tells apart"]
    for language in names:
        cells = (known.get(f"{language}>{other}", {}).get("answer_boundary", {}).get("value") for other in names)
        lines.append("  ".join([f"{language:<8}", *(f"{number(value, 0):>5}" for value in cells)]))
    return lines
