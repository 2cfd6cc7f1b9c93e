"""An argument of the wrong type is refused by its name before anything is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import xprobe
from xprobe.config import Execution, StudyConfig
from xprobe.errors import UsageError
from xprobe.forecast import forecast
from xprobe.probes.training import ProbeSettings
from xprobe.study import run_config, train_probes


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"setting": 5}, "setting must be a text or a list of texts, got 5"),
        ({"setting": ["en-x", 5]}, "setting must be a text or a list of texts, got ['en-x', 5]"),
        ({"setting": b"en-x"}, "setting must be a text or a list of texts, got b'en-x'"),
        ({"languages": 5}, "languages must be a text or a list of texts, got 5"),
        ({"languages": ["en", None]}, "languages must be a text or a list of texts, got ['en', None]"),
        ({"signals": 5}, "signals must be a text or a list of texts, got 5"),
        ({"probes": [5]}, "probes must be a text or a list of texts, got [5]"),
        ({"out": b"run"}, "out must be a path, got b'run'"),
        ({"out": 5}, "out must be a path, got 5"),
        ({"out": ""}, "out must be a path, got ''"),
        ({"out": "a\0b"}, r"out must be a path, got 'a\x00b'"),
        ({"progress": 5}, "progress must be a function that takes an event, or None, got 5"),
        ({"resume": "yes"}, "resume must be True or False, got 'yes'"),
        ({"resume": True}, "resume needs out: the folder of the run to continue"),
        ({"device_map": 5}, "device_map must give each module a device by number or name, got 5"),
        ({"device_map": {}}, "device_map must give each module a device by number or name, got {}"),
        ({"device_map": {"lm_head": True}}, "device_map must give each module a device by number or name, got {'lm_"),
        ({"device_map": {"lm_head": -1}}, "device_map must give each module a device by number or name, got {'lm_"),
        ({"device_map": {"lm_head": ""}}, "device_map must give each module a device by number or name, got {'lm_"),
        ({"device_map": {5: "cpu"}}, "device_map must give each module a device by number or name, got {5"),
        ({"jobs": -7}, "jobs must be -1 (one per core) or a whole number of at least 1, got -7"),
    ],
    ids=str,
)
def test_run_names_an_argument_of_the_wrong_type_and_writes_nothing(
    argument: dict[str, Any], words: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^{re.escape(words)}"):
        xprobe.run(tiny, **argument)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["study", "execution"])
@pytest.mark.parametrize("function", [run_config, forecast])
def test_a_configuration_of_the_wrong_type_is_named(function: Any, name: str) -> None:
    arguments = {"study": StudyConfig(), "execution": Execution(), name: 5}
    with pytest.raises(UsageError, match=rf"^{name} must be an? (StudyConfig|Execution), got 5$"):
        function(**arguments)


@pytest.mark.parametrize("path", [None, 5, b"run", ""], ids=repr)
def test_a_path_of_the_wrong_type_is_named(path: Any) -> None:
    for use in (xprobe.load_study, train_probes):
        with pytest.raises(UsageError, match=f"^path must be a path, got {re.escape(repr(path))}$"):
            use(path)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"probes": 5}, "probes must be a text or a list of texts, got 5"),
        ({"settings": 5}, "settings must be a ProbeSettings, got 5"),
        ({"progress": 5}, "progress must be a function that takes an event, or None, got 5"),
    ],
    ids=str,
)
def test_train_probes_names_an_argument_of_the_wrong_type(argument: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        train_probes(tmp_path, **argument)


def test_a_text_is_one_probe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown probe 'syntax'"):
        train_probes(tmp_path, "syntax")
    with pytest.raises(UsageError, match="is not a run folder"):
        train_probes(tmp_path, "language")


@pytest.mark.parametrize("jobs", [0, -7, 1.5, True])
def test_probe_settings_refuse_a_number_of_jobs_that_means_nothing(jobs: Any) -> None:
    with pytest.raises(UsageError, match=r"^jobs must be -1 \(one per core\) or a whole number of at least 1, got"):
        ProbeSettings(jobs=jobs)


def test_an_unknown_option_is_answered_with_the_names_that_run_takes() -> None:
    with pytest.raises(UsageError, match=r"^unknown option 'nope'; known: .*\bsetting\b") as caught:
        xprobe.run(nope=1)
    assert "settings" not in str(caught.value)
