"""Fetching puts whole, checked files in place or nothing, and says which address failed."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from xprobe.errors import DataError, UsageError
from xprobe.qa.fetch import fetch_xquad
from xprobe.qa.parallel import BUILTIN_DIR, XQUAD_LANGUAGES, load_data


class Site:
    """A local stand-in for the download site: files in a folder, and the paths asked for so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        self.lies_about_length = False
        site = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path.rsplit("/", 1)[-1])
                super().do_GET()

            def send_header(self, keyword: str, value: str) -> None:
                if keyword == "Content-Length" and site.lies_about_length:
                    value = str(int(value) + 1000)  # as when the connection breaks before the end
                super().send_header(keyword, value)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def address(self, language: str) -> str:
        return f"{self.url}/xquad.{language}.json"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "site"
    folder.mkdir()
    for path in BUILTIN_DIR.glob("builtin.*.json"):
        (folder / path.name.replace("builtin", "xquad")).write_bytes(path.read_bytes())
    site = Site(folder)
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    site.server.shutdown()
    thread.join()
    site.server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where fetched files go; its folders do not exist yet."""
    monkeypatch.setenv("XPROBE_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.delenv("XPROBE_XQUAD_DIR", raising=False)
    return tmp_path / "deep" / "cache" / "data" / "xquad"


def files_in(folder: Path) -> list[str]:
    """Names of everything there, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def test_every_language_is_put_in_place_byte_by_byte(site: Site, cache: Path) -> None:
    reported: list[tuple[str, int]] = []
    folder = fetch_xquad(url=site.url, report=lambda language, count: reported.append((language, count)))
    assert folder == cache
    assert files_in(cache) == sorted(f"xquad.{language}.json" for language in XQUAD_LANGUAGES)
    for path in cache.iterdir():
        assert path.read_bytes() == (site.folder / path.name).read_bytes()
    questions = len(load_data("builtin").ids)
    assert reported == [(language, questions) for language in XQUAD_LANGUAGES]


def test_fetched_files_are_what_the_name_xquad_stands_for(site: Site, cache: Path) -> None:
    fetch_xquad(["de", "en"], url=site.url)
    data = load_data("xquad")
    assert data.languages == ("en", "de")
    assert {Path(name).parent for name in data.files} == {cache}


def test_only_the_languages_asked_for_are_fetched(site: Site, cache: Path) -> None:
    fetch_xquad(["th", "en"], url=site.url + "/")
    assert files_in(cache) == ["xquad.en.json", "xquad.th.json"]
    assert site.asked == ["xquad.th.json", "xquad.en.json"]


def test_what_is_there_is_not_fetched_again(site: Site, cache: Path) -> None:
    fetch_xquad(["en"], url=site.url)
    kept = (cache / "xquad.en.json").read_bytes()
    (site.folder / "xquad.en.json").write_bytes(kept + b"\n")
    reported: list[str] = []
    fetch_xquad(["en", "de"], url=site.url, report=lambda language, _: reported.append(language))
    assert site.asked == ["xquad.en.json", "xquad.de.json"]
    assert (cache / "xquad.en.json").read_bytes() == kept
    assert reported == ["en", "de"]


def test_force_fetches_again(site: Site, cache: Path) -> None:
    fetch_xquad(["en"], url=site.url)
    newer = (site.folder / "xquad.en.json").read_bytes() + b"\n"
    (site.folder / "xquad.en.json").write_bytes(newer)
    fetch_xquad(["en"], url=site.url, force=True)
    assert site.asked == ["xquad.en.json"] * 2
    assert (cache / "xquad.en.json").read_bytes() == newer


def test_an_unknown_language_is_refused_before_anything_is_asked(site: Site, cache: Path) -> None:
    with pytest.raises(UsageError, match=r"no language 'fr'; it has ar, de, "):
        fetch_xquad(["en", "fr"], url=site.url)
    assert site.asked == []
    assert not cache.exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def page(path: Path) -> None:
    path.write_text("<html>Please log in</html>")


def other_json(path: Path) -> None:
    path.write_text('{"message": "moved"}')


def no_questions(path: Path) -> None:
    path.write_text('{"data": []}')


@pytest.mark.parametrize("spoil", [Path.unlink, cut, empty, page, other_json, no_questions])
def test_a_file_that_does_not_come_whole_names_the_address_and_leaves_nothing(
    spoil: Callable[[Path], None], site: Site, cache: Path
) -> None:
    spoil(site.folder / "xquad.de.json")
    with pytest.raises(DataError, match=re.escape(site.address("de"))):
        fetch_xquad(["en", "de", "zh"], url=site.url)
    assert files_in(cache) == ["xquad.en.json"]  # what came before stays, no part of the broken one


def test_a_connection_that_breaks_off_names_the_address_and_leaves_nothing(site: Site, cache: Path) -> None:
    fetch_xquad(["en"], url=site.url)
    site.lies_about_length = True
    with pytest.raises(DataError, match=re.escape(site.address("de"))):
        fetch_xquad(["en", "de"], url=site.url)
    assert files_in(cache) == ["xquad.en.json"]


def test_no_message_names_a_temporary_file(site: Site, cache: Path) -> None:
    cut(site.folder / "xquad.de.json")
    with pytest.raises(DataError) as caught:
        fetch_xquad(["de"], url=site.url)
    assert ".xquad.de.json" not in str(caught.value)


def test_a_failed_forced_fetch_keeps_the_file_that_was_there(site: Site, cache: Path) -> None:
    fetch_xquad(["en"], url=site.url)
    kept = (cache / "xquad.en.json").read_bytes()
    cut(site.folder / "xquad.en.json")
    with pytest.raises(DataError):
        fetch_xquad(["en"], url=site.url, force=True)
    assert files_in(cache) == ["xquad.en.json"]
    assert (cache / "xquad.en.json").read_bytes() == kept


def test_a_missing_page_says_so_and_what_to_do(site: Site, cache: Path) -> None:
    (site.folder / "xquad.de.json").unlink()
    with pytest.raises(DataError, match=r"cannot fetch .*xquad\.de\.json.*not found.*--url.*--data"):
        fetch_xquad(["de"], url=site.url)


def test_an_address_where_nobody_answers_is_named(cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(DataError, match=re.escape(f"{url}/xquad.en.json")):
            fetch_xquad(["en"], url=url)
    assert files_in(cache) == []


@pytest.mark.parametrize("url", ["not a url", "nowhere://x"])
def test_an_address_that_is_none_is_named(url: str, cache: Path) -> None:
    with pytest.raises(DataError, match=re.escape(url)):
        fetch_xquad(["en"], url=url)


def test_a_cache_that_cannot_be_made_says_how_to_choose_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XPROBE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="XPROBE_CACHE"):
        fetch_xquad(["en"], url="http://127.0.0.1:9")
