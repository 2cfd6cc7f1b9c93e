"""JSON lines: one value on each line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from xprobe.qa.documents import describe_json_error
from xprobe.qa.validation import Collector


def read_lines(text: str, collector: Collector) -> Iterator[tuple[str, Any]]:
    r"""The value of every line, with its place (``line 7``). Blank lines are skipped, bad lines are reported.

    Examples
    --------
    >>> collector = Collector("small.en.jsonl", "en")
    >>> list(read_lines('{"id": "q1"}\n\n[1, 2]\n{"id"', collector))
    [('line 1', {'id': 'q1'}), ('line 3', [1, 2])]
    >>> collector.problems[0].where
    'line 4'
    """
    # split, not splitlines: a JSON string may hold other characters at which splitlines would cut
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            collector.reject(f"line {number}", "not valid JSON", describe_json_error(error, line, "line"))
        except RecursionError:
            collector.reject(f"line {number}", "not valid JSON", "nested too deeply")
        except ValueError as error:  # an integer with thousands of digits
            collector.reject(f"line {number}", "not valid JSON", str(error))
        else:
            yield f"line {number}", value


def first_object(text: str) -> Any:
    r"""The value of the first line that is not blank; None if that line is not JSON.

    Examples
    --------
    >>> first_object('\n{"id": "q1"}\n')
    {'id': 'q1'}
    """
    line = text.lstrip().partition("\n")[0]
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
