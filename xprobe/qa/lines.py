"""JSON lines: one object on each line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from xprobe.qa.documents import fault
from xprobe.qa.validation import Collector


def read_lines(text: str, collector: Collector) -> Iterator[tuple[str, Any]]:
    """The values of all lines, each with its place (``line 7``); blank lines are skipped, bad ones reported."""
    # split, not splitlines: a JSON string may hold other characters that end a line
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            collector.reject(f"line {number}", "not valid JSON", fault(error, line, "line"))
        except RecursionError:
            collector.reject(f"line {number}", "not valid JSON", "nested too deeply")
        except ValueError as error:  # a whole number of thousands of digits
            collector.reject(f"line {number}", "not valid JSON", str(error))
        else:
            yield f"line {number}", value


def first_object(text: str) -> Any:
    """The value of the first line that is not blank; None if it is no JSON."""
    line = text.lstrip().partition("\n")[0]
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
