"""Loads tensors of a checkpoint into a model on the meta device: those of one block, or all outside the blocks."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xprobe.errors import ModelError
from xprobe.models.block_io import describe_error
from xprobe.models.checkpoint import Checkpoint
from xprobe.models.completeness import check_complete
from xprobe.models.messages import quiet

OUTSIDE = (
    "",
    -1,
)  # owner of the tensors outside all blocks; the owner of a block's tensors is (name of its list, index)


def build_empty(
    config: Any, dtype: torch.dtype, device: str, *, trust_remote_code: bool = False, warnings: list[str] | None = None
) -> Any:
    """Builds the model of ``config`` in evaluation mode, with its parameters on the meta device.

    Buffers that are in no checkpoint (rotary frequencies, causal masks) are on ``device``. The model's own
    initialisation computes them.

    Raises
    ------
    ModelError
        transformers has no causal model for the configuration, or its code fails.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> model = build_empty(LlamaConfig(num_hidden_layers=1, **sizes), torch.float32, "cpu")
    >>> model.lm_head.weight.device, model.model.rotary_emb.inv_freq.device
    (device(type='meta'), device(type='cpu'))
    """
    from transformers import initialization

    with initialization.meta_device_safe_creation_ops():
        model = build_on_meta(config, dtype, trust_remote_code=trust_remote_code, warnings=warnings)
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                # uninitialised memory: values that the initialisation does not set show up in every state
                module._buffers[name] = torch.empty_like(buffer, device=device)
    for value in model.state_dict(keep_vars=True).values():
        value._is_hf_initialized = True  # so that transformers does not initialise it
    model.initialize_weights()
    return model.eval()


def build_on_meta(
    config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False, warnings: list[str] | None = None
) -> Any:
    """Builds the model of ``config`` with all parameters and buffers on the meta device.

    Raises
    ------
    ModelError
        transformers has no causal model for the configuration, or its code fails.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> model = build_on_meta(LlamaConfig(), torch.float32)
    >>> sum(value.numel() for value in model.parameters()) > 6e9, model.device
    (True, device(type='meta'))
    """
    import transformers

    try:
        with quiet(warnings), torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a bad configuration may raise any exception in the model's code
        reason = describe_error(error)
        raise ModelError(f"cannot build a model of type {config.model_type}: {reason}") from error


@dataclass
class _OwnerTensors:
    """The tensors of the checkpoint for one owner: plain tensors, and tensors that transformers converts."""

    plain: dict[str, str] = field(default_factory=dict)  # target -> stored name
    convert: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # target -> [(stored name, pattern)]

    @property
    def stored_names(self) -> list[str]:
        """Names in the checkpoint of all tensors."""
        return [*self.plain.values(), *(name for group in self.convert.values() for name, _ in group)]


class Placement:
    """Maps the tensors of a checkpoint to a model, with transformers' rules for renaming and conversion.

    Parameters
    ----------
    model : PreTrainedModel
        On the meta device.
    checkpoint : Checkpoint
    blocks : dict of str to ModuleList
        Candidates for the list of blocks, by name. ``load_outside`` does not load their tensors.
    dtype : torch.dtype
        The dtype of the loaded weights. transformers makes exceptions for some modules.
    device : str
    config : PreTrainedConfig, optional
        The configuration of the checkpoint.

    Raises
    ------
    ModelError
        The checkpoint has missing or unexpected tensors, or a tensor of a block is tied to another tensor.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        blocks: dict[str, nn.ModuleList],
        dtype: torch.dtype,
        device: str,
        config: Any = None,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation

        self.model, self.checkpoint, self.dtype, self.device = model, checkpoint, dtype, device
        self.config = config
        mapping = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        self._empty: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        plan = model._get_dtype_plan(dtype) or {}
        self._exceptions = build_glob_alternation(list(plan))[:2] if plan else None
        self._exception_dtypes = plan
        self._prefixes = {
            f"{name}.{index}.": (name, index) for name, modules in blocks.items() for index in range(len(modules))
        }
        self._owners: dict[tuple[str, int], _OwnerTensors] = {}
        self._filled: set[str] = set()
        self._unexpected: list[str] = []
        self._misshapen: list[tuple[str, Any, Any]] = []
        for name in _in_order(checkpoint):
            self._assign(name)
        self._check_complete()

    def nbytes(self, blocks: str) -> int:
        """Bytes of the stored tensors outside the blocks and in the list ``blocks``, each read once."""
        owners = [OUTSIDE, *(owner for owner in self._owners if owner[0] == blocks)]
        names = [name for owner in owners if owner in self._owners for name in self._owners[owner].stored_names]
        return sum(self.checkpoint[name].nbytes for name in names)

    def load_outside(self) -> None:
        """Loads the tensors outside the candidate lists, and ties the weights that the model ties.

        Raises
        ------
        ModelError
            A tensor has the wrong shape, or cannot be converted.
        """
        self._load(OUTSIDE)
        self.model.tie_weights(missing_keys=self._empty.keys() - self._filled, recompute_mapping=False)

    def load_block(self, blocks: str, index: int) -> None:
        """Loads the tensors of one block.

        Raises
        ------
        ModelError
            A tensor has the wrong shape, cannot be converted, or is missing.
        """
        self._load((blocks, index))
        block = self.model.get_submodule(f"{blocks}.{index}")
        empty = [name for name, value in block.state_dict().items() if value.is_meta]
        if empty:
            raise ModelError(f"{self.checkpoint.folder} has no tensor for {blocks}.{index}.{empty[0]}")

    def free_block(self, blocks: str, index: int) -> None:
        """Moves the parameters and stored buffers of a block back to the meta device."""
        for name in self.model.get_submodule(f"{blocks}.{index}").state_dict():
            self._set(f"{blocks}.{index}.{name}", self._empty[f"{blocks}.{index}.{name}"])

    def _load(self, owner: tuple[str, int]) -> None:
        share = self._owners.get(owner, _OwnerTensors())
        rules = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        for target, name in share.plain.items():
            self._put(target, self._reader(name, target)())
        for target, members in share.convert.items():
            rule = deepcopy(rules[members[0][1]])
            for name, pattern in members:
                rule.add_tensor(target, name, pattern, self._reader(name, target))
            try:
                made = rule.convert(target, model=self.model, config=self.model.config)
            except ModelError:
                raise
            except Exception as error:  # a conversion may raise any exception
                raise ModelError(f"cannot convert {members[0][0]} to {target}: {error}") from error
            for made_target, value in made.items():
                self._put(made_target, value[0] if isinstance(value, list) else value)
            del made

    def _assign(self, name: str) -> None:
        """Finds the target and the owner of a stored tensor."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._empty)
        if target not in self._empty and name in self._empty:
            target, pattern = rename_source_key(name, [], [], prefix, self._empty)
        if target not in self._empty:
            self._unexpected.append(target)
            return
        owner = next((self._prefixes[p] for p in _prefixes_of(target) if p in self._prefixes), OUTSIDE)
        share = self._owners.setdefault(owner, _OwnerTensors())
        stored_dtype, wanted_dtype = self.checkpoint[name].dtype, self._empty[target].dtype
        if wanted_dtype.is_floating_point and not stored_dtype.is_floating_point:
            raise ModelError(
                f"{self.checkpoint.folder}: {name} is stored as {str(stored_dtype).removeprefix('torch.')}, which is a "
                "quantised format, and its scales are unknown: use the original model"
            )
        if pattern is None:
            stored, wanted = self.checkpoint[name].shape, tuple(self._empty[target].shape)
            if stored != wanted:
                self._misshapen.append((target, stored, wanted))
            share.plain[target] = name
            self._filled.add(target)
            return
        share.convert.setdefault(target, []).append((name, pattern))
        rule = next(rule for rule in self._converters if pattern in rule.source_patterns)
        self._filled.update(target.replace(rule.target_patterns[0], other) for other in rule.target_patterns)

    def _check_complete(self) -> None:
        tied = dict(self.model.all_tied_weights_keys or {})
        inside = [
            name for pair in tied.items() for name in pair if any(p in self._prefixes for p in _prefixes_of(name))
        ]
        if inside:
            raise ModelError(
                f"{type(self.model).__name__} ties {inside[0]} to other weights: its blocks cannot be run one at a time"
            )
        present = {name for pair in tied.items() if self._filled & set(pair) for name in pair}
        for target, source in tied.items():  # three or more names of one weight have the same source
            if source in present:
                present.add(target)
        missing = self._empty.keys() - (self._filled | present)
        check_complete(
            self.model,
            str(self.checkpoint.folder),
            missing=missing,
            unexpected=self._unexpected,
            mismatched=self._misshapen,
            config=self.config,
            read=lambda name: self.checkpoint.read(name) if name in self.checkpoint else None,
        )

    def _reader(self, name: str, target: str) -> Any:
        dtype = self._dtype_of(target)
        stored = self.checkpoint[name]
        return lambda: stored[...].to(device=self.device, dtype=dtype)

    def _dtype_of(self, target: str) -> torch.dtype:
        if self._exceptions is not None:
            search, patterns = self._exceptions
            if (match := search.search(target)) is not None:
                return self._exception_dtypes[patterns[str(match.lastgroup)]]
        return self._empty[target].dtype

    def _put(self, target: str, value: Tensor) -> None:
        if target not in self._empty:
            raise ModelError(f"{type(self.model).__name__} has no place for the converted tensor {target}")
        wanted = self._empty[target].shape
        if value.shape != wanted:
            raise ModelError(
                f"{self.checkpoint.folder}: {target} has shape {list(value.shape)}, its config.json asks for "
                f"{list(wanted)}"
            )
        self._set(target, value if self._is_buffer(target) else nn.Parameter(value, requires_grad=False))

    def _is_buffer(self, name: str) -> bool:
        return not isinstance(self._empty[name], nn.Parameter)

    def _set(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        (module._buffers if leaf in module._buffers else module._parameters)[leaf] = value


def _in_order(names: Any) -> list[str]:
    """Names with their numbers in numeric order. Converters stack experts in this order."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def _prefixes_of(name: str) -> list[str]:
    """All prefixes of a dotted name.

    Examples
    --------
    >>> _prefixes_of("a.b.c")
    ['a.', 'a.b.']
    """
    parts = name.split(".")
    return [".".join(parts[:count]) + "." for count in range(1, len(parts))]
