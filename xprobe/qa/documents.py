"""From the bytes of a file to its JSON: decompression, encoding, and clear errors for damaged or other files."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from xprobe.errors import DataError, UsageError


def read_text(path: Path) -> tuple[str, str]:
    """The text of a file, decompressed if it is a gzip file, and the SHA-256 of its bytes on the disk.

    Bytes that are not UTF-8 become lone surrogates. They are reported later, record by record.

    Raises
    ------
    UsageError
        The file does not exist or cannot be opened.
    DataError
        The file is a damaged gzip file, in another encoding, or empty.

    Examples
    --------
    >>> from xprobe.qa.parallel import BUILTIN_DIR
    >>> text, checksum = read_text(BUILTIN_DIR / "builtin.en.json")
    >>> text[0], len(checksum)
    ('{', 64)
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    checksum = hashlib.sha256(raw).hexdigest()
    if path.suffix == ".gz" or raw[:2] == b"\x1f\x8b":
        raw = _decompress(raw, path)
    if raw[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") or raw[:3] == b"\0\0\0" or raw[1:4] == b"\0\0\0":
        raise DataError(f"{path} is UTF-32: save it as UTF-8")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(raw) > 1 and 0 in raw[:2]):
        raise DataError(f"{path} is UTF-16: save it as UTF-8")
    text = raw.decode("utf-8-sig", errors="surrogateescape")
    if not text.strip():
        raise DataError(f"{path} is not valid JSON: the file is empty. Get the file again, or leave its language out")
    return text, checksum


def parse_document(text: str, path: Path) -> Any:
    """The JSON value in ``text``, which is all of the file at ``path``.

    Raises
    ------
    DataError
        The text is not JSON.

    Examples
    --------
    >>> parse_document('{"data": []}', Path("small.en.json"))
    {'data': []}
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = describe_json_error(error, text)
        raise DataError(f"{path} is not valid JSON: {what}. Get the file again, or leave its language out") from error
    except RecursionError as error:
        raise DataError(f"{path} is not in SQuAD v1.1 format: its JSON is nested too deeply") from error
    except ValueError as error:  # an integer with thousands of digits
        raise DataError(f"{path} is not in SQuAD v1.1 format: {error}") from error


def describe_json_error(error: json.JSONDecodeError, text: str, what: str = "file") -> str:
    """What is wrong in the JSON ``text`` and where, and whether the text ends early.

    Examples
    --------
    >>> try:
    ...     json.loads('{"id": "q1"')
    ... except json.JSONDecodeError as error:
    ...     describe_json_error(error, '{"id": "q1"', "line")
    "Expecting ',' delimiter at column 12; the line ends early, as after a broken download"
    """
    place = f"at line {error.lineno}, column {error.colno}" if what == "file" else f"at column {error.colno}"
    hint = f"{error.msg.removesuffix(' starting at')} {place}"
    if error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string"):
        hint += f"; the {what} ends early, as after a broken download"
    return hint


def _decompress(raw: bytes, path: Path) -> bytes:
    if raw[:2] != b"\x1f\x8b":
        what = "is empty" if not raw else "is not a gzip file, although its name says so"
        raise DataError(f"{path} {what}. Get the file again, or leave its language out")
    try:
        return gzip.decompress(raw)
    except EOFError as error:
        why = "ends early, as after a broken download"
        raise DataError(f"{path}: the gzip file {why}. Get the file again, or leave its language out") from error
    except (OSError, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip file is damaged ({error}). Get the file again, or leave its language out"
        ) from error
