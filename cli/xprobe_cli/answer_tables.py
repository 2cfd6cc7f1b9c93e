"""The tables of `xprobe evaluate` (F1, EM, ratios, error types) and of `xprobe oracle`, by setting and language."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xprobe_cli.tables import counted, estimate, last_lines, number

if TYPE_CHECKING:
    from xprobe.results import Study

ERRORS = ("blank", "refusal", "wrong language", "gibberish", "content")


def answer_report(study: Study) -> str:
    """The scores of every setting, and the path of the run."""
    results = study.manifest.stages["answers"].results
    parts = [_setting(study, setting, summary) for setting, summary in results["settings"].items()]
    return "\n\n".join([*parts, last_lines(study)])


def _setting(study: Study, setting: str, summary: dict[str, Any]) -> str:
    results = study.manifest.stages["answers"].results
    lines = [
        f"{study.manifest.model.name} · {setting} · {counted(summary['n'], 'answer')} · normaliser "
        f"{results['normaliser']} · correct from F1 {results['threshold']:g}",
        "",
    ]
    heads = ["language", f"{'F1':<20}", f"{'exact match':<20}", f"{'F1 / en-en':<20}", "correct", *ERRORS]
    header = "  ".join(heads)
    lines += [header, "─" * len(header)]
    for name, row in [*summary["languages"].items(), ("all", summary)]:
        shares = [row["error_types"].get(kind, 0.0) for kind in ("correct", *ERRORS)]
        widths = [len(kind) for kind in ("correct", *ERRORS)]
        cells = [
            f"{name:<8}",
            f"{estimate(row['f1'], 3):<20}",
            f"{estimate(row['exact_match'], 3):<20}",
            f"{estimate(row['f1_ratio'], 2) if 'f1_ratio' in row else '':<20}",
            *(f"{number(100 * share, 0) + ' %':>{width}}" for share, width in zip(shares, widths, strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def oracle_report(study: Study) -> str:
    """The oracle of every setting, beside the answers and the controls, and the path of the run."""
    results = study.manifest.stages["oracle"].results
    parts = [_oracle_setting(study, setting, summary) for setting, summary in results["settings"].items()]
    return "\n\n".join([*parts, ORACLE_NOTE, last_lines(study)])


ORACLE_NOTE = """\
own, gold: the evidence of the model's own answer, of the gold answer
without q.: the same without the question in the prompt; random: spans of the same length
sentence: how often the evidence lies in a sentence that holds the answer"""


def _oracle_setting(study: Study, setting: str, summary: dict[str, Any]) -> str:
    results = study.manifest.stages["oracle"].results
    title = (
        f"{study.manifest.model.name} · {setting} · {counted(summary['n'], 'answer')} · oracle definition "
        f"{results['definition']} · removal {results['removal']} · normaliser {results['normaliser']}"
    )
    heads = [
        "language", f"{'F1 of answers':<20}", f"{'oracle F1, own':<20}", "without q.", "random",
        f"{'oracle F1, gold':<20}", "without q.", "random", "sentence: own", "gold", "random",
    ]  # fmt: skip
    header = "  ".join(heads)
    lines = [title, "", header, "─" * len(header)]
    for name, row in [*summary["languages"].items(), ("all", summary)]:
        cells = [f"{name:<8}", f"{estimate(row['answer_f1'], 3):<20}"]
        for target in ("own", "gold"):
            found = row.get(target, {})
            cells += [
                f"{estimate(found['f1'], 3) if found else '–':<20}",
                f"{_value(found, 'f1_without_question'):>10}",
                f"{_value(found, 'random_f1'):>6}",
            ]
        sentence = [_value(row.get(target, {}), "sentence_hit") for target in ("own", "gold")]
        cells += [f"{sentence[0]:>13}", f"{sentence[1]:>4}", f"{_value(row, 'random_sentence'):>6}"]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _value(figures: dict[str, Any], name: str) -> str:
    return number(figures[name]["value"], 2) if name in figures else "–"
