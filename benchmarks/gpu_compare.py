"""Compares new figures of gpu.py with stored ones: ratios of the kernels and of whole runs.

A ratio compares two measurements of the same run, so it depends less on the machine's state than a time does. A fall is
a ratio of the project's own code that is more than 5 % below the stored one. Ratios of other code (torch, rivals)
and rates are only printed. Reads bench*.json and run*.json, also those of older code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ALLOWED = 0.05  # a ratio may be lower by this part because of noise
MACHINE = ("device", "driver", "cuda", "hip", "torch", "triton", "python")
# ratios by part of bench.json, most important first: key in the file, text
RATIOS = {
    "lens": {"share_of_product": "of product", "times_naive": "x naive"},
    "rivals": {"share_of_product": "of product", "times_torch": "x torch"},
    "capture": {"times_whole": "x whole", "times_plain": "x indexing"},
}
BASIS = (
    "rows",
    "width",
    "vocabulary",
    "softcap",
    "dtype",
    "kl",
    "batch",
    "length",
    "spans",
)  # must be equal in both folders
RUN_BASIS = ("dtype", "parameters_in_blocks", "answer_positions")


@dataclass(frozen=True)
class Figure:
    """The ratios and rates of one variant of one measurement."""

    ours: bool  # the project's own code: a fall counts
    ratios: dict[str, float | None]  # None: it could not be computed
    rates: dict[str, float] = field(default_factory=dict)
    problem: str | None = None  # why nothing was measured
    basis: dict[str, Any] = field(default_factory=dict)  # what was measured
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class Comparison:
    """``lines`` to print, ``falls`` of the project's own ratios, and how the machines differ."""

    compared: int = 0  # ratios of the project's own code that both folders have
    lines: list[str] = field(default_factory=list)
    falls: list[str] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)


def has_figures(folder: Path) -> bool:
    """Whether a folder holds a file that can be compared."""
    return any(_files(folder))


def figures(folder: Path) -> dict[str, Figure]:
    """All figures of a folder by name. If two have the same name, the later measurement counts.

    Raises
    ------
    ValueError
        Names the file that is not a result of gpu.py, bench or whole_run.py.
    """
    dated: list[tuple[str, dict[str, Figure]]] = []
    for path in _files(folder):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if path.name.startswith("bench"):
                dated.append((content["environment"]["date"], dict(_bench(content))))
            else:
                for run in content.get("runs", [content]):
                    dated.append((run["environment"]["date"], dict(_run(run))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read as results: {type(error).__name__}: {error}") from error
    found: dict[str, Figure] = {}
    for _, some in sorted(dated, key=lambda pair: pair[0]):
        found |= some
    return found


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("bench*.json"), *folder.glob("run*.json")])


def _bench(content: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    for kernel, ratios in RATIOS.items():
        for part in content.get(kernel, []):
            basis = {name: part[name] for name in BASIS if name in part}
            machine = _machine(content["environment"])
            for entry in part["variants"]:
                ours = entry["name"] == "capture" if kernel == "capture" else entry["kind"] == "backend"
                problem = None if entry["status"] == "ok" else f"{entry['status']}: {entry['message']}"
                values = {text: entry.get(key) for key, text in ratios.items()}
                task = f"{kernel} " if kernel == "rivals" else ""
                yield f"{task}{part['name']}: {entry['name']}", Figure(ours, values, {}, problem, basis, machine)


def _run(run: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    # the model may be given as a file: only its name counts
    name, machine = f"run {Path(run.get('name', run['model'])).stem}", _machine(run["environment"])
    basis = {key: run[key] for key in RUN_BASIS}
    for rate in run["rates"]:
        strategy = rate["strategy"] if "strategy" in rate else rate["way"]  # way: files of older code
        label = f"{name}: {rate['batch_tokens']} tokens per pass"
        yield label, Figure(
            True, {"of ceiling": rate.get("share_of_ceiling")}, {"examples/s": rate["examples_per_second"]},
            None, basis | {"strategy": strategy}, machine,
        )  # fmt: skip
    if against := run.get("against"):
        ratios = {f"x {other}": ratio for other, ratio in against["ratio"].items()}
        label = f"{name}: {against['batch_tokens']} tokens per pass, against other lenses"
        yield label, Figure(True, ratios, {}, None, basis, machine)


def _machine(environment: dict[str, Any]) -> dict[str, Any]:
    return {name: environment.get(name) for name in MACHINE}


def compare(stored: dict[str, Figure], new: dict[str, Figure]) -> Comparison:
    """Compares the figures that both have.

    Figures that were measured on another basis, or in one folder only, are listed and not compared.

    Examples
    --------
    >>> old, fresh = Figure(True, {"of product": 0.90}), Figure(True, {"of product": 0.80})
    >>> compare({"lens triton": old}, {"lens triton": fresh}).falls
    ['lens triton: of product 0.900 -> 0.800 (-11.1 %)']
    """
    found = Comparison()
    for name, before in stored.items():
        after = new.get(name)
        if after is None:
            line = f"{name}: not measured now"
            found.lines.append(f"  {line}")
            if before.ours and _was_measured(name, new):  # others of the same measurement are there
                found.compared += 1
                found.falls.append(line)
            continue
        for key in MACHINE:
            old, fresh = before.machine.get(key), after.machine.get(key)
            note = f"{key}: {old} stored, {fresh} now"
            if old != fresh and note not in found.machines:
                found.machines.append(note)
        other = [key for key in before.basis if before.basis[key] != after.basis.get(key, before.basis[key])]
        if other:
            changes = ", ".join(f"{key} {before.basis[key]} -> {after.basis[key]}" for key in other)
            found.lines.append(f"  {name}: not compared, measured differently: {changes}")
        elif before.problem:
            found.lines.append(f"  {name}: has no stored figure ({before.problem})")
        elif after.problem:
            line = f"{name}: {after.problem}"
            found.lines.append(f"  {line}")
            if before.ours:
                found.compared += 1
                found.falls.append(line)
        else:
            _compare_values(name, before, after, found)
    found.lines += [f"  {name}: new, nothing stored" for name in new if name not in stored]
    return found


def _was_measured(name: str, new: dict[str, Figure]) -> bool:
    """Whether a measurement of kernels that has no figure ``name`` has other ones."""
    measurement = name.rpartition(": ")[0]
    return not name.startswith("run ") and any(other.rpartition(": ")[0] == measurement for other in new)


def _compare_values(name: str, before: Figure, after: Figure, found: Comparison) -> None:
    texts = []
    for label, old in (before.ratios | before.rates).items():
        fresh = (after.ratios | after.rates).get(label)
        if not old or fresh is None:
            continue
        text = f"{label} {_digits(old)} -> {_digits(fresh)} ({fresh / old - 1:+.1%})".replace("%", " %")
        texts.append(text)
        if not before.ours or label not in before.ratios:
            continue
        found.compared += 1
        if not fresh >= old * (1 - ALLOWED):  # also for NaN
            found.falls.append(f"{name}: {text}")
    if texts:
        found.lines.append(f"  {name}: {', '.join(texts)}")


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def show(stored: Path, new: Path, *, strict: bool = False) -> bool:
    """Prints the comparison of two folders. Returns False if a ratio fell, or if there was none to compare.

    On another device or with other versions a fall does not count unless ``strict``.
    """
    try:
        found = compare(figures(stored), figures(new))
    except ValueError as error:
        print(f"--compare: {error}")
        return False
    print("\n".join([f"stored ({stored}) -> new ({new})", *found.lines]))
    for difference in found.machines:
        print(f"DIFFERENT MACHINE: {difference}")
    for fall in found.falls:
        print(f"FELL: {fall}")
    counts = not found.machines or strict
    if found.falls and not counts:
        print("the falls do not count on a different machine without --strict")
    elif not found.compared:
        print("no ratio of the project's own code is in both folders")
    elif not found.falls:
        print(f"none of {found.compared} ratios of the project's own code fell by more than {ALLOWED * 100:.0f} %")
    return bool(found.compared) and not (found.falls and counts)
