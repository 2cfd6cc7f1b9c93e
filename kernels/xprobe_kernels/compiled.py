"""rowpass.c, compiled on first use by the machine's own C compiler and kept in the cache folder.

``XPROBE_CC`` names the compiler (a name or a path; default: the first of cc, gcc, clang); ``none`` does without.
Without one, or where it fails, ``row_pass()`` is None and the tiles are read in plain torch, several times slower.
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
PATIENCE = 120  # seconds for the compiler, which takes well under one


class Tile(ctypes.Structure):
    """What rowpass.c reads and writes; its comments say what each field is."""

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
    """Reads a tile ``z`` [r, v]; other fields by name. Tensors must be dense and of the types that rowpass.c gives."""
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
    """The compiled function; None where there is none, with one warning if a compiler is there and failed."""
    if os.name != "posix":
        return None
    asked = os.environ.get("XPROBE_CC")
    if asked == "none":
        return None
    compiler = next(filter(None, map(shutil.which, [asked] if asked else COMPILERS)), None)
    try:
        if compiler is None:
            if asked:
                raise FileNotFoundError(f"XPROBE_CC is {asked!r}, and there is no such program")
            return None
        return _build(compiler)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            f"the compiled lens is not available, slower code takes its place (XPROBE_CC=none: without this warning): "
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
    """From the cache if it was compiled before, for this source by this compiler on such a processor; else anew."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=PATIENCE, check=True)
    # clang's OpenMP would be a second pool of threads beside torch's libgomp: its rows are read by one thread
    threads = "-fopenmp-simd" if "clang" in version.stdout else "-fopenmp"
    key = hashlib.sha256()
    for part in (SOURCE.read_text(), *FLAGS, threads, version.stdout, _processor()):
        key.update(part.encode() + b"\0")
    path = cache_folder() / f"rowpass-{key.hexdigest()[:24]}.so"
    if _is_whole(path):
        with contextlib.suppress(OSError, AttributeError):  # made on another machine that shares the folder
            return _load(path)
    with tempfile.TemporaryDirectory(prefix="xprobe-") as folder:
        made = Path(folder, "rowpass.so")
        command = [compiler, *FLAGS, threads, "-o", str(made), str(SOURCE), "-lm"]
        subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
        library = made.read_bytes()
        return _load(path if _keep(path, library + hashlib.sha256(library).digest()) else made)


def _is_whole(path: Path) -> bool:
    """Whether the library ends in its own digest: to load half of one can kill the process."""
    try:
        library = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(library[:-DIGEST]).digest() == library[-DIGEST:]


def _keep(path: Path, library: bytes) -> bool:
    """Writes a cache file whole or not at all, as others may do at once; False where the folder cannot be used."""
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
    """Name and abilities of the processor: what ``-march=native`` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    telling = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part", "isa")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))
