"""Tests of the house rules: imports, what an import loads, length of files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import xprobe
from tests import house

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "xprobe_kernels": ROOT / "kernels" / "xprobe_kernels",
    "xprobe": ROOT / "xprobe",
    "xprobe_cli": ROOT / "cli" / "xprobe_cli",
}
MAY_IMPORT = {
    "xprobe_kernels": {"xprobe_kernels"},
    "xprobe": {"xprobe_kernels", "xprobe"},
    "xprobe_cli": {"xprobe_kernels", "xprobe", "xprobe_cli"},
}
OURS = {*PACKAGES, "benchmarks", "tests", "support"}
SOURCES = [(name, path) for name, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]
MOST_ROOMS = 25


def imported(package: str, path: Path) -> set[str]:
    """Top-level names of everything that a file of a package imports, at whatever depth."""
    modules = {file: module for module, file in house.Package(package, PACKAGES[package]).modules().items()}
    return {name.split(".")[0] for name in house.imported_names(path, modules[path])}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# -- rooms and circles --------------------------------------------------------------------------------------------


def test_rooms_import_only_what_the_table_allows():
    assert house.faults(house.imports_between_rooms()) == []


def test_the_library_has_few_rooms_and_each_is_described():
    assert len(house.rooms()) <= MOST_ROOMS
    assert list(house.ABOUT) == list(house.MAY_IMPORT)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_among_the_modules_of_a_package(package):
    graph = house.module_imports(house.Package(package, PACKAGES[package]))
    assert any(graph.values())
    assert house.circles(graph) == []


def test_the_table_is_printed(capsys):
    status = house.main()
    out = capsys.readouterr().out
    assert {line.split()[0] for line in out.splitlines()[: len(house.rooms())]} == set(house.rooms())
    assert f"{len(house.rooms())} rooms, " in out
    assert status == (1 if house.faults(house.imports_between_rooms()) else 0)


RULES = {"top": ("middle", "ground"), "middle": ("ground",), "ground": ()}


def test_imports_downwards_are_no_fault():
    assert house.faults({"top": {"middle", "ground"}, "middle": {"ground"}, "ground": set()}, RULES) == []


def test_an_import_upwards_is_a_fault():
    found = house.faults({"top": {"middle"}, "middle": set(), "ground": {"top"}}, RULES)
    assert found == ["ground imports top"]


def test_a_table_that_allows_an_import_upwards_is_a_fault():
    rules = {**RULES, "ground": ("top",)}
    found = house.faults({"top": set(), "middle": set(), "ground": {"top"}}, rules)
    assert found == ["the table lets ground import top, which stands above it"]


def test_a_circle_of_rooms_is_a_fault():
    found = house.faults({"top": {"middle"}, "middle": {"top"}, "ground": set()}, RULES)
    assert found == ["middle imports top", "circle: middle -> top -> middle"]


def test_rooms_without_a_row_and_rows_without_a_room_are_faults():
    found = house.faults({"top": set(), "middle": set(), "attic": set()}, RULES)
    assert found == [
        "attic is not in the table of rooms (tests/house.py)",
        "ground is in the table, but not in xprobe/",
    ]


def test_circles_are_found_and_other_paths_are_not():
    assert house.circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"e"}, "e": {"d"}}) == [
        ["b", "c", "b"],
        ["d", "e", "d"],
    ]


def made_up(folder: Path, files: dict[str, str]) -> house.Package:
    """A package ``p`` of these files; every folder gets an empty ``__init__.py`` if it has none."""
    for name, text in files.items():
        path = folder / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in [folder / "p", *(path for path in (folder / "p").rglob("*") if path.is_dir())]:
        (path / "__init__.py").touch()
    return house.Package("p", folder / "p")


def test_only_imports_that_run_with_the_module_count_for_circles(tmp_path):
    package = made_up(
        tmp_path,
        {
            "__init__.py": "from p.one import f\n",
            "one.py": "import p.two\nif TYPE_CHECKING:\n    from p.part import inner\n",
            "two.py": "import torch\ndef later():\n    from p import one\n    return one.f\n",
            "part/inner.py": "try:\n    from p.two import g\nexcept ImportError:\n    pass\n",
        },
    )
    assert house.module_imports(package) == {
        "p": {"p.one"},
        "p.one": {"p.two"},
        "p.two": set(),
        "p.part": set(),
        "p.part.inner": {"p.two"},
    }


@pytest.mark.parametrize(
    "text",
    [
        "from p.low import f",
        "from p.low.deep import f",
        "from p import low",
        "import p.low",
        "import p.low.deep as shallow",
        "from .. import low",
        "from ..low import f",
        "from ..low.deep import f",
        "import p\n\nx = p.low.f",
        "import p.other\n\nx = p.low.deep.f",
        "import p as alias\n\nx = alias.low.f",
        "def later():\n    import p\n    return p.low.f",
        "from p import f",
        "import p\n\nx = p.f",
    ],
)
def test_every_form_of_an_import_counts(tmp_path, text):
    files = {"__init__.py": "if TYPE_CHECKING:\n    from p.low import f\n", "high/module.py": f"{text}\n"}
    package = made_up(tmp_path, files | {"low/deep.py": "", "other.py": ""})
    assert "low" in house.imports_between_rooms(package)["high"]


def test_relative_imports_inside_a_room_are_none_between_rooms(tmp_path):
    files = {"high/__init__.py": "from . import module\n", "high/module.py": "from .other import f\nx = f.low\n"}
    package = made_up(tmp_path, files | {"high/other.py": "from . import low\n", "low.py": "", "high/low.py": ""})
    assert house.imports_between_rooms(package) == {"high": set(), "low": set()}
    assert house.module_imports(package)["p.high"] == {"p.high.module"}


def test_attributes_of_what_is_no_module_are_no_imports(tmp_path):
    package = made_up(tmp_path, {"high.py": "p = object()\nx = p.low\n", "low.py": ""})
    assert house.imports_between_rooms(package) == {"high": set(), "low": set()}


def test_a_circle_through_relative_imports_is_found_and_printed_closed(tmp_path):
    package = made_up(tmp_path, {"a.py": "from . import b\n", "b.py": "from .c import f\n", "c.py": "import p.a\n"})
    assert house.circles(house.module_imports(package)) == [["p.a", "p.b", "p.c", "p.a"]]
    wrong = house.faults(house.imports_between_rooms(package), {"a": ("b", "c"), "b": ("c",), "c": ()})
    assert wrong == ["c imports a", "circle: a -> b -> c -> a"]


@pytest.mark.parametrize("text", ["import xprobe_cli.main", "from xprobe_cli import main", "import tests.house"])
def test_an_import_of_the_command_line_or_of_the_tests_is_a_fault(tmp_path, text):
    package = made_up(tmp_path, {"a.py": f"def later():\n    {text}\n", "b.py": "import torch\n"})
    (wrong,) = house.forbidden_imports(package)
    assert wrong.startswith(f"p.a imports {text.split()[1]}")
    assert house.forbidden_imports() == []


# -- packages and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=lambda value: getattr(value, "name", value))
def test_packages_depend_in_one_direction(package, path):
    assert imported(package, path) & OURS <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", [path for name, path in SOURCES if name == "xprobe"], ids=lambda path: path.name)
def test_the_library_neither_prints_nor_exits(path):
    called = {
        node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Attribute) and node.func.attr == "exit")
    }
    assert "print" not in called
    assert "sys" not in imported("xprobe", path) or "exit" not in called
    assert "signal" not in imported("xprobe", path)  # what Ctrl-C does is the caller's


@pytest.mark.parametrize("path", [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts], ids=lambda path: path.name)
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


def test_git_ignores_no_source_file():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folders = [str(folder.relative_to(ROOT)) for folder in (*PACKAGES.values(), ROOT / "tests")]
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", *folders]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [name for name in ignored if not name.endswith(".pyc")] == []


# -- what an import loads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["import xprobe", "import xprobe, xprobe_cli.main"])
def test_importing_loads_neither_torch_nor_transformers(code):
    heavy = "('torch', 'transformers', 'pandas', 'numpy')"
    assert run(f"{code}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("room", house.WITHOUT_TORCH)
def test_rooms_of_numbers_and_files_load_no_torch(room):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in house.rooms()[room]
    ]
    code = "\n".join(f"import {module}" for module in modules)
    assert run(f"{code}\nimport sys\nprint([m for m in ('torch', 'transformers') if m in sys.modules])") == "[]"


@pytest.mark.parametrize("name", ["probes.register", "events.Note", "errors.UsageError"])
def test_modules_for_users_are_attributes_of_a_fresh_import(name):
    assert run(f"import xprobe\nprint(callable(xprobe.{name}))") == "True"


def test_help_loads_click_and_no_command():
    code = (
        "import sys\nbefore = set(sys.modules)\n"
        "from xprobe_cli.main import COMMANDS, main\nassert main(['--help']) == 0\n"
        "new = set(sys.modules) - before\n"
        "print(sorted({name.split('.')[0] for name in new} - sys.stdlib_module_names))\n"
        "print([module for module, _ in COMMANDS.values() if module in new])"
    )
    assert run(code).splitlines()[-2:] == ["['click', 'xprobe', 'xprobe_cli']", "[]"]


def test_public_names_resolve_and_an_unknown_name_is_an_error_that_lists_them():
    for name in xprobe.__all__:
        assert getattr(xprobe, name) is not None
    assert set(dir(xprobe)) == {*xprobe.__all__, "errors", "events", "probes"}
    with pytest.raises(AttributeError, match="load_study"):
        _ = xprobe.nonsense


# -- the distribution ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_stands_in_one_place(pyproject):
    assert "version" not in pyproject["project"]
    assert pyproject["project"]["dynamic"] == ["version"]
    source = (ROOT / pyproject["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [xprobe.__version__]
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_may_read_every_package(package):
    assert (PACKAGES[package] / "py.typed").is_file()


def test_the_source_distribution_names_files_that_exist(pyproject):
    for name in pyproject["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / name.lstrip("/")).exists(), name


def test_the_citation_has_what_its_format_needs(pyproject):
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == pyproject["project"]["name"]
    assert citation["license"] == pyproject["project"]["license"]
    assert citation["message"]
    assert all({"name"} <= set(author) or {"family-names"} <= set(author) for author in citation["authors"])
