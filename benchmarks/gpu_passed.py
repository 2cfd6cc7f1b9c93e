"""A pytest plugin for gpu.py: records every test that passes, and skips those that passed in an earlier call.

Failures are printed at once, so that the log has them if the tests run out of time.

The file named by ``XPROBE_PASSED_TESTS`` has a heading (what the tests ran on) and one test id per line.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # gpu.py compares figures where there is no pytest
    import pytest

VARIABLE = "XPROBE_PASSED_TESTS"
OK, NO_TESTS_COLLECTED = 0, 5  # pytest's exit codes
MESSAGE = 400  # characters of a failure's message


def passed(path: Path) -> set[str]:
    """The ids of the tests that passed."""
    return set(path.read_text(encoding="utf-8").splitlines()[1:]) if path.exists() else set()


def begin(path: Path, heading: str) -> None:
    """Empties the file if it has another heading."""
    if not path.exists() or path.read_text(encoding="utf-8").partition("\n")[0] != heading:
        path.write_text(heading + "\n", encoding="utf-8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    earlier = passed(Path(os.environ[VARIABLE]))
    done = [item for item in items if item.nodeid in earlier]
    items[:] = [item for item in items if item.nodeid not in earlier]
    config.hook.pytest_deselected(items=done)


_is_worker = False  # of pytest-xdist, whose reports arrive a second time in the main process


def pytest_configure(config: pytest.Config) -> None:
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed and not _is_worker:
        with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
            file.write(report.nodeid + "\n")
    if report.failed and not _is_worker:
        crash = getattr(report.longrepr, "reprcrash", None)
        said = str(crash.message if crash else report.longrepr)
        print(f"\nFAILED {report.nodeid}: {' '.join(said.split())[:MESSAGE]}", flush=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == NO_TESTS_COLLECTED and passed(Path(os.environ[VARIABLE])):
        session.exitstatus = OK
