"""The tables of `xprobe lenses`: phases, scripts and latent language, lens by lens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from xprobe_cli.tables import counted, estimate, last_lines, number

if TYPE_CHECKING:
    from xprobe.results import Study

LANGUAGES = 14  # most columns of the table by language


def lenses_report(study: Study) -> str:
    """The lenses side by side in every setting, how far the run's own numbers were met, and the path of the run."""
    results = study.manifest.stages["lenses"].results
    parts = [_setting(study, setting, by_lens) for setting, by_lens in results["settings"].items()]
    difference = results["difference_from_run"]
    same = (
        f"check     the run's lens, read again: readiness differs by at most {difference['readiness']:g}, "
        f"log-probability by {difference['log_probability']:g} nats"
    )
    return "\n\n".join([*parts, f"{same}\n{last_lines(study)}"])


def labels(lenses: Sequence[str]) -> dict[str, str]:
    """A short label for each lens: its kind and the name of its file; the whole name where two would be the same.

    Examples
    --------
    >>> labels(["logit", "jacobian:/data/lenses/j.pt"])
    {'logit': 'logit', 'jacobian:/data/lenses/j.pt': 'jacobian:j.pt'}
    >>> labels(["tuned:a/lens", "tuned:b/lens"])["tuned:a/lens"]
    'tuned:a/lens'
    """
    short = {}
    for name in lenses:
        kind, _, place = name.partition(":")
        short[name] = f"{kind}:{PurePath(place.partition('@')[0]).name}" if place else kind
    shared = {label for label in short.values() if list(short.values()).count(label) > 1}
    return {name: name if label in shared else label for name, label in short.items()}


def _setting(study: Study, setting: str, by_lens: dict[str, Any]) -> str:
    results = study.manifest.stages["lenses"].results
    names = labels(list(by_lens))
    names[results["own"]] += " (run)"
    width = max(len("lens"), *(len(label) for label in names.values()))
    examples = counted(next(iter(by_lens.values()))["n"], "example")
    under = "one lens" if len(by_lens) == 1 else f"{len(by_lens)} lenses"
    title = f"{study.manifest.model.name} · {setting} · {examples} · phases under {under}"
    parts = [
        _phases(by_lens, names, width, results),
        _depths(by_lens, names, width),
        _by_language(by_lens, names, width),
    ]
    return "\n\n".join([title, *("\n".join(lines) for lines in parts if lines)])


def _phases(by_lens: dict[str, Any], names: dict[str, str], width: int, results: dict[str, Any]) -> list[str]:
    titles = (f"{'boundary':<17}", f"{'alpha':<20}", "phased", f"{'mean onset':<17}", "shift against the run")
    header = "  ".join([f"{'lens':<{width}}", *titles])
    lines = [header, "─" * len(header)]
    for lens, entry in by_lens.items():
        phased = f"{100 * entry['phased_fraction']['value']:.0f}%"
        cells = [f"{_known(entry['boundary'], 1):<17}", f"{_known(entry['alpha'], 2):<20}", f"{phased:>6}"]
        cells.append(f"{_known(entry['onset_mean'], 1):<17}")
        cells.append("–" if lens == results["own"] else _known(entry["onset_shift"], 1))
        lines.append("  ".join([f"{names[lens]:<{width}}", *cells]).rstrip())
    return lines


def _depths(by_lens: dict[str, Any], names: dict[str, str], width: int) -> list[str]:
    """Readiness, the most frequent script and the latent language at a quarter, a half and three quarters of depth."""
    first = next(iter(by_lens.values()))["depths"]
    latent = any(one["latent_share"] is not None for entry in by_lens.values() for one in entry["depths"].values())
    about = "readiness; script of the top token after the prompt" + ("; share of the own language" if latent else "")
    column = 28 if latent else 23
    layers = (f"{'layer ' + str(one['layer']) + f' ({depth}%)':<{column}}" for depth, one in first.items())
    header = "  ".join([f"{'lens':<{width}}", *layers, "last"])
    lines = [about, header, "─" * len(header)]
    for lens, entry in by_lens.items():
        cells = []
        for one in entry["depths"].values():
            script = "–" if one["script"] is None else f"{one['script']} {100 * one['script_share']:.0f}%"
            share = f"  {number(one['latent_share'], 2)}" if latent else ""
            text = f"{number(one['readiness'], 2)}  {script:<16}" + share
            cells.append(f"{text:<{column}}")
        lines.append("  ".join([f"{names[lens]:<{width}}", *cells, number(entry["readiness_last"], 2)]).rstrip())
    return lines


def _by_language(by_lens: dict[str, Any], names: dict[str, str], width: int) -> list[str]:
    languages = list(next(iter(by_lens.values()))["languages"])
    if not 1 < len(languages) <= LANGUAGES:
        return []
    lines = ["boundary by language", "  ".join([f"{'lens':<{width}}", *(f"{name:>5}" for name in languages)])]
    lines.append("─" * len(lines[-1]))
    for lens, entry in by_lens.items():
        cells = (f"{number(one['boundary']['value'], 1):>5}" for one in entry["languages"].values())
        lines.append("  ".join([f"{names[lens]:<{width}}", *cells]))
    return lines


def _known(value: dict[str, float | None], digits: int) -> str:
    return "–" if value["value"] is None else estimate(value, digits)
