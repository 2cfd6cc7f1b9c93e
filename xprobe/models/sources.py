"""Resolves the name of a model to a folder, a GGUF file, or an id on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xprobe.errors import ModelError, UsageError
from xprobe.models import gguf
from xprobe.models.completeness import MERGE
from xprobe.models.folder_checksum import folder_checksum
from xprobe.models.messages import quiet

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes
    ----------
    name : str
        The name that the user gave.
    kind : str
        ``folder``, ``gguf`` or ``hub``.
    location : str
        Path of the folder or file, or id on the hub.

    Examples
    --------
    >>> Source("org/model", "hub", "org/model").fingerprint()[:12]
    'c87c0c64d2fb'
    """

    name: str
    kind: str
    location: str

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the model's files.

        A GGUF file is covered whole; of a folder, what ``xprobe.models.folder_checksum.folder_checksum`` says. For a
        model on the hub it covers only the id.
        """
        if self.kind == "hub":
            return hashlib.sha256(self.location.encode()).hexdigest()
        path = Path(self.location)
        return gguf.checksum(path) if self.kind == "gguf" else folder_checksum(path)


def resolve(name: str) -> Source:
    """Finds the source of a model without loading it.

    Parameters
    ----------
    name : str
        An alias (``smollm2-135m``), a folder, a ``.gguf`` file, or an id on the hub.

    Returns
    -------
    Source

    Raises
    ------
    UsageError
        ``name`` is a path that does not exist, or cannot be the name of a model.
    ModelError
        The package of an alias is not installed, a folder has no config.json, or it holds an adapter.

    Examples
    --------
    >>> resolve("org/model")
    Source(name='org/model', kind='hub', location='org/model')
    >>> resolve("./nowhere")
    Traceback (most recent call last):
    ...
    xprobe.errors.UsageError: no model at './nowhere': no such file or folder
    """
    if not name.strip():
        raise UsageError("the name of the model is empty; `xprobe run` without a name takes the demo model")
    if name in gguf.ALIASES:
        return Source(name, "gguf", str(gguf.alias_path(name)))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"model {name!r} is a file but not a .gguf: give its folder instead")
        return Source(name, "gguf", str(path.resolve()))
    if path.is_dir():
        for file in (path / ADAPTER_CONFIG, *sorted(path.glob("adapter_model.*"))):
            if file.is_file():
                raise _adapter(file)
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json: expected a folder as written by save_pretrained")
        return Source(name, "folder", str(path.resolve()))
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")
    if looks_like_path or not name or any(c.isspace() for c in name):
        raise UsageError(f"no model at {name!r}: no such file or folder")
    return Source(name, "hub", name)


def location_and_options(source: Source, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """The first argument and the options of transformers' ``from_pretrained``.

    A GGUF file is converted first.

    Raises
    ------
    ModelError
        The hub cannot be reached and its cache does not hold the model, the model is an adapter, or a GGUF file cannot
        be converted.
    """
    location = source.location
    if source.kind == "gguf":
        location = str(gguf.convert(Path(source.location)))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.kind == "hub":
        if not hub_answers():
            if not in_hub_cache(location):
                raise ModelError(unknown_model(source))
            options["local_files_only"] = True
        _check_no_adapter_on_hub(location, bool(options.get("local_files_only")))
    return location, options


def local_folder(source: Source) -> Path:
    """The folder with the files of ``source``.

    Files on the hub are fetched, unless its cache holds them. A GGUF file is converted once, which needs memory for all
    of its weights.

    Raises
    ------
    ModelError
        The hub cannot be reached or has no such model, the model is an adapter, or a GGUF file cannot be converted.
    """
    if source.kind == "folder":
        return Path(source.location)
    if source.kind == "gguf":
        return gguf.convert(Path(source.location))
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.py", *TOKENIZER_FILES]
    options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["consolidated*", "original/*"]}
    with quiet():
        try:
            folder = Path(snapshot_download(source.location, local_files_only=not hub_answers(), **options))
        except Exception as error:  # huggingface_hub raises OSError, ValueError, HTTP errors, ... for bad input
            if not in_hub_cache(source.location):
                raise ModelError(unknown_model(source)) from error
            raise ModelError(f"cannot fetch {source.name}: {' '.join(str(error).split())[:400]}") from error
    if (folder / ADAPTER_CONFIG).is_file():
        raise _adapter(Path(source.name) / ADAPTER_CONFIG)
    return folder


def hub_answers() -> bool:
    """False if the hub's host name cannot be resolved. Requests would then retry for half a minute and fail."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def in_hub_cache(name: str) -> bool:
    """Whether the hub's cache holds the configuration of a model or an adapter."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", ADAPTER_CONFIG))
    except HFValidationError:
        return False


def unknown_model(source: Source) -> str:
    """The message for the name of an unknown model."""
    return (
        f"unknown model {source.name!r}: not an alias ({', '.join(gguf.ALIASES)}), no such folder or .gguf file here, "
        "and the Hugging Face hub does not answer or has no model of that name"
    )


def _check_no_adapter_on_hub(name: str, offline: bool) -> None:
    from transformers.utils import find_adapter_config_file

    with quiet():
        try:
            adapter_config = find_adapter_config_file(name, local_files_only=offline)
        except Exception:  # loading the model fails for the same reason, with a better message
            return
    if adapter_config is not None:
        raise _adapter(Path(name) / ADAPTER_CONFIG)


def _adapter(file: Path) -> ModelError:
    return ModelError(
        f"{file} makes this an adapter. xprobe reads no adapters, even beside their base weights: {MERGE}"
    )
