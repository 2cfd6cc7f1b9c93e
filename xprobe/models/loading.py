"""From the name of a model to a model and its tokenizer, ready to run."""

from __future__ import annotations

import importlib.util
import json
import re
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
from xprobe.models.checkpoint import PICKLES, Checkpoint, StoredTensor, check_plain
from xprobe.models.completeness import check_complete
from xprobe.models.gguf import saved_warnings
from xprobe.models.messages import quiet
from xprobe.models.sources import TOKENIZER_FILES, Source, location_and_options, resolve, unknown_model

__all__ = ["LoadedModel", "Source", "load", "load_config", "load_tokenizer", "pick_device", "resolve", "window"]

# model types by what they read besides text; ``architectures`` and the auto classes of transformers say the rest
_WITH_TEXT = ("vision_config", "audio_config", "vision_tower_config", "vit_config", "visual")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in evaluation mode, and its tokenizer."""

    source: Source
    model: Any
    tokenizer: Any
    window: int | None  # longest input in tokens; None if the model has no bound


def load(
    source: Source, execution: Execution | None = None, *, dtype: str = "auto", warnings: list[str] | None = None
) -> LoadedModel:
    """Loads weights and tokenizer; never runs code or unpickles weights unless ``execution`` asks for it.

    Parameters
    ----------
    source : Source
        From ``resolve``.
    execution : Execution, optional
        Device, device map, tensor parallelism, and what the model may run.
    dtype : str
        ``auto``: float32 on a CPU, the checkpoint's dtype elsewhere.
    warnings : list of str, optional
        Gets the warnings of transformers that may concern weights or tokens.

    Raises
    ------
    ModelError
        Says what is missing and where: weights, tokenizer, network, or a model that is not a causal decoder.
    UsageError
        The device cannot be used, or the model is to be shared among processes and there is but one.
    """
    import torch
    import transformers

    execution = execution or Execution()
    if execution.tensor_parallel and tensor_parallel.size() == 1:
        raise UsageError(
            "tensor_parallel is for `torchrun -m xprobe_cli run`, or inside of xprobe.models.tensor_parallel.lead()"
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
    new: list[str] = []
    with quiet(new), ExitStack() as undo:
        placing = _placing(execution, undo)
        try:
            model: Any
            info: dict[str, Any]
            model, info = transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                location,
                config=model_config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=None if execution.allow_pickle else True,
                ignore_mismatched_sizes=True,  # check_complete names them; transformers' own error does not
                output_loading_info=True,
                **options,
                **placing,
            )
        except ModelError:
            raise
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, ... for bad input
            raise ModelError(_explain(source, location, error)) from error
        weakref.finalize(model, undo.pop_all().close)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{source.name} is a quantised checkpoint: the lens needs plain weights; use the original model"
        )
    stored = _stored(source, location)
    frequencies = {name for name in stored if name.endswith("inv_freq")} - model.state_dict().keys()  # not reported
    check_complete(
        model,
        source.name,
        missing=info["missing_keys"],
        unexpected={*info["unexpected_keys"], *frequencies},
        mismatched=info["mismatched_keys"],
        config=model_config,
        read=lambda name: stored[name][...] if name in stored else None,
    )
    warnings += [message for message in new if message not in warnings]
    _check_tied(model)
    model = model.eval() if placing else model.to(device).eval()
    use_plain_experts(model)
    return LoadedModel(source, model, tokenizer, window(model.config))


def _stored(source: Source, location: str) -> Mapping[str, StoredTensor]:
    """The tensors of the checkpoint that was loaded; none where it is no folder with safetensors."""
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
    """Has a mixture of experts in fp64 compute expert by expert: transformers' fused products know no fp64."""
    import torch

    if model.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        with quiet():
            model.set_experts_implementation("eager")


def _placing(execution: Execution, undo: ExitStack) -> dict[str, Any]:
    """What tells transformers to spread a model over devices or processes; nothing if it is to be on one.

    Weights that are left on disk are read from the checkpoint; those that the checkpoint holds in another form
    (pickles, experts that are fused as they are loaded) are written to a folder, which ``undo`` removes.
    """
    if execution.tensor_parallel:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    if execution.device_map is None:
        return {}
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError("a device map needs the package accelerate: pip install accelerate")
    folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="xprobe-offload-", ignore_cleanup_errors=True))
    return {"device_map": execution.device_map, "offload_folder": folder}


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


def load_tokenizer(source: Source, trust_remote_code: bool = False, warnings: list[str] | None = None) -> Any:
    """The tokenizer that belongs to a model.

    Raises
    ------
    ModelError
        There is none, or it cannot be read.
    """
    import transformers

    warnings = [] if warnings is None else warnings
    location, options = location_and_options(source, trust_remote_code)
    if source.kind == "folder":
        _check_tokenizer_files(Path(location), source.name)

    def read(**more: Any) -> tuple[Any, list[str]]:
        said: list[str] = []
        with quiet(said):
            try:
                return transformers.AutoTokenizer.from_pretrained(location, **options, **more), said
            except Exception as error:  # as in load
                raise ModelError(_explain_tokenizer(source, error)) from error

    tokenizer, said = read()
    if any("fix_mistral_regex" in message for message in said):
        tokenizer, said = read(fix_mistral_regex=True)
        said.append(
            f"the tokenizer of {source.name} was saved with a wrong rule for splitting words, as early Mistral "
            "tokenizers were: it is used with the right one (fix_mistral_regex)"
        )
    warnings += [message for message in said if message not in warnings]
    return tokenizer


def load_config(source: Source, trust_remote_code: bool = False, warnings: list[str] | None = None) -> Any:
    """The model's configuration, refused if it is not that of a causal decoder with plain weights.

    Raises
    ------
    ModelError
        It cannot be read, is of another kind of model, or of a quantised one.
    """
    import transformers

    location, options = location_and_options(source, trust_remote_code)
    with quiet(warnings):
        try:
            model_config = transformers.AutoConfig.from_pretrained(location, **options)
        except Exception as error:  # as in load
            raise ModelError(_explain(source, location, error)) from error
    check_decoder(model_config, source.name)
    check_plain(model_config, source.name)
    return with_own_attention(model_config, warnings)


def with_own_attention(model_config: Any, warnings: list[str] | None = None) -> Any:
    """``model_config`` with transformers' default attention where it asks for a package's (flash attention).

    Which kernel computes the attention is no property of the weights, and those of packages know no float32.
    """
    asked = getattr(model_config, "_attn_implementation", None)
    if asked not in (None, "eager", "sdpa"):
        model_config._attn_implementation = None
        if warnings is not None:
            warnings.append(f"config.json asks for the attention {asked!r}: transformers' default is used in its place")
    return model_config


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


def check_decoder(config: Any, name: str) -> None:
    """Raises a ModelError that names the architecture if ``config`` is not of a decoder that predicts tokens."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}): xprobe reads decoder-only models")
    listed = getattr(config, "architectures", None)
    architectures = [str(entry) for entry in listed] if isinstance(listed, list) else []
    if not _is_causal(config) and any(getattr(config, part, None) is not None for part in _WITH_TEXT):
        raise ModelError(
            f"{name} reads images or sound besides text ({config.model_type}): the text decoder inside of it is not "
            "read yet. If its text part is published by itself, use that"
        )
    model_code_errors = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not _is_causal(config) or not (model_code_errors or not architectures or any(map(_predicts, architectures))):
        raise ModelError(
            f"{name} is not a causal decoder ({', '.join(architectures) or config.model_type}): "
            "xprobe reads models that predict the next token"
        )


def _is_causal(config: Any) -> bool:
    """Whether transformers, or the model's own code, has a causal language model for ``config``."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_code_errors = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return model_code_errors or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _predicts(architecture: str) -> bool:
    """Whether a class predicts the next token, by its name or by what transformers lists."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    heads = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    return architecture.endswith(heads) or architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _check_dtypes(checkpoint: Checkpoint, model_config: Any) -> None:
    """Refuses whole numbers in the place of weights: transformers would take them for weights."""
    from xprobe.models.placement import Placement, build_on_meta

    if any(not stored.dtype.is_floating_point for stored in checkpoint.values()):  # old buffers are, among others
        model = build_on_meta(model_config, model_config.dtype)
        Placement(model, checkpoint, {}, model.dtype, "cpu", model_config)


def _check_files(source: Source, location: str, allow_pickle: bool, model_config: Any) -> None:
    """Says what is wrong with a folder's weights before transformers does: damaged, cut off, missing or quantised."""
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
            f"{source.name} holds its weights in a pickle ({pickles[0]}), which can run code: --allow-pickle loads "
            "them all the same"
        )


def _check_tokenizer_files(folder: Path, name: str) -> None:
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(f"{name} holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...): save one into the folder")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / file
        try:
            if path.is_file():
                json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"cannot read {path} ({error}): save the tokenizer again") from error


def _explain(source: Source, location: str, error: Exception) -> str:
    reason = _one_line(error)
    if isinstance(error, KeyError):
        return f"cannot load {source.name}: its config.json asks for {reason}, which transformers does not know here"
    if source.kind == "hub" and ("not a valid model identifier" in reason or "couldn't connect" in reason):
        return unknown_model(source)
    if "trust_remote_code" in reason:
        return f"{source.name} brings its own code, which is not run unless you ask: --trust-remote-code"
    if "Weights only load failed" in reason:
        return f"cannot load {source.name}: its pickle is damaged, or holds something else than tensors"
    if "has no `tp_plan`" in reason:
        return (
            f"transformers cannot share {source.name} among processes: leave --tensor-parallel, try --device-map auto"
        )
    if source.kind == "hub" and re.search(r"no file named \S*(safetensors|\.bin)", reason):
        return (
            f"{source.name} has no weights in safetensors format on the hub. If it has them in a pickle, which can run "
            "code, --allow-pickle loads them all the same"
        )
    if "above report" in reason:
        return (
            f"cannot load {source.name}: transformers could not convert its tensors to those of "
            "the model in config.json: weights and configuration are not of the same model"
        )
    return f"cannot load {source.name}: {reason[:400]}"


def _explain_tokenizer(source: Source, error: Exception) -> str:
    reason = _one_line(error)
    if "trust_remote_code" in reason:
        return f"{source.name} brings its own code, which is not run unless you ask: --trust-remote-code"
    return (
        f"cannot read the tokenizer of {source.name} ({type(error).__name__}: {reason[:300]}): save it again, with the "
        "versions of transformers and tokenizers that are installed here"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
