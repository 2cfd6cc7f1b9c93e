"""What ``xprobe sweep`` prints at its end, its forecast, and the claims that ``xprobe compare`` adds for a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xprobe_cli.compare import comparison_report, interval, wrapped_table
from xprobe_cli.progress import duration
from xprobe_cli.tables import counted

if TYPE_CHECKING:
    from xprobe.sweeps.comparing import SweepComparison
    from xprobe.sweeps.folder import SweepFolder
    from xprobe.sweeps.forecasts import Outlook
    from xprobe.sweeps.run import Sweep


def sweep_report(sweep: Sweep) -> str:
    """State of every model, the comparison, the claims, and where the files are."""
    from xprobe.sweeps.folder import PAGE

    rows = [
        [status.name, status.state, duration(status.seconds) if status.seconds else "-",
         str(status.starts) if status.starts > 1 else ""]
        for status in sweep.statuses
    ]  # fmt: skip
    lines = wrapped_table(["model", "state", "time", "starts"], rows)
    lines += ["", *(f"note: {status.name} {note}" for status in sweep.statuses for note in status.notes)]
    lines += [
        f"error: {status.name}, {stage}: {words}" for status in sweep.statuses for stage, words in status.errors.items()
    ]
    parts = ["\n".join(lines).rstrip(), sweep_comparison_report(sweep.compared)]
    page = [f"page      {sweep.path / PAGE}"] if sweep.comparison is not None else []
    files = [f"files     {sweep.path}", *page, f"next      xprobe compare {sweep.path}"]
    return "\n\n".join([*parts, "\n".join(files)])


def sweep_comparison_report(compared: SweepComparison) -> str:
    """The comparison of a sweep with the claims, and what is left out of it."""
    if compared.comparison is not None:
        return f"{comparison_report(compared.comparison)}\n\n{claims_report(compared.comparison.claims)}"
    why = "".join(f"\nnote: {name} is left out: {why}" for name, why in compared.left_out.items())
    return f"no comparison: it needs at least two finished runs on the same questions{why}"


def claims_report(claims: Any) -> str:
    """The paper's claims with their statistics and verdicts."""
    lines = ["claims of the paper about many models (docs/sweeps.md)"]
    for (setting, claim, text), rows in claims.groupby(["setting", "claim", "text"], sort=False):
        lines += ["", f"{setting}, claim {claim}: {text}"]
        for row in rows.to_dict("records"):
            lines.append(f"  {row['statistic']}: {interval(row, 'value', ('lo', 'hi'))}, n = {row['models']}")
            lines.append(f"    {row['verdict']}: {row['reason']}")
    return "\n".join(lines)


def forecast_report(folder: SweepFolder, outlook: Outlook) -> str:
    """Memory, disk and time of each model, and their sums."""
    from xprobe.sweeps.forecasts import size

    rows = []
    for model in folder.plan.models:
        found = outlook.forecasts.get(model.name)
        if found is None:
            rows.append([model.name, *["-"] * 6, "fails" if model.name in outlook.failed else "unknown"])
            continue
        rows.append([
            model.name, f"{found.parameters / 1e6:,.1f} M", size(found.memory),
            size(found.gpu_memory) if found.gpu_memory else "-", size(found.disk),
            "-" if found.total_seconds is None else duration(found.total_seconds), f"{found.tokens:,}",
            "refused" if model.name in outlook.refused else "block by block" if found.stream else "fits",
        ])  # fmt: skip
    heads = ["model", "parameters", "memory", "GPU memory", "disk", "time", "tokens", ""]
    every = list(outlook.forecasts.values())
    seconds = [one.total_seconds for one in every if one.total_seconds is not None]
    total = f"together  {size(sum(one.disk for one in every))} on the disk"
    total += f", {duration(sum(seconds))} one after the other" if seconds else ""
    kinds: list[Mapping[str, str]] = [outlook.streamed, outlook.refused, outlook.failed, outlook.unknown]
    words = [f"note      {name}: {text}" for kind in kinds for name, text in kind.items()]
    by_stage = {"states": [one.seconds for one in every if one.seconds is not None]}
    by_stage |= {
        stage: [one.stage_seconds[stage] for one in every if stage in one.stage_seconds] for stage in folder.plan.stages
    }
    parts = [f"{stage} {duration(sum(times))}" for stage, times in by_stage.items() if times]
    unknown = [stage for stage, times in by_stage.items() if len(times) < len(by_stage["states"])]
    about = [f"          {', '.join(parts)}; at the speed of this machine, without loading and tables"] if parts else []
    about += [f"          not known for every model: {', '.join(unknown)}"] if unknown else []
    return "\n".join([counted(len(rows), "model"), "", *wrapped_table(heads, rows), "", total, *about, *words])
