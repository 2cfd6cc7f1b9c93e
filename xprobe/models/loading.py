"""From the name of a model to a model and its tokenizer, ready to run."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import socket
import tempfile
import urllib.parse
import urllib.request
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xprobe.config import StudyConfig
from xprobe.errors import ModelError, UsageError
from xprobe.models import gguf, team
from xprobe.models.quiet import quiet

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


# weights, configuration, tokenizers in all their forms, and code that a model brings
FINGERPRINTED = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".tiktoken", ".spm", ".vocab", ".py"}


@dataclass(frozen=True)
class Source:
    """Where a model comes from. ``kind`` is ``folder``, ``gguf`` or ``hub``; ``location`` its path or id."""

    name: str
    kind: str
    location: str

    def fingerprint(self) -> str:
        """SHA-256 that changes when the files do: whole small files; name, size, head and tail of large ones."""
        if self.kind == "hub":
            return hashlib.sha256(self.location.encode()).hexdigest()
        path = Path(self.location)
        if self.kind == "gguf":
            return gguf.checksum(path)
        digest = hashlib.sha256()
        for file in sorted(p for p in path.iterdir() if p.suffix in FINGERPRINTED):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as handle:
                digest.update(handle.read(1 << 20))
                handle.seek(max(file.stat().st_size - (1 << 20), 0))
                digest.update(handle.read(1 << 20))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in evaluation mode, and its tokenizer."""

    source: Source
    model: Any
    tokenizer: Any
    window: int | None  # longest input in tokens; None if the model has no bound


def resolve(name: str) -> Source:
    """Finds what ``name`` stands for, without loading it.

    Raises
    ------
    UsageError
        ``name`` is a path that does not exist, or cannot be the name of a model.
    ModelError
        The alias is known and its package is not installed; or a folder without config.json.
    """
    if not name.strip():
        raise UsageError("the name of the model is empty; `xprobe run` without one takes the demo model")
    if name in gguf.ALIASES:
        return Source(name, "gguf", str(gguf.find_alias(name)))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"model {name!r} is a file but not a .gguf: give its folder instead")
        return Source(name, "gguf", str(path.resolve()))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json: expected a folder as written by save_pretrained")
        return Source(name, "folder", str(path.resolve()))
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")
    if looks_like_path or not name or any(c.isspace() for c in name):
        raise UsageError(f"no model at {name!r}: no such file or folder")
    return Source(name, "hub", name)


def load(source: Source, config: StudyConfig) -> LoadedModel:
    """Loads weights and tokenizer; never runs code or unpickles weights unless ``config`` asks for it.

    Raises
    ------
    ModelError
        Says what is missing and where: weights, tokenizer, network, or a model that is not a causal decoder.
    UsageError
        The device cannot be used, or the model is to be shared among processes and there is but one.
    """
    import torch
    import transformers

    if config.tensor_parallel and team.size() == 1:
        raise UsageError("tensor_parallel is for `torchrun -m xprobe_cli run`, or inside of xprobe.models.team.lead()")
    location, options = _where(source, config)
    team.tell("open")
    device = pick_device(config.device)
    dtype = config.dtype
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    with quiet(), ExitStack() as undo:
        placing = _placing(config, undo)
        try:
            model_config = transformers.AutoConfig.from_pretrained(location, **options)
            check_decoder(model_config, source.name)
            team.check_heads(model_config, source.name)
            tokenizer = load_tokenizer(source, config)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                location,
                config=model_config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=None if config.allow_pickle else True,
                **options,
                **placing,
            )
        except ModelError:
            raise
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, ... for bad input
            raise ModelError(_explain(source, error)) from error
        weakref.finalize(model, undo.pop_all().close)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{source.name} is a quantised checkpoint: the lens needs plain weights; use the original model"
        )
    _check_tied(model)
    model = model.eval() if placing else model.to(device).eval()
    return LoadedModel(source, model, tokenizer, window(model.config))


def _placing(config: StudyConfig, undo: ExitStack) -> dict[str, Any]:
    """What tells transformers to spread a model over devices or processes; nothing if it is to be on one.

    Weights that are left on disk are read from the checkpoint; those that the checkpoint holds in another form
    (pickles, experts that are fused as they are loaded) are written to a folder, which ``undo`` removes.
    """
    if config.tensor_parallel:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    if config.device_map is None:
        return {}
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError("a device map needs the package accelerate: pip install accelerate")
    folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="xprobe-offload-", ignore_cleanup_errors=True))
    return {"device_map": config.device_map, "offload_folder": folder}


def _check_tied(model: Any) -> None:
    """Refuses a device map that puts one of two names of the same weights on disk: it could not be read back."""
    rules = getattr(model, "hf_device_map", {})

    def place(weight: str) -> Any:
        names = [name for name in rules if not name or weight == name or weight.startswith(name + ".")]
        return rules[max(names, key=len)] if names else None

    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        if place(one) != place(other) and "disk" in (place(one), place(other)):
            raise ModelError(
                f"{one} and {other} are the same weights, but device_map puts one on {place(one)} and the other on "
                f"{place(other)}: give both modules the same place"
            )


def load_tokenizer(source: Source, config: StudyConfig) -> Any:
    """The tokenizer that belongs to a model.

    Raises
    ------
    ModelError
        There is none, or it cannot be read.
    """
    import transformers

    location, options = _where(source, config)
    if source.kind == "folder":
        _check_folder(Path(location), source.name)
    with quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(location, **options)
        except Exception as error:  # as above
            raise ModelError(_explain(source, error)) from error


def load_config(source: Source, config: StudyConfig) -> Any:
    """The model's configuration, refused if it is not that of a causal decoder.

    Raises
    ------
    ModelError
        It cannot be read, or is of another kind of model.
    """
    import transformers

    location, options = _where(source, config)
    with quiet():
        try:
            found = transformers.AutoConfig.from_pretrained(location, **options)
        except Exception as error:  # as above
            raise ModelError(_explain(source, error)) from error
    check_decoder(found, source.name)
    return found


def _where(source: Source, config: StudyConfig) -> tuple[str, dict[str, Any]]:
    """What transformers is to load from, and how."""
    location = source.location
    if source.kind == "gguf":
        location = str(gguf.converted(Path(source.location)))
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if source.kind == "hub" and not _hub_answers():
        if not _in_hub_cache(location):
            raise ModelError(_unknown(source))
        options["local_files_only"] = True
    return location, options


def pick_device(name: str) -> str:
    """``auto``: the first accelerator that torch sees, else the CPU."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise UsageError(
            f"device {name!r} cannot be used here: {first_line}. `xprobe doctor` lists what works"
        ) from error
    return name


def window(config: Any) -> int | None:
    """Longest input in tokens by the model's configuration; None for models without a bound (ALiBi, for one)."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def local_folder(source: Source) -> Path:
    """Folder with the files of ``source``; those of a model on the hub are fetched, unless the cache has them, and a
    GGUF file is converted (which takes memory for all of its weights, once).

    Raises
    ------
    ModelError
        The hub does not answer or has no such model, or a GGUF file cannot be converted.
    """
    if source.kind == "folder":
        return Path(source.location)
    if source.kind == "gguf":
        return gguf.converted(Path(source.location))
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.py", *TOKENIZER_FILES]
    options: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": ["consolidated*", "original/*"]}
    with quiet():
        try:
            return Path(snapshot_download(source.location, local_files_only=not _hub_answers(), **options))
        except Exception as error:  # huggingface_hub raises OSError, ValueError, HTTP errors, ... for bad input
            if not _in_hub_cache(source.location):
                raise ModelError(_unknown(source)) from error
            raise ModelError(_explain(source, error)) from error


def check_decoder(config: Any, name: str) -> None:
    """Raises a ModelError that names the architecture if ``config`` is not of a decoder that predicts tokens."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}): xprobe reads decoder-only models")
    architectures = getattr(config, "architectures", None) or []
    heads = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if architectures and not any(a.endswith(heads) for a in architectures):
        raise ModelError(
            f"{name} is not a causal decoder ({', '.join(architectures)}): "
            "xprobe reads models that predict the next token"
        )


def _check_folder(folder: Path, name: str) -> None:
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(f"{name} holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...): save one into the folder")


def _hub_answers() -> bool:
    """False where the hub's name cannot be looked up: asking it would only mean half a minute of retries."""
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


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _unknown(source: Source) -> str:
    return (
        f"unknown model {source.name!r}: not an alias ({', '.join(gguf.ALIASES)}), no such folder or .gguf file here, "
        "and the Hugging Face hub does not answer or has no model of that name"
    )


def _explain(source: Source, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if source.kind == "hub" and ("not a valid model identifier" in reason or "couldn't connect" in reason):
        return _unknown(source)
    if re.search(r"no file named \S*safetensors", reason) and not isinstance(error, ImportError):
        reason += ". Weights in a pickle can run code: --allow-pickle loads them all the same"
    if "trust_remote_code" in reason:
        return f"{source.name} brings its own code, which is not run unless you ask: --trust-remote-code"
    if "has no `tp_plan`" in reason:
        return (
            f"transformers cannot share {source.name} among processes: leave --tensor-parallel, try --device-map auto"
        )
    return f"cannot load {source.name}: {reason[:400]}"
