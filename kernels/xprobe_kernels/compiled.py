"""Compiles rowpass.c on first use with the machine's C compiler, and keeps the library in the cache folder.

The environment variable ``XPROBE_CC`` names the compiler, by name or path. The default is the first of cc, gcc and
clang that exists. ``none`` turns the compiled code off. If there is no compiler or it fails, ``row_pass()`` is None,
and plain torch reads the tiles, several times slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("rowpass.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
DIGEST = hashlib.sha256().digest_size
TIMEOUT = 120  # seconds for the compiler; compiling takes less than one


class Tile(ctypes.Structure):
    """The struct that rowpass.c reads and writes. Comments there describe each field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width", "start", "lookups", "top_k", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("z", "bias", "lookup", "threshold", "above", "top_logits", "top_ids", "peak", "exp", "exp_z"),
                *("rescale", "final_of", "final_weights", "final_rescale", "final_before", "cross"),
            )
        ),
    )


RowPass = Callable[[Tile], None]


def run(row_pass: RowPass, z: Tensor, **fields: Tensor | float | None) -> None:
    """Reads a tile ``z`` [r, v]. Other fields by name; tensors must be dense and have the types in rowpass.c."""
    tile = Tile(rows=z.shape[0], width=z.shape[1], threads=torch.get_num_threads())
    for name, value in (fields | {"z": z}).items():
        if isinstance(value, Tensor):
            assert value.is_contiguous(), name
            setattr(tile, name, value.data_ptr())
        elif value is not None:
            setattr(tile, name, value)
    row_pass(tile)


@functools.cache
def row_pass() -> RowPass | None:
    """The compiled function, or None. Warns once if there is a compiler and it fails."""
    if os.name != "posix":
        return None
    named_compiler = os.environ.get("XPROBE_CC")
    if named_compiler == "none":
        return None
    compiler = next(filter(None, map(shutil.which, [named_compiler] if named_compiler else COMPILERS)), None)
    try:
        if compiler is None:
            if named_compiler:
                raise FileNotFoundError(f"XPROBE_CC is {named_compiler!r}, but there is no such program")
            return None
        return _build(compiler)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            f"the compiled lens is not available, slower code replaces it (XPROBE_CC=none turns this warning off): "
            f"{str(reason).strip()[:500]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def cache_folder() -> Path:
    """``kernels`` in ``$XPROBE_CACHE`` if set, else in ``$XDG_CACHE_HOME/xprobe``, else in ``~/.cache/xprobe``."""
    named = os.environ.get("XPROBE_CACHE")
    if named:
        return Path(named).expanduser() / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "xprobe" / "kernels"


def _build(compiler: str) -> RowPass:
    """Loads the library from the cache, or compiles it. Its key: source, flags, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    # clang's OpenMP would start a second pool of threads beside torch's libgomp, so clang's code uses one thread
    threads = "-fopenmp-simd" if "clang" in version.stdout else "-fopenmp"
    key = hashlib.sha256()
    for part in (SOURCE.read_text(), *FLAGS, threads, version.stdout, _processor()):
        key.update(part.encode() + b"\0")
    path = cache_folder() / f"rowpass-{key.hexdigest()[:24]}.so"
    if _is_complete(path):
        with contextlib.suppress(
            OSError, AttributeError
        ):  # the file may come from another machine that shares the folder
            return _load(path)
    with tempfile.TemporaryDirectory(prefix="xprobe-") as folder:
        compiled = Path(folder, "rowpass.so")
        command = [compiler, *FLAGS, threads, "-o", str(compiled), str(SOURCE), "-lm"]
        subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        library = compiled.read_bytes()
        return _load(path if _write_cache(path, library + hashlib.sha256(library).digest()) else compiled)


def _is_complete(path: Path) -> bool:
    """Whether the file ends with its own digest. Loading a damaged library can kill the process."""
    try:
        library = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(library[:-DIGEST]).digest() == library[-DIGEST:]


def _write_cache(path: Path, library: bytes) -> bool:
    """Writes a cache file atomically, as other processes may write it too. False if the folder cannot be written."""
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=path.stem, dir=path.parent)
        with open(handle, "wb") as file:
            file.write(library)
        os.replace(name, path)
    except OSError:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        return False
    return True


def _load(path: Path) -> RowPass:
    function = ctypes.CDLL(str(path)).xprobe_row_pass
    function.argtypes, function.restype = [ctypes.POINTER(Tile)], None
    return lambda tile: function(ctypes.byref(tile))


def _processor() -> str:
    """Name and features of the processor, on which the code of ``-march=native`` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    keys = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part", "isa")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)}))
