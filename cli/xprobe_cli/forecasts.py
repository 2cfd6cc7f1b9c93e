"""What ``xprobe run --dry-run`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xprobe_cli.tables import counted

if TYPE_CHECKING:
    from xprobe.forecast import Forecast, GroupForecast

SHOWN = 8  # groups listed before the rest are summed up


def forecast_report(forecast: Forecast) -> str:
    """Groups, strategy and tokens of a run, and its expected memory, disk and time."""
    from xprobe.capture.plan import STRATEGIES

    saved = 1 - forecast.tokens_run / forecast.tokens
    lines = [
        f"{forecast.model} · {forecast.parameters / 1e6:,.0f} M parameters, {forecast.n_blocks} blocks, "
        f"width {forecast.width}, vocabulary {forecast.vocab_size} · {forecast.dtype} on {forecast.device}",
        "",
        *_groups(forecast.groups),
        "",
        f"strategy  {STRATEGIES[forecast.strategy]} (checked with the weights when the run starts)",
        f"tokens    {forecast.tokens:,} in {counted(forecast.examples, 'example')}; {forecast.tokens_run:,} are run, "
        f"{saved:.0%} saved, in {forecast.passes:,} forward {'pass' if forecast.passes == 1 else 'passes'}",
        *([f"skipped   {counted(forecast.skipped, 'example')} that cannot be used"] if forecast.skipped else []),
        f"memory    about {_bytes(sum(forecast.memory.values()))}: {_parts(forecast.memory)}",
        f"disk      about {_bytes(sum(forecast.disk.values()))}: {_parts(forecast.disk)}",
        f"time      about {_time(forecast.seconds)}, loading and tables apart"
        + (" (block by block: each block is read once)" if forecast.stream else ""),
        *(f"note      {note}" for note in forecast.notes),
    ]
    return "\n".join(lines)


def _groups(groups: tuple[GroupForecast, ...]) -> list[str]:
    width = max(len("group"), *(len(group.key) for group in groups[:SHOWN]))
    lines = [f"{'group':<{width}}  {'examples':>8}  {'tokens':>9}  {'run':>9}  {'saved':>5}"]
    lines.append("─" * len(lines[0]))
    for group in groups[:SHOWN]:
        lines.append(
            f"{group.key:<{width}}  {group.examples:>8,}  {group.tokens:>9,}  {group.tokens_run:>9,}  "
            f"{1 - group.tokens_run / group.tokens:>5.0%}"
        )
    rest = groups[SHOWN:]
    if rest:
        tokens, run = sum(g.tokens for g in rest), sum(g.tokens_run for g in rest)
        name = f"and {len(rest)} more"
        lines.append(
            f"{name:<{width}}  {sum(g.examples for g in rest):>8,}  {tokens:>9,}  {run:>9,}  {1 - run / tokens:>5.0%}"
        )
    return lines


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items() if size)


def _bytes(size: int) -> str:
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _time(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
