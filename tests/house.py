"""The rooms of xprobe/ and what imports what: ``python -m tests.house`` prints the table, and what breaks it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "xprobe"

# room -> rooms that it may import, from the top of the house to its ground
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "study": ("stages", "results", "models", "probes", "runs", "events", "config", "errors"),
    "forecast": ("stages", "capture", "models", "lenses", "qa", "config", "errors"),
    "stages": ("capture", "lenses", "models", "qa", "probes", "phases", "results", "runs", "events", "timing", "config",
               "errors"),
    "results": ("phases", "runs", "config", "errors"),
    "doctor": ("models", "qa", "runs", "cache", "config", "errors"),
    "capture": ("models", "config", "errors"),
    "lenses": ("memory", "config", "errors"),
    "models": ("cache", "memory", "config", "errors"),
    "qa": ("cache", "config", "errors"),
    "probes": ("phases", "config", "errors", "timing"),
    "phases": ("config", "errors", "timing"),
    "runs": ("events", "config", "errors", "timing"),
    "events": (),
    "timing": (),
    "memory": (),
    "cache": (),
    "config": ("errors",),
    "errors": (),
}  # fmt: skip

WITHOUT_TORCH = ("phases", "probes", "runs", "events", "config", "errors")  # at import time


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


def faults() -> list[str]:
    """What breaks the rules above, in words."""
    table, wrong = imports_between_rooms(), []
    for room, targets in table.items():
        if room not in MAY_IMPORT:
            wrong.append(f"{room} is not in the table of rooms (tests/house.py)")
            continue
        wrong += [f"{room} imports {target}" for target in sorted(targets - set(MAY_IMPORT[room]))]
    wrong += [f"{room} is in the table, but not in xprobe/" for room in MAY_IMPORT if room not in table]
    order = list(MAY_IMPORT)
    wrong += [
        f"the table lets {room} import {target}, which stands above it"
        for room, targets in MAY_IMPORT.items()
        for target in targets
        if target not in order[order.index(room) + 1 :]
    ]
    wrong += [f"circle: {' -> '.join(circle)}" for circle in circles(table)]
    return wrong


def main() -> int:
    table = imports_between_rooms()
    for room in sorted(table, key=[*MAY_IMPORT, *table].index):
        print(f"{room:<10} {len(rooms()[room]):>3} files  imports {', '.join(sorted(table[room])) or 'nothing'}")
    wrong = faults()
    print(f"\n{len(table)} rooms, {sum(map(len, table.values()))} arrows, {len(wrong)} faults")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
