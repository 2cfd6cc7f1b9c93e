"""What a GGUF file says of its model, held against what transformers made of it.

transformers takes a fixed list of keys and tensors from a GGUF file and drops the rest without a word. What it drops
can change every logit: rotary frequencies (the tensor ``rope_freqs.weight`` of Llama 3.1 and later), context scaling,
windows, soft-caps. What is dropped is applied here where that is exact, and refused by name elsewhere.
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

# keys that change what a model computes, if their value is not the neutral one
_MEANS = re.compile(
    r"scal|soft_?cap|sliding_window|clamp|epsilon|gating|weights_norm|temperature|alibi|freq_base|multiplier"
)
# keys that say how a scaling came about, not what it is
_TELLS = re.compile(r"rope\.scaling\.(finetuned|original_context_length)$")
# rules for splitting words that are GPT-2's, or give the same tokens with the vocabulary of their only model
_AS_GPT2 = ("default", "gpt-2", "gpt2", "smollm")
_NEUTRAL = (None, "none", False, 0, 0.0, 1.0)
# under which name transformers' configurations hold a key whose last part is another one
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
        Numbers, texts and truth values by name; of the architecture's own keys, without its name before them.
    sizes : dict of str to int
        Numbers in each tensor.
    frequencies : float array [head_dim / 2], optional
        What each rotary frequency is divided by.
    """

    path: Path
    architecture: str
    keys: dict[str, Any]
    sizes: dict[str, int]
    frequencies: NDArray[np.float32] | None
    splitting: str | None  # the rule by which a byte-level tokenizer splits words, by its name in llama.cpp

    @classmethod
    def read(cls, path: Path) -> Header:
        """
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
            found = next((tensor for tensor in reader.tensors if tensor.name == FREQUENCIES), None)
            frequencies = None if found is None else np.array(found.data, dtype=np.float32).ravel()
            tokenizer = {
                name: reader.fields[name].contents()
                for name in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
                if name in reader.fields
            }
            byte_level = tokenizer.get("tokenizer.ggml.model") == "gpt2"
            splitting = str(tokenizer.get("tokenizer.ggml.pre", "default")) if byte_level else None
        except Exception as error:  # a broken file ends in many kinds of errors inside the reader
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ModelError(f"cannot read {path}: cut off or damaged ({reason})") from error
        return cls(path, architecture, keys, sizes, frequencies, splitting)

    def warnings(self) -> list[str]:
        """What transformers reads otherwise than the file means it, where that cannot be told from numbers."""
        try:
            from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
        except ImportError:  # older versions split as the tokenizer's class does
            return []
        if self.splitting is None or self.splitting in GGUF_PRE_TOKENIZER_SPLITS or self.splitting in _AS_GPT2:
            return []
        return [
            f"{self.path.name} splits words by the rule {self.splitting!r}, which transformers does not know for GGUF "
            "files: GPT-2's rule is used, so some tokens may be others than the model was trained on. Use the original "
            "model where that matters"
        ]

    def apply(self, model: Any) -> None:
        """Gives the configuration of ``model`` what transformers dropped, and refuses what cannot be given to it.

        The model is to be made anew from its configuration afterwards: its rotary frequencies are computed once.

        Raises
        ------
        ModelError
            Names tensors and keys of the file that the model would be without.
        """
        self._check_tensors(model)
        if self.keys.get("attention.causal") is False:
            raise ModelError(
                f"{self.path.name} is of a model that looks at later tokens ({self.architecture}.attention.causal = "
                "false): xprobe reads models that predict the next token"
            )
        applied = self._apply_rotary(model.config)
        taken = _taken_keys(self.path, self.architecture)
        dropped = {
            key: value
            for key, value in self.keys.items()
            if key not in taken | applied and _MEANS.search(key) and not _TELLS.search(key) and value not in _NEUTRAL
        }
        lost = [
            f"{self.architecture}.{key} = {value}" for key, value in dropped.items() if not _holds(model, key, value)
        ]
        if lost:
            raise ModelError(
                f"{self.path.name} has settings that transformers does not read from GGUF files ({'; '.join(lost[:3])}"
                f"{'; ...' if len(lost) > 3 else ''}), so its numbers would be another model's: use the original model"
            )

    def _check_tensors(self, model: Any) -> None:
        """Every number of the file must have its place in the model: conversion moves numbers, and drops none."""
        values = {value.data_ptr(): value.numel() for value in model.state_dict().values() if value.numel()}
        in_file = sum(size for name, size in self.sizes.items() if name != FREQUENCIES)
        if in_file == sum(values.values()):
            return
        unused = _unused_tensors(model, self.sizes)
        named = f" ({', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''})" if unused else ""
        raise ModelError(
            f"{self.path.name} holds tensors that transformers does not read from GGUF files{named}: {in_file} numbers "
            f"in the file, {sum(values.values())} in the model. Its numbers would be another model's: use the original"
        )

    def _apply_rotary(self, config: Any) -> set[str]:
        """Rotary frequencies as the file has them; the keys that are dealt with."""
        kind, factor = self.keys.get("rope.scaling.type"), self.keys.get("rope.scaling.factor")
        linear = kind == "linear" or (kind is None and factor not in _NEUTRAL)
        if self.frequencies is None and not linear:
            return set()
        before = dict(getattr(config, "rope_parameters", None) or {})
        if before.get("rope_type") != "default" or (self.frequencies is not None and kind not in (None, "none")):
            return set()  # what it means beside the other setting is not known: refused by name
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
        # the rule of transformers that takes a divisor for each frequency; with one list it does so at any length
        config.rope_parameters = {
            **before, "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0,
            "attention_factor": 1.0, "original_max_position_embeddings": config.max_position_embeddings,
        }  # fmt: skip
        return set()


class _Asked(dict[str, Any]):
    """A dictionary that knows which of its keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.keys_asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)


def _taken_keys(path: Path, architecture: str) -> set[str]:
    """Keys of the architecture that transformers takes over."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    def plain(name: str) -> str:
        return name.replace("-", "").replace("_", "")

    tables: dict[str, Any] = GGUF_CONFIG_MAPPING
    mappings = [keys for name, keys in tables.items() if plain(name) == plain(architecture)]
    taken = {key for keys in mappings for key, target in keys.items() if target not in (None, -1)}
    if plain(architecture) == "gptoss":  # its rotary scaling alone is read
        taken |= {"rope.scaling.type", "rope.scaling.factor"}
    try:  # newer versions make some configurations by a function
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
        from transformers.integrations.gguf.reader import read_gguf_metadata
    except ImportError:
        return taken
    if architecture not in GGUF_CONFIG_ARCHS:
        return taken
    metadata, tensors = read_gguf_metadata(str(path))
    asked = _Asked(metadata)
    GGUF_CONFIG_ARCHS[architecture](asked, tensors)
    return taken | {key.removeprefix(f"{architecture}.") for key in asked.keys_asked}


def _holds(model: Any, key: str, value: Any) -> bool:
    """Whether the model's configuration has this value of its own accord."""
    leaf = key.rpartition(".")[2]
    text = model.config.get_text_config(decoder=True)
    own = getattr(text, _NAMES.get(leaf, leaf), None)
    if own is None:
        own = (getattr(text, "rope_parameters", None) or {}).get(_NAMES.get(leaf, leaf))
    if isinstance(own, int | float) and isinstance(value, int | float):
        return abs(own - value) <= 1e-6 * max(abs(own), abs(value))
    return own is not None and own == value


def _unused_tensors(model: Any, sizes: dict[str, int]) -> list[str]:
    """Tensors of the file for which transformers knows no place in the model, as far as it says."""
    try:
        from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

        known = set(get_gguf_hf_weights_map(model, TensorProcessor(config={})))
    except Exception:  # only for the message: what it cannot say is left out of it
        return []
    return sorted(name for name in sizes if name not in known and name != FREQUENCIES)
