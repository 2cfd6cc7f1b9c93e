"""Compares the header of a GGUF file with the model that transformers made of it.

transformers reads a fixed list of keys and tensors from a GGUF file and ignores all others without a warning. A key
that it ignores can change every logit: rotary frequencies (the tensor ``rope_freqs.weight`` of Llama 3.1 and later),
context scaling, windows, soft-caps. This module applies an ignored key if it can do so exactly. Otherwise it refuses
the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xprobe.errors import ModelError

FREQUENCIES = "rope_freqs.weight"

# keys that change what a model computes, unless they have a neutral value
_MATTERS = re.compile(
    r"scal|soft_?cap|sliding_window|clamp|epsilon|gating|weights_norm|temperature|alibi|freq_base|multiplier"
)
# keys on the origin of a scaling; they change nothing
_ORIGIN = re.compile(r"rope\.scaling\.(finetuned|original_context_length)$")
# rules for splitting words that equal GPT-2's rule, or give the same tokens with the vocabulary of their only model
_SAME_AS_GPT2 = ("default", "gpt-2", "gpt2", "smollm")
_NEUTRAL = (None, "none", False, 0, 0.0, 1.0)
# last part of a key -> name of the same entry in transformers' configurations
_NAMES = {
    "scale": "attention_multiplier", "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
    "freq_base": "rope_theta", "layer_norm_rms_epsilon": "rms_norm_eps", "layer_norm_epsilon": "layer_norm_eps",
    "expert_weights_norm": "norm_topk_prob", "expert_weights_scale": "routed_scaling_factor",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Header:
    """Keys and tensors of a GGUF file.

    Attributes
    ----------
    keys : dict
        The keys of the architecture (without its name as prefix) and their values.
    sizes : dict of str to int
        Number of values in each tensor.
    frequencies : float array [head_dim / 2], optional
        The divisor of each rotary frequency.
    splitting : str, optional
        The rule for splitting words of a byte-level tokenizer, by its name in llama.cpp.

    Examples
    --------
    >>> from xprobe.models.gguf import alias_path
    >>> header = Header.read(alias_path("smollm2-135m"))  # doctest: +SKIP
    >>> header.architecture, header.keys["block_count"]   # doctest: +SKIP
    ('llama', 30)
    """

    path: Path
    architecture: str
    keys: dict[str, Any]
    sizes: dict[str, int]
    frequencies: NDArray[np.float32] | None
    splitting: str | None

    @classmethod
    def read(cls, path: Path) -> Header:
        """Reads the header of a GGUF file.

        Raises
        ------
        ModelError
            The package gguf is missing, or the file is damaged.
        """
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ModelError(
                f"reading {path.name} needs the gguf extra: pip install 'xprobe[gguf]' ({error})"
            ) from error
        try:
            reader = GGUFReader(str(path))
            architecture = str(reader.fields["general.architecture"].contents())
            own = architecture + "."
            keys = {
                name.removeprefix(own): field.contents()
                for name, field in reader.fields.items()
                if name.startswith(own)
            }
            sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
            stored = next((tensor for tensor in reader.tensors if tensor.name == FREQUENCIES), None)
            frequencies = None if stored is None else np.array(stored.data, dtype=np.float32).ravel()
            tokenizer = {
                name: reader.fields[name].contents()
                for name in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
                if name in reader.fields
            }
            byte_level = tokenizer.get("tokenizer.ggml.model") == "gpt2"
            splitting = str(tokenizer.get("tokenizer.ggml.pre", "default")) if byte_level else None
        except Exception as error:  # a broken file ends in many kinds of errors inside the reader
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ModelError(f"cannot read {path}: it is cut off or damaged ({reason})") from error
        return cls(path, architecture, keys, sizes, frequencies, splitting)

    def warnings(self) -> list[str]:
        """Warnings about a rule for splitting words that transformers does not know."""
        try:
            from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
        except ImportError:  # older versions use the rule of the tokenizer's class
            return []
        if self.splitting is None or self.splitting in GGUF_PRE_TOKENIZER_SPLITS or self.splitting in _SAME_AS_GPT2:
            return []
        return [
            f"{self.path.name} splits words by the rule {self.splitting!r}, which transformers does not know for GGUF "
            "files: GPT-2's rule is used, so some tokens may differ from those of the training. Use the original model "
            "if that matters"
        ]

    def apply(self, model: Any) -> None:
        """Adds the keys that transformers ignored to the configuration of ``model``.

        The caller must create the model again from its configuration, because the constructor computes the rotary
        frequencies.

        Raises
        ------
        ModelError
            The file has tensors or keys that cannot be applied. The message names them.
        """
        self._check_tensors(model)
        if self.keys.get("attention.causal") is False:
            raise ModelError(
                f"{self.path.name} is a model that looks at later tokens ({self.architecture}.attention.causal = "
                "false): xprobe reads models that predict the next token"
            )
        applied = self._apply_rotary(model.config)
        known = _keys_that_transformers_reads(self.path, self.architecture)
        ignored = {
            key: value
            for key, value in self.keys.items()
            if key not in known | applied and _MATTERS.search(key) and not _ORIGIN.search(key) and value not in _NEUTRAL
        }
        lost = [
            f"{self.architecture}.{key} = {value}"
            for key, value in ignored.items()
            if not _has_entry(model, key, value)
        ]
        if lost:
            raise ModelError(
                f"{self.path.name} has settings that transformers does not read from GGUF files ({'; '.join(lost[:3])}"
                f"{'; ...' if len(lost) > 3 else ''}), so the results would be wrong: use the original model"
            )

    def _check_tensors(self, model: Any) -> None:
        """Refuses a file that has more or fewer values than the model."""
        values = {value.data_ptr(): value.numel() for value in model.state_dict().values() if value.numel()}
        in_file = sum(size for name, size in self.sizes.items() if name != FREQUENCIES)
        if in_file == sum(values.values()):
            return
        unused = _unused_tensors(model, self.sizes)
        named = f" ({', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''})" if unused else ""
        raise ModelError(
            f"{self.path.name} holds tensors that transformers does not read from GGUF files{named}: {in_file} values "
            f"in the file, {sum(values.values())} in the model. The results would be wrong: use the original model"
        )

    def _apply_rotary(self, config: Any) -> set[str]:
        """Sets the rotary frequencies of the file in ``config`` and returns the keys that are applied."""
        kind, factor = self.keys.get("rope.scaling.type"), self.keys.get("rope.scaling.factor")
        linear = kind == "linear" or (kind is None and factor not in _NEUTRAL)
        if self.frequencies is None and not linear:
            return set()
        before = dict(getattr(config, "rope_parameters", None) or {})
        if before.get("rope_type") != "default" or (self.frequencies is not None and kind not in (None, "none")):
            return set()  # the combination has no known meaning, so `apply` refuses it
        if self.frequencies is None:
            config.rope_parameters = {**before, "rope_type": "linear", "factor": float(factor or 1.0)}
            return {"rope.scaling.type", "rope.scaling.factor"}
        factors = [float(value) for value in self.frequencies]
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if len(factors) != head_width // 2 or not all(0 < value < float("inf") for value in factors):
            raise ModelError(
                f"{self.path.name}: {FREQUENCIES} must hold {head_width // 2} numbers above 0, one for each rotary "
                f"frequency, and holds {len(factors)}{'' if len(factors) != head_width // 2 else ', not all above 0'}"
            )
        # longrope takes a divisor for each frequency; with two equal lists it applies them at every length
        config.rope_parameters = {
            **before, "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0,
            "attention_factor": 1.0, "original_max_position_embeddings": config.max_position_embeddings,
        }  # fmt: skip
        return set()


class _RecordingDict(dict[str, Any]):
    """A dictionary that records which of its keys are read."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)


def _keys_that_transformers_reads(path: Path, architecture: str) -> set[str]:
    """The keys of the architecture that transformers reads from a GGUF file."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    def plain(name: str) -> str:
        return name.replace("-", "").replace("_", "")

    tables: dict[str, Any] = GGUF_CONFIG_MAPPING
    mappings = [keys for name, keys in tables.items() if plain(name) == plain(architecture)]
    known = {key for keys in mappings for key, target in keys.items() if target not in (None, -1)}
    if plain(architecture) == "gptoss":  # of its mapping, transformers reads only the rotary scaling
        known |= {"rope.scaling.type", "rope.scaling.factor"}
    try:  # newer versions create some configurations with a function
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
        from transformers.integrations.gguf.reader import read_gguf_metadata
    except ImportError:
        return known
    if architecture not in GGUF_CONFIG_ARCHS:
        return known
    metadata, tensors = read_gguf_metadata(str(path))
    recorder = _RecordingDict(metadata)
    GGUF_CONFIG_ARCHS[architecture](recorder, tensors)
    return known | {key.removeprefix(f"{architecture}.") for key in recorder.keys_read}


def _has_entry(model: Any, key: str, value: Any) -> bool:
    """Whether the model's configuration already has this value."""
    leaf = key.rpartition(".")[2]
    text = model.config.get_text_config(decoder=True)
    own = getattr(text, _NAMES.get(leaf, leaf), None)
    if own is None:
        own = (getattr(text, "rope_parameters", None) or {}).get(_NAMES.get(leaf, leaf))
    if isinstance(own, int | float) and isinstance(value, int | float):
        return abs(own - value) <= 1e-6 * max(abs(own), abs(value))
    return own is not None and own == value


def _unused_tensors(model: Any, sizes: dict[str, int]) -> list[str]:
    """Tensors of the file that transformers does not map to the model. Empty if transformers has no such list."""
    try:
        from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

        known = set(get_gguf_hf_weights_map(model, TensorProcessor(config={})))
    except Exception:  # the names only add detail to the message
        return []
    return sorted(name for name in sizes if name not in known and name != FREQUENCIES)
