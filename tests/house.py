"""The rooms of xprobe/ and what imports what: ``python -m tests.house`` prints the table, and what breaks it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "xprobe"

# room -> rooms that it may import, from the top of the house to its ground
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "study": ("stages", "results", "models", "probes", "runs", "events", "config", "arguments", "errors"),
    "forecast": ("stages", "lenses", "capture", "models", "qa", "config", "arguments", "errors"),
    "stages": ("results", "lenses", "capture", "models", "qa", "probes", "phases", "runs", "events", "timing", "config",
               "errors"),
    "results": ("phases", "runs", "config", "arguments", "errors"),
    "doctor": ("models", "qa", "runs", "cache", "config", "errors"),
    "lenses": ("capture", "config", "errors"),
    "capture": ("models", "config", "errors"),
    "models": ("cache", "config", "errors"),
    "qa": ("cache", "config", "errors"),
    "probes": ("phases", "timing", "config", "arguments", "errors"),
    "phases": ("timing", "config", "errors"),
    "runs": ("events", "timing", "config", "errors"),
    "events": (),
    "timing": (),
    "cache": (),
    "config": ("arguments", "errors"),
    "arguments": ("errors",),
    "errors": (),
}  # fmt: skip

# room -> what it holds, in one line; docs/architecture.md shows it
ABOUT = {
    "study": "`xprobe.run`: the stages in order",
    "forecast": "what a run would take: tokens, memory, time (`--dry-run`)",
    "stages": "run folder in, run folder out: states, phases, probes",
    "results": "`Study` and `SettingResult`: a finished run as data frames",
    "doctor": "what works on this machine",
    "lenses": "the logit lens over captured rows; the calls to `xprobe_kernels.lens`",
    "capture": "requests of token ids, and the engines that keep hidden rows for them",
    "models": "loading, finding blocks and head, parity check, models larger than memory",
    "qa": "questions: readers, the built-in set, templates, prompts",
    "probes": "scikit-learn probes, their controls, their training",
    "phases": "signals, retrieval onsets, S(l), alpha, bootstrap; numbers in, numbers out",
    "runs": "the run folder: manifest, shards, journal, lock",
    "events": "what a run reports while it works: `Stage`, `Step`, `Note`",
    "timing": "stopwatch",
    "cache": "where fetched data lies",
    "config": "`StudyConfig` (what) and `Execution` (how)",
    "arguments": "checks of what callers pass",
    "errors": "every error that xprobe raises",
}

WITHOUT_TORCH = ("phases", "probes", "runs", "events", "config", "arguments", "errors")  # at import time


def rooms() -> dict[str, list[Path]]:
    """Every room of the library with its files; ``xprobe/__init__.py`` is the door and no room."""
    found: dict[str, list[Path]] = {}
    for path in sorted(LIBRARY.rglob("*.py")):
        name = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


def imported_modules(path: Path, *, at_import: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports; ``at_import``: only those that importing it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _statements(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: none of functions, none of ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _statements(node)


def imports_between_rooms() -> dict[str, set[str]]:
    """Which rooms each room imports, wherever in its files."""
    table: dict[str, set[str]] = {}
    for room, paths in rooms().items():
        names = {name for path in paths for name in imported_modules(path)}
        inside = {name.split(".")[1] for name in names if name.startswith("xprobe.")}
        table[room] = {name for name in inside if name in rooms()} - {room}
    return table


def module_imports(folder: Path, package: str) -> dict[str, set[str]]:
    """Which modules of a package each of its modules imports when it is imported."""
    modules = {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in sorted(folder.rglob("*.py"))
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = set()
        for target in imported_modules(path, at_import=True):
            known = target if target in modules else target.rpartition(".")[0]
            if known in modules and known != name:
                found.add(known)
        graph[name] = found
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of a graph, each once."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            found.append(path[path.index(node) :])
            return
        if node in done:
            return
        for target in sorted(graph.get(node, ())):
            walk(target, [*path, node])
        done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return found


def faults(table: Mapping[str, set[str]], rules: Mapping[str, tuple[str, ...]] = MAY_IMPORT) -> list[str]:
    """What of the imports in ``table`` breaks ``rules``, and what is wrong with the rules themselves, in words."""
    wrong = []
    for room, targets in table.items():
        if room not in rules:
            wrong.append(f"{room} is not in the table of rooms (tests/house.py)")
            continue
        wrong += [f"{room} imports {target}" for target in sorted(targets - set(rules[room]))]
    wrong += [f"{room} is in the table, but not in xprobe/" for room in rules if room not in table]
    order = list(rules)
    wrong += [
        f"the table lets {room} import {target}, which stands above it"
        for room, targets in rules.items()
        for target in targets
        if target not in order[order.index(room) + 1 :]
    ]
    wrong += [f"circle: {' -> '.join(circle)}" for circle in circles(table)]
    return wrong


def main() -> int:
    table = imports_between_rooms()
    for room in sorted(table, key=[*MAY_IMPORT, *table].index):
        print(f"{room:<10} {len(rooms()[room]):>3} files  imports {', '.join(sorted(table[room])) or 'nothing'}")
    wrong = faults(table)
    print(f"\n{len(table)} rooms, {sum(map(len, table.values()))} arrows, {len(wrong)} faults")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
