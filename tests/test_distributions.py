"""The two distributions: what their wheels and source distributions hold, what they require, and one version."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

import xprobe

ROOT = Path(__file__).parents[1]
FOLDERS = {"xprobe": ROOT, "xprobe-kernels": ROOT / "kernels"}
PACKAGES = {
    "xprobe": {"xprobe": ROOT, "xprobe_kernels": ROOT / "kernels", "xprobe_cli": ROOT / "cli"},
    "xprobe-kernels": {"xprobe_kernels": ROOT / "kernels"},
}
STEM = {name: f"{name.replace('-', '_')}-{xprobe.__version__}" for name in FOLDERS}


def build(folder: Path, out: Path, *targets: str) -> None:
    chosen = [word for target in targets for word in ("-t", target)]
    subprocess.run([sys.executable, "-m", "hatchling", "build", *chosen, "-d", str(out)], cwd=folder, check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution of both."""
    pytest.importorskip("hatchling", reason="building needs pip install 'xprobe[test]'")
    out = tmp_path_factory.mktemp("dist")
    for folder in FOLDERS.values():
        build(folder, out, "wheel", "sdist")
    return out


def files_of_wheel(built: Path, name: str) -> set[str]:
    with ZipFile(built / f"{STEM[name]}-py3-none-any.whl") as wheel:
        return set(wheel.namelist())


def files_of_sdist(built: Path, name: str) -> set[str]:
    with tarfile.open(built / f"{STEM[name]}.tar.gz") as archive:
        assert all(member.isfile() for member in archive.getmembers())  # a link may lead out of the archive
        return {member.name.removeprefix(f"{STEM[name]}/") for member in archive.getmembers()}


def metadata(built: Path, name: str) -> Message:
    with ZipFile(built / f"{STEM[name]}-py3-none-any.whl") as wheel:
        return message_from_bytes(wheel.read(f"{STEM[name]}.dist-info/METADATA"))


def sources(name: str) -> set[str]:
    """Every file of the packages of a distribution, as a path that starts with the package."""
    return {
        path.relative_to(folder).as_posix()
        for package, folder in PACKAGES[name].items()
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wheel_holds_its_packages_and_nothing_else(built, name):
    about = {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"} | ({"entry_points.txt"} if name == "xprobe" else set())
    wanted = sources(name)
    assert {f"{package}/py.typed" for package in PACKAGES[name]} <= wanted
    assert files_of_wheel(built, name) == wanted | {f"{STEM[name]}.dist-info/{file}" for file in about}


def test_the_kernels_alone_need_torch_and_numpy(built):
    needs = metadata(built, "xprobe-kernels").get_all("Requires-Dist")
    assert {re.match(r"[\w-]+", need)[0] for need in needs if "extra ==" not in need} == {"torch", "numpy"}


def test_both_have_one_version_one_licence_and_the_same_requirements(built):
    versions = {metadata(built, name)["Version"] for name in FOLDERS}
    assert versions == {xprobe.__version__}
    assert (ROOT / "kernels" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    project, kernels = (tomllib.loads((f / "pyproject.toml").read_text())["project"] for f in FOLDERS.values())
    assert set(kernels["dependencies"]) <= set(project["dependencies"])
    for extra, needs in kernels["optional-dependencies"].items():
        assert needs == project["optional-dependencies"][extra], extra
    assert kernels["requires-python"] == project["requires-python"]


def test_the_source_distribution_of_xprobe_is_the_repository(built):
    """Whoever unpacks it can run the tests: pages, templates, assets and results lie where the tests look for them."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    tracked = {name for name in listed if name and (ROOT / name).exists() and not name.startswith(".ci/")}
    assert files_of_sdist(built, "xprobe") >= tracked
    untracked = files_of_sdist(built, "xprobe") - tracked
    assert not {name for name in untracked if name.endswith((".pyc", ".so")) or ".venv/" in name}


def test_the_kernels_source_distribution_gives_the_same_wheel(built, tmp_path):
    assert files_of_sdist(built, "xprobe-kernels") == {
        *sources("xprobe-kernels"), "README.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore",
    }  # fmt: skip
    with tarfile.open(built / f"{STEM['xprobe-kernels']}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    build(tmp_path / STEM["xprobe-kernels"], tmp_path, "wheel")  # the version's file is not here: it is in PKG-INFO
    assert files_of_wheel(tmp_path, "xprobe-kernels") == files_of_wheel(built, "xprobe-kernels")
    assert str(metadata(tmp_path, "xprobe-kernels")) == str(metadata(built, "xprobe-kernels"))
