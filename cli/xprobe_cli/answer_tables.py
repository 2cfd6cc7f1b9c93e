"""The table of `xprobe evaluate`: F1, EM, ratios and error types by setting and language."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xprobe_cli.tables import counted, estimate, number

if TYPE_CHECKING:
    from xprobe.results import Study

ERRORS = ("blank", "refusal", "wrong language", "gibberish", "content")


def answer_report(study: Study) -> str:
    """The scores of every setting, and the path of the run."""
    results = study.manifest.stages["answers"].results
    parts = [_setting(study, setting, summary) for setting, summary in results["settings"].items()]
    return "\n\n".join([*parts, f"files     {study.path}"])


def _setting(study: Study, setting: str, summary: dict[str, Any]) -> str:
    results = study.manifest.stages["answers"].results
    lines = [
        f"{study.manifest.model.name} · {setting} · {counted(summary['n'], 'answer')} · normaliser "
        f"{results['normaliser']} · correct from F1 {results['threshold']:g}",
        "",
    ]
    heads = ["language", f"{'F1':<20}", f"{'exact match':<20}", f"{'F1 of en-en':<20}", "correct", *ERRORS]
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


def plain_answers(study: Study) -> dict[str, Any]:
    """What `xprobe evaluate --json` prints."""
    entry = study.manifest.stages["answers"]
    return {
        "run_dir": str(study.path),
        "model": study.manifest.model.name,
        **entry.results,
        "seconds": entry.seconds,
        "warnings": entry.warnings,
    }
