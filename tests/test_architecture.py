"""docs/architecture.md matches the code: its rooms, its paths through the code, its picture."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests import house

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
HOPS = 3  # from file to file


def paths() -> dict[str, list[str]]:
    """The functions under each heading of "Find your way", in order."""
    sections = re.split(r"^### (.+)$", PAGE, flags=re.MULTILINE)[1:]
    return {
        heading: re.findall(r"`(xprobe[\w.]*\.\w+)`", section.partition("\n[")[0])
        for heading, section in zip(sections[::2], sections[1::2], strict=True)
    }


def resolve(name: str) -> tuple[Any, Any]:
    """The module and the function or class of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return import_module(module), getattr(import_module(module), attribute)


def mentions(name: str, following: str) -> bool:
    """Whether the source of ``name`` calls ``following``, as ``module.function`` or by a name that its module has."""
    module, thing = resolve(name)
    _, wanted = resolve(following)
    home, short = following.split(".")[-2:]
    source = inspect.getsource(thing)
    own = getattr(module, short, None) is wanted and re.search(rf"(?<![\w.]){short}\(", source)
    return bool(own or f"{home}.{short}(" in source)


def test_the_page_lists_the_rooms_of_the_import_table():
    section = PAGE.partition("## Rooms")[2].partition("\n![")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE)) == house.ABOUT


@pytest.mark.parametrize("heading", ["Where S(l) is computed", "Where the lens is called"])
def test_a_path_leads_from_function_to_function_in_few_hops(heading):
    names = paths()[heading]
    assert len(names) > 2
    for name, following in pairwise(names):
        assert mentions(name, following), f"{name} does not call {following}"
    files = dict.fromkeys(inspect.getsourcefile(resolve(name)[1]) for name in names)
    assert len(files) - 1 <= HOPS
    section = PAGE.partition(f"### {heading}")[2].partition("\n\n#")[0].partition("\n[")[0]
    numbered = dict(re.findall(r"^- File (\d), `([\w./]+)`", section, re.MULTILINE))
    assert [ROOT / numbered[str(number)] for number in range(len(files))] == [Path(str(file)) for file in files]


def test_the_paths_begin_and_end_at_the_documented_functions():
    ends = {names[0] for names in paths().values()}, {names[-1] for names in paths().values()}
    assert ends == (
        {"xprobe.study._compute_stages"},
        {"xprobe.phases.stability.layer_stability", "xprobe_kernels.lens"},
    )


def test_a_wrong_path_is_found():
    assert not mentions("xprobe.stages.phases.compute", "xprobe.phases.stability.layer_stability")


def test_the_picture_shows_the_current_imports():
    image = pytest.importorskip("PIL.Image")
    from docs import make_house_figure

    with image.open(make_house_figure.PICTURE) as picture:
        drawn = picture.text["Description"]
    assert drawn == make_house_figure.description(make_house_figure.upper_imports()), (
        "draw it again: python docs/make_house_figure.py"
    )


def test_no_two_rooms_overlap_in_the_picture():
    from docs import make_house_figure as figure

    where = sorted(figure.places(figure.upper_imports()).items(), key=lambda item: item[1][::-1])
    for (one, (x, y)), (other, (far_x, far_y)) in pairwise(where):
        assert y != far_y or far_x - x > 2 * figure.HALF_WIDTH, f"{one} and {other}: give both a column in COLUMNS"
