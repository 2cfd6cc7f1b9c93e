"""The report page: it shows what the tables hold, takes nothing from elsewhere, and works in a browser."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.browser import BROWSER, look
from support.families import save_tiny_model
from xprobe_cli.main import main

import xprobe
from xprobe.errors import RunFolderError, UsageError
from xprobe.report.content import groups
from xprobe.report.page import page
from xprobe.report.parts import interval

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>\'&amp;\u2028'
NAME = "<img src=x onerror=window.hacked=3>"  # of a folder
MOST_BYTES = 6 << 20
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def records(language: str) -> list[dict[str, Any]]:
    words = {"en": ("red", "blue", "green"), "de": ("rot", "blau", "gelb")}[language]
    found = []
    for paragraph in range(3):
        context = f"{HOSTILE} The ball {paragraph} is {words[0]}, the car is {words[1]}, the door is {words[2]}."
        for number, answer in enumerate(words):
            found.append({
                "id": f"{HOSTILE}{paragraph}-{number}", "context": context, "question": f"Which {number}? {HOSTILE}",
                "answers": {"text": [answer], "answer_start": [context.index(answer)]},
            })  # fmt: skip
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> xprobe.Study:
    """A run with every stage and two settings; names and texts hold markup."""
    folder = tmp_path_factory.mktemp("page")
    model = save_tiny_model(folder / NAME)
    data = folder / "data"
    data.mkdir()
    for language in ("en", "de"):
        lines = [json.dumps(one, ensure_ascii=False) for one in records(language)]
        lines.append(json.dumps({"id": HOSTILE, "context": "c", "question": HOSTILE}))  # a bad record
        (data / f"set.{language}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = xprobe.run(
        str(model), data=str(data), setting=("en-x", "x-x"), out=folder / "run", template="plain", bootstrap=30,
        permutations=20,
    )  # fmt: skip
    found = found.evaluate(xprobe.AnswerSettings(max_new_tokens=4)).attribute().patch().read_lenses()
    return xprobe.oracle(found, xprobe.OracleSettings(limit=2))


@pytest.fixture(scope="module")
def html(study: xprobe.Study) -> str:
    return page(study)


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text inside of each id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def charts(html: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', html, re.S)
    return json.loads(found)


def test_every_stage_has_its_section(study: xprobe.Study) -> None:
    first, second, about = groups(study)
    titles = [section.title for section in first.sections]
    assert titles == [section.title for section in second.sections]
    reading, later = ["Phases and stability", "Signals", "Languages"], ["Causes", "Relevance", "Performance"]
    assert titles == [*reading, *later, "Evidence (oracle)", "Probes", "Lenses"]
    assert [section.title for section in about.sections][:2] == ["Model, data, versions", "Left out"]


def test_charts_and_cards_show_what_the_tables_hold(study: xprobe.Study, html: str) -> None:
    shown = charts(html)
    for name, result in study.items():
        rows = [row for row in shown[f"{name}-stability"]["data"]["values"] if row["series"] == "S(l)"]
        assert [row["layer"] for row in rows] == list(result.stability.index)
        assert [row["value"] for row in rows] == pytest.approx(result.stability["stability"].tolist(), rel=1e-4)
        onsets = shown[f"{name}-onsets"]["data"]["values"]
        assert sum(row["n"] for row in onsets) == result.examples["onset"].notna().sum()
        assert interval(result.boundary) in html
    answers = study.answers
    for row in shown["en-x-errors"]["data"]["values"]:
        own = answers[(answers["setting"] == "en-x") & (answers["language"] == row["language"])]
        assert row["value"] == pytest.approx((own["error_type"] == row["part"]).mean(), rel=1e-4)
    causes = study.table("patching_by_layer.parquet")
    causes = causes[(causes["setting"] == "x-x") & (causes["language"] == "all") & (causes["measure"] == "effect")]
    own = causes[(causes["pairs"] == "same") & (causes["kind"] == "answer")].dropna(subset=["value"])
    chart = shown.get("x-x-causes", {"data": {"values": []}})
    drawn = [row["value"] for row in chart["data"]["values"] if row["series"].startswith("T: ")]
    assert drawn == pytest.approx(own["value"].tolist(), rel=1e-4)


def test_the_page_takes_nothing_from_elsewhere_and_is_small(html: str) -> None:
    for tag, attributes in Elements(html).found:
        assert tag not in ("link", "iframe", "img", "object", "embed"), tag
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#"), attributes
        assert not [name for name in attributes if name.startswith("on")], attributes
    css = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in css
    assert "@import" not in css
    assert len(html.encode()) < MOST_BYTES


def test_markup_in_data_and_model_stays_text(html: str) -> None:
    scripts = [attributes for tag, attributes in Elements(html).found if tag == "script"]
    assert len(scripts) == 5  # the charts, three libraries, the page's own
    assert "&lt;img" in html
    assert "<img" not in html.split("<script")[0]


def test_the_page_names_no_folder_of_the_disk(study: xprobe.Study, html: str) -> None:
    assert str(study.path.parent) not in html
    assert study.path.name in html
    assert not re.search(r'data-sort="[^"]*[:"]/', html)


def test_the_page_names_no_folder_of_a_lens(study: xprobe.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = xprobe.Study.table

    def table(self: xprobe.Study, name: str) -> pd.DataFrame:
        frame = kept(self, name)
        if not name.startswith("lenses"):
            return frame
        others = [frame.assign(lens=f"tuned:/home/Ada, L/{at}/lens.pt") for at in "ab"]
        return pd.concat([frame, *others], ignore_index=True)

    monkeypatch.setattr(xprobe.Study, "table", table)
    text = page(study)
    assert 'data-sort="tuned:lens.pt"' in text
    assert "tuned:lens.pt #2" in text
    assert "/home/Ada" not in text
    assert "Ada, L" not in text


def test_a_printed_table_says_which_columns_it_leaves_out(study: xprobe.Study, html: str) -> None:
    (table,) = [one for one in groups(study)[0].sections[0].tables if one.screen]
    left = [head for head in table.heads if head in table.screen]
    assert 0 < len(left) < len(table.heads) - 3
    assert f"On the screen this table also has: {', '.join(left)}." in html
    for head in table.heads:
        own = re.findall(rf'<th scope="col" class="([^"]*)"><button type="button">{re.escape(head)}<', html)
        assert own
        if head == left[0]:
            assert any("screen" in classes.split() for classes in own)


def test_a_thing_has_the_same_colour_on_the_page_and_in_figures(html: str) -> None:
    from xprobe.report import figure_panels as figures

    def colours(chart: str, layer: int | None = None) -> dict[str, str]:
        part = charts(html)[chart]
        scale = (part if layer is None else part["layer"][layer])["encoding"]["color"]["scale"]
        return dict(zip(scale["domain"], scale["range"], strict=True))

    tokens = colours("en-x-shares", 0)
    assert tokens == {group: figures.GROUPS[group].colour for group in tokens}
    assert len(set(tokens.values())) == len(tokens) > 3
    shown = {name.split(" (")[0]: colour for name, colour in colours("en-x-boundaries", 0).items()}
    looks = {
        look.label.split(" (")[0]: look.colour for look in (figures.ONSET, figures.DEPTH, figures.HELD, figures.USED)
    }
    looks["answer held from"] = "currentColor"  # black in figures: the page may be dark
    assert shown == {name: looks[name] for name in shown}
    readiness = charts(html)["en-x-readiness"]["layer"][-1]["mark"]["color"]
    assert readiness == figures.READ["readiness"].colour


def test_anchors_exist_once(html: str) -> None:
    names = [attributes["id"] for _, attributes in Elements(html).found if "id" in attributes]
    assert len(names) == len(set(names))
    links = [attributes["href"] for tag, attributes in Elements(html).found if tag == "a"]
    assert {link.removeprefix("#") for link in links if link} <= set(names)


def test_the_libraries_are_the_published_files() -> None:
    assets = resources.files("xprobe.report") / "assets"
    lines = (assets / "SHA256SUMS").read_text().split("\n")
    listed = dict(reversed(line.split()) for line in lines if line)
    assert len(listed) == 3
    for name, digest in listed.items():
        assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == digest, name
        assert (assets / f"LICENSE-{name.removesuffix('.min.js')}").is_file()


# -- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("browser")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@in_browser
def test_all_charts_are_drawn_without_a_complaint(html: str, profile: Path) -> None:
    script = """
      const svgs = [...document.querySelectorAll(".chart svg")];
      return {
        svgs: svgs.length, places: document.querySelectorAll("[data-chart]").length, hacked: window.hacked ?? null,
        images: document.images.length, wide: document.documentElement.scrollWidth,
        marks: svgs.map((svg) => svg.querySelectorAll(".mark-line path, .mark-rect path, .mark-symbol path").length),
      };
    """
    found = look(html, script, profile)
    assert found["problems"] == []
    assert found["drawn"] == found["places"] == found["svgs"] == len(charts(html))
    assert min(found["marks"]) > 0
    assert found["hacked"] is None
    assert found["images"] == 0
    assert found["milliseconds"] < 20_000  # 0.7 s where nothing else runs


@in_browser
@pytest.mark.parametrize("width", [390, 768])
def test_nothing_is_wider_than_a_small_screen(html: str, profile: Path, width: int) -> None:
    script = f"""
      document.body.style.width = "{width}px";  // a window of Chromium is at least 500 wide
      const end = document.body.getBoundingClientRect().right + 1;
      return {{ over: [...document.querySelectorAll("main *")].filter((one) =>
        !one.closest(".scroll, svg") && one.getBoundingClientRect().right > end)
        .map((one) => one.outerHTML.slice(0, 80)) }};
    """
    found = look(html, script, profile, f"--window-size={width},900")
    assert found["over"] == []


@in_browser
def test_tables_are_sorted_by_number_and_back(html: str, profile: Path) -> None:
    script = """
      const tables = [...document.querySelectorAll("table.sortable")];
      const table = tables.find((one) => one.caption.textContent.startsWith("Languages"));
      const heads = [...table.tHead.rows[0].cells];
      const column = heads.findIndex((head) => head.textContent === "F1");
      const values = () => [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.sort ?? null);
      const press = (where) => heads[where].querySelector("button").click();
      press(column); const up = values(), said = heads[column].getAttribute("aria-sort");
      press(column); const down = values(), then = heads[column].getAttribute("aria-sort");
      press(0); const names = [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
      return { up, down, said, then, names, left: heads[column].getAttribute("aria-sort") };
    """
    found = look(html, script, profile)
    up = [float(value) for value in found["up"]]
    assert up == sorted(up)
    assert [float(value) for value in found["down"]] == up[::-1]
    assert (found["said"], found["then"], found["left"]) == ("ascending", "descending", None)
    assert found["names"] == ["de", "en"]


@in_browser
def test_pointing_at_a_chart_shows_its_numbers(html: str, profile: Path) -> None:
    script = """
      const mark = document.querySelector('[data-chart="en-x-onsets"] .mark-rect path');
      const place = mark.getBoundingClientRect();
      const at = { bubbles: true, clientX: place.x + 3, clientY: place.y + 3 };
      for (const kind of ["pointerover", "pointermove", "mousemove"]) mark.dispatchEvent(new PointerEvent(kind, at));
      await pause(300);
      return { tip: document.getElementById("vg-tooltip-element")?.textContent ?? "" };
    """
    tip = look(html, script, profile)["tip"]
    assert "share of examples" in tip
    assert "language" in tip


@in_browser
def test_light_and_dark_can_be_chosen(html: str, profile: Path) -> None:
    script = """
      const paper = () => getComputedStyle(document.body).backgroundColor;
      const before = paper();
      document.getElementById("theme").click(); const once = paper();
      document.getElementById("theme").click();
      return { before, once, twice: paper() };
    """
    found = look(html, script, profile)
    assert found["before"] == found["twice"] != found["once"]


# -- files and commands -------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_where(study: xprobe.Study, tmp_path: Path, capsys: Any) -> None:
    assert main(["report", str(study.path)]) == 0
    assert str(study.path / "report.html") in capsys.readouterr().out
    assert (study.path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["report", str(study.path), "--out", str(tmp_path / "own.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(tmp_path / "own.html")
    assert [path.name for path in tmp_path.iterdir()] == ["own.html"]


def test_a_page_that_cannot_be_written_is_refused(study: xprobe.Study, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        study.to_html(tmp_path)
    with pytest.raises(UsageError, match="cannot be written"):
        study.to_html(tmp_path / "no" / "page.html")
    with pytest.raises(UsageError, match="must be a path"):
        study.to_html(5)  # type: ignore[arg-type]


def test_files_of_runs_and_sweeps_are_not_replaced(study: xprobe.Study, tmp_path: Path) -> None:
    copy = shutil.copytree(study.path, tmp_path / "run")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "plan.json").write_text("{}")
    shard = next((copy / "shards").iterdir())
    (tmp_path / "link.html").symlink_to(copy / "manifest.json")
    of_the_run = [copy / name for name in ("manifest.json", "layers.parquet", "answers.jsonl")]
    for file in (*of_the_run, shard, tmp_path / "sweep" / "plan.json", tmp_path / "link.html"):
        before = file.read_bytes()
        with pytest.raises(UsageError, match=r"is a file of the (run|sweep) in .*: name another"):
            study.to_html(file)
        with pytest.raises(UsageError, match=r"is a file of the (run|sweep) in .*: name another"):
            xprobe.fit_lens("none", file)
        assert file.read_bytes() == before
    for file in (copy / "report.html", copy / "report.html", copy / "figures.html", tmp_path / "page.html"):
        assert study.to_html(file) == file


def test_a_lost_table_is_named(study: xprobe.Study, tmp_path: Path) -> None:
    copy = shutil.copytree(study.path, tmp_path / "run")
    (copy / "patching_by_layer.parquet").unlink()
    with pytest.raises(RunFolderError, match=r"patching_by_layer\.parquet is not there: .*\(xprobe patch "):
        xprobe.load_study(copy).to_html(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_run_of_one_language_and_no_later_stage_has_a_page(tiny: Path, tmp_path: Path) -> None:
    study = xprobe.run(str(tiny), languages="en", limit=2, probes=(), out=tmp_path / "run", bootstrap=20)
    html = study.to_html().read_text(encoding="utf-8")
    assert "Causes" not in html
    assert "NaN" not in json.dumps(charts(html))
