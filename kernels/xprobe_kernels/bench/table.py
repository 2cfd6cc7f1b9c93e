"""Prints the figures as text: ratios first, then times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MIB = 1 << 20


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _compact(value: float) -> str:
    """Three digits at any size."""
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:#.3g}"


def _scaled(factor: float) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else _compact(value * factor)


# heading, and the text of an entry's cell
LENS_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("x naive", lambda entry: _number(entry["times_naive"])),
    ("of product", lambda entry: _number(entry["share_of_product"])),
    ("x floor", lambda entry: _number(entry["times_floor"])),
    ("TFLOP/s", lambda entry: _scaled(1e-12)(entry["operations_per_second"])),
    ("GB/s", lambda entry: _scaled(1e-9)(entry["bytes_per_second"])),
    ("ms", lambda entry: _scaled(1e3)(entry["seconds"])),
    ("spread", lambda entry: _number(entry["spread"], ".0%")),
    ("MiB more", lambda entry: _scaled(1 / MIB)(entry["extra_bytes"])),
    ("error", lambda entry: _number((entry["errors"] or {}).get("log_probability"), ".1e")),
    ("ranks", lambda entry: _number((entry["errors"] or {}).get("rank_agreement"), ".0%")),
]
RIVALS_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("x torch", lambda entry: _number(entry["times_torch"])),
    *LENS_COLUMNS[1:-1],  # all but the ranks
]
CAPTURE_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("x whole", lambda entry: _number(entry["times_whole"])),
    ("x indexing", lambda entry: _number(entry["times_plain"])),
    ("GB/s", lambda entry: _scaled(1e-9)(entry["bytes_per_second"])),
    ("us", lambda entry: _scaled(1e6)(entry["seconds"])),
    ("spread", lambda entry: _number(entry["spread"], ".0%")),
    ("MiB more", lambda entry: _scaled(1 / MIB)(entry["extra_bytes"])),
]
LENS_LEGEND = (
    "x naive: times as fast as the naive fp32 lens. of product: share of the bare matrix product's throughput.\n"
    "x floor: time over the larger of two floors, 2RVD operations and (V + R)D numbers read at the measured ceilings.\n"
    "spread: interquartile range over median. MiB more: peak during a call beyond its inputs, outputs included.\n"
    "error: largest error of a log-probability (nats), ranks: share that agree, both against fp64 on sampled rows."
)
RIVALS_LEGEND = (
    "The task: log-sum-exp and the target's logit of each row, already normed, without gradients. The lens also\n"
    "counts ranks and entropies. x torch: times as fast as torch's linear and cross_entropy. error: of the target's\n"
    "log-probability (nats). The other columns are those of the lens."
)
CAPTURE_LEGEND = (
    "x whole: times as fast as keeping the whole block output in fp32. x indexing: times as fast as plain indexing."
)


def head_text(environment: dict[str, Any]) -> str:
    """The machine in two lines."""
    names = ("driver", "cuda", "hip", "torch", "triton", "python")
    versions = [f"{name} {environment[name]}" for name in names if environment[name]]
    load = "" if environment["load"] is None else f" (load {environment['load']:.1f} before)"
    threads = f"{environment['threads']} threads on {environment['cores']} cores{load}"
    commit = (
        f", commit {environment['commit'][:10]}{' with changes' if environment['commit_changed'] else ''}"
        if environment["commit"]
        else ""
    )
    return f"{environment['device']}, {threads}, {environment['date']}{commit}\n{', '.join(versions)}"


def lens_text(part: dict[str, Any]) -> str:
    return _shape_text(part, ", with KL" if part["kl"] else "", LENS_COLUMNS)


def rivals_text(part: dict[str, Any]) -> str:
    return _shape_text(part, ", target's log-probability", RIVALS_COLUMNS)


def _shape_text(part: dict[str, Any], task: str, columns: list[tuple[str, Callable[[dict[str, Any]], str]]]) -> str:
    lines = [f"{part['text']}, {part['dtype']}{task}"]
    if part["message"]:
        return "\n".join([*lines, f"  NOT MEASURED: {part['message']}"])
    if part["ceilings"]:
        speed, arithmetic = part["ceilings"]["bytes_per_second"], part["ceilings"]["operations_per_second"]
        lines.append(f"  ceilings measured: {_compact(arithmetic / 1e12)} TFLOP/s, {_compact(speed / 1e9)} GB/s")
    return "\n".join([*lines, *_rows(part["variants"], columns)])


def capture_text(part: dict[str, Any]) -> str:
    return "\n".join([f"{part['text']}, {part['dtype']}", *_rows(part["variants"], CAPTURE_COLUMNS)])


def _rows(entries: list[dict[str, Any]], columns: list[tuple[str, Callable[[dict[str, Any]], str]]]) -> list[str]:
    cells = [[heading for heading, _ in columns]]
    for entry in entries:
        if entry["status"] == "ok":
            cells.append([read(entry) for _, read in columns])
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    formatted = ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines, measured = [formatted[0]], iter(formatted[1:])
    for entry in entries:
        if entry["status"] == "ok":
            chunk = f" ({entry['rows_at_once']} rows at once)" if entry.get("rows_at_once") else ""
            version = f" {entry['version']}" if entry.get("version") else ""
            lines.append(f"{next(measured)}  {entry['name']}{version}{chunk}")
        else:
            lines.append(f"  {entry['status'].upper()}: {entry['name']}: {entry['message']}")
    return lines
