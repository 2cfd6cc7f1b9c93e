"""The rooms of xprobe/ and their imports: ``python -m tests.house`` prints the table and its faults."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "xprobe"

# room -> rooms that it may import, from top to bottom
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "sweeps": ("study", "evaluation", "forecast", "comparison", "results", "lenses", "attribution", "capture",
               "scoring", "phases", "runs", "events", "config", "arguments", "errors"),
    "study": ("stages", "lenses", "results", "models", "probes", "runs", "events", "config", "arguments", "errors"),
    "evaluation": ("stages", "results", "lenses", "attribution", "models", "scoring", "phases", "runs", "events",
                   "config", "arguments", "errors"),
    "single_prompt": ("report", "lenses", "capture", "models", "config", "arguments", "errors"),
    "forecast": ("stages", "lenses", "capture", "models", "qa", "config", "arguments", "errors"),
    "stages": ("results", "lenses", "attribution", "capture", "models", "qa", "probes", "scoring", "phases", "runs",
               "events", "timing", "config", "arguments", "errors"),
    "report": ("comparison", "results", "phases", "events", "arguments", "errors"),
    "comparison": ("results", "phases", "arguments", "errors"),
    "results": ("phases", "runs", "config", "arguments", "errors"),
    "doctor": ("models", "qa", "runs", "cache", "config", "errors"),
    "lenses": ("capture", "models", "qa", "events", "config", "arguments", "errors"),
    "attribution": ("capture", "models", "config", "arguments", "errors"),
    "capture": ("models", "config", "arguments", "errors"),
    "models": ("cache", "config", "errors"),
    "qa": ("cache", "config", "errors"),
    "probes": ("phases", "timing", "config", "arguments", "errors"),
    "scoring": ("phases", "config", "arguments", "errors"),
    "phases": ("timing", "config", "arguments", "errors"),
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
    "sweeps": "many models: plan, forecast, engines (this machine, Ray, Slurm), claims over models",
    "study": "`xprobe.run`: the stages in order",
    "evaluation": "stages added to a finished run: `xprobe.evaluate`, `oracle`, `attribute`, `patch`, `read_lenses`",
    "single_prompt": "`xprobe.lens_prompt`, `xprobe.patch_prompt`: one prompt, without a run folder",
    "forecast": "what a run would take: tokens, memory, time (`--dry-run`)",
    "stages": "run folder in, run folder out: states, phases, probes, answers, oracle, relevance, patching, lenses",
    "report": "results for others: the page of a run, figures, exports, trackers; renders, computes nothing",
    "comparison": "`xprobe.compare`: several runs side by side",
    "results": "`Study` and `SettingResult`: a finished run as data frames",
    "doctor": "what works on this machine",
    "lenses": "lenses over captured rows, with the calls to `xprobe_kernels.lens`; transports, and how they are fitted",
    "attribution": "relevance: rules for the backward pass, and the runner that applies them",
    "capture": "requests of token ids, and the engines that keep or replace hidden rows for them",
    "models": "loading, finding blocks and head, parity check, models larger than memory",
    "qa": "questions: readers, the built-in set, templates, prompts",
    "probes": "scikit-learn probes, their controls, their training",
    "scoring": "normalisers, F1 and EM, error types, scripts of tokens, the search for evidence, summaries",
    "phases": "signals, retrieval onsets, S(l), alpha, patched pairs, lenses, bootstrap; numbers in, numbers out",
    "runs": "the run folder: manifest, shards, journal, lock",
    "events": "what a run reports while it works: `Begun`, `Stage`, `Step`, `Note`, `Finished`",
    "timing": "stopwatch",
    "cache": "where fetched data lies",
    "config": "`StudyConfig` (what) and `Execution` (how)",
    "arguments": "checks of what callers pass",
    "errors": "every error that xprobe raises",
}

OUTSIDE = ("xprobe_cli", "benchmarks", "tests", "support", "examples", "docs")  # the library imports none of them
WITHOUT_TORCH = (
    "report",
    "phases",
    "probes",
    "scoring",
    "runs",
    "events",
    "config",
    "arguments",
    "errors",
)  # at import time


@dataclass(frozen=True)
class Package:
    """An import package and the folder with its sources."""

    name: str
    folder: Path

    def modules(self) -> dict[str, Path]:
        """Full name of every module -> its file."""
        return {
            ".".join((self.name, *path.relative_to(self.folder).with_suffix("").parts)).removesuffix(".__init__"): path
            for path in sorted(self.folder.rglob("*.py"))
        }


XPROBE = Package("xprobe", LIBRARY)


def rooms(package: Package = XPROBE) -> dict[str, list[Path]]:
    """Every room with its files. The package's own ``__init__.py`` is no room."""
    found: dict[str, list[Path]] = {}
    for name, path in package.modules().items():
        if name != package.name:
            found.setdefault(name.split(".")[1], []).append(path)
    return found


def imported_names(path: Path, module: str, *, at_import: bool = False) -> Iterator[str]:
    """Full names of everything that a file imports, and of the attributes that it uses of imported modules.

    ``module`` is the file's own full name, which relative imports start from. ``at_import``: only what is imported when
    the file is imported.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(_statements(tree) if at_import else ast.walk(tree))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    bound: dict[str, str] = {}  # name in the file -> full name of what it stands for
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                first = alias.name.split(".")[0]  # ``import a.b`` binds a, ``import a.b as c`` binds c to a.b
                bound[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(node, package)
            for alias in node.names:
                yield f"{origin}.{alias.name}"
                bound[alias.asname or alias.name] = f"{origin}.{alias.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute) and (name := _dotted(node)):
            first, _, rest = name.partition(".")
            if first in bound:
                yield f"{bound[first]}.{rest}"


def _origin(node: ast.ImportFrom, package: str) -> str:
    """The full name of the module that a ``from ... import`` names."""
    if not node.level:
        return node.module or ""
    parents = package.split(".")
    return ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])


def _dotted(node: ast.expr) -> str | None:
    """``a.b.c`` of an attribute that starts at a name, else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value)):
        return f"{owner}.{node.attr}"
    return None


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: none of functions, none of ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from (inner for child in node.orelse for inner in (child, *_statements(child)))
            continue
        yield node
        yield from _statements(node)


def imports_between_rooms(package: Package = XPROBE) -> dict[str, set[str]]:
    """Which rooms each room imports, wherever in its files.

    A name of the package itself counts as the room that it comes from: ``xprobe.load_study`` as ``results``.
    """
    modules, names = package.modules(), {path: name for name, path in package.modules().items()}
    homes: dict[str, str] = {}
    if package.name in modules:
        for full in imported_names(modules[package.name], package.name):
            homes[full.rpartition(".")[2]] = full.removeprefix(f"{package.name}.").split(".")[0]
    known = rooms(package)
    table: dict[str, set[str]] = {}
    for room, paths in known.items():
        full_names = {full for path in paths for full in imported_names(path, names[path])}
        inside = {full.split(".")[1] for full in full_names if full.startswith(f"{package.name}.")}
        table[room] = {homes.get(name, name) if name not in known else name for name in inside} & set(known) - {room}
    return table


def forbidden_imports(package: Package = XPROBE, forbidden: Collection[str] = OUTSIDE) -> list[str]:
    """Imports of top-level packages that ``package`` must not know."""
    return [
        f"{module} imports {full}"
        for module, path in package.modules().items()
        for full in sorted(set(imported_names(path, module)))
        if full.split(".")[0] in forbidden
    ]


def module_imports(package: Package) -> dict[str, set[str]]:
    """Which modules of a package each of its modules imports when it is imported."""
    modules = package.modules()
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = {_module_of(full, modules) for full in imported_names(path, module, at_import=True)}
        graph[module] = {target for target in targets if target is not None and target != module}
    return graph


def _module_of(full: str, modules: Collection[str]) -> str | None:
    """The module that a full name lies in: the longest beginning that is one."""
    while full and full not in modules:
        full = full.rpartition(".")[0]
    return full or None


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Circles of a graph. Each ends where it begins: ``["a", "b", "a"]``."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
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
    """Imports in ``table`` that break ``rules``, and faults of the rules themselves, in words."""
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
    wrong = [*faults(table), *forbidden_imports()]
    print(f"\n{len(table)} rooms, {sum(map(len, table.values()))} arrows, {len(wrong)} faults")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
