"""Puts a checkpoint's tensors where a model on the meta device wants them, one block or everything else at a time."""

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

OUTSIDE = ("", -1)  # owner of what belongs to no block; a block's is (name of its list, index)


def build_empty(
    config: Any, dtype: torch.dtype, device: str, *, trust_remote_code: bool = False, warnings: list[str] | None = None
) -> Any:
    """The model of ``config`` in evaluation mode: parameters on the meta device, computed buffers real, on ``device``.

    Buffers that no checkpoint holds (rotary frequencies, causal masks) are filled by the model's own initialisation.

    Raises
    ------
    ModelError
        transformers knows no causal model for the configuration, or a buffer cannot be filled.
    """
    from transformers import initialization

    with initialization.meta_device_safe_creation_ops():
        model = build_on_meta(config, dtype, trust_remote_code=trust_remote_code, warnings=warnings)
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                # NaN or garbage that the initialisation leaves behind would show in every state
                module._buffers[name] = torch.empty_like(buffer, device=device)
    for value in model.state_dict(keep_vars=True).values():
        value._is_hf_initialized = True  # transformers' mark: leave alone
    model.initialize_weights()
    return model.eval()


def build_on_meta(
    config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False, warnings: list[str] | None = None
) -> Any:
    """The model of ``config`` with everything on the meta device.

    Raises
    ------
    ModelError
        transformers knows no causal model for the configuration, or its code fails.
    """
    import transformers

    try:
        with quiet(warnings), torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a family's own code builds it: it may raise anything for a bad configuration
        reason = describe_error(error)
        raise ModelError(f"cannot build a model of type {config.model_type}: {reason}") from error


@dataclass
class _Share:
    """The checkpoint's tensors for one owner: plain ones by target, and those that converters make others from."""

    plain: dict[str, str] = field(default_factory=dict)  # target -> stored name
    convert: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # target -> [(stored name, pattern)]

    @property
    def sources(self) -> list[str]:
        return [*self.plain.values(), *(name for group in self.convert.values() for name, _ in group)]


class Placement:
    """Which tensor of a checkpoint goes where in ``model``, by transformers' own renaming and conversion rules.

    Parameters
    ----------
    model : model on the meta device
    blocks : dict of str to ModuleList
        Candidates for the list of blocks, by name; their tensors are not loaded with ``load_outside``.

    Raises
    ------
    ModelError
        The checkpoint lacks tensors of the model or holds others, or ties a block's tensors to others.
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
        self.config = config  # of the checkpoint
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
        self._shares: dict[tuple[str, int], _Share] = {}
        self._arrived: set[str] = set()
        self._left_over: list[str] = []
        self._misshapen: list[tuple[str, Any, Any]] = []
        for name in _in_order(checkpoint):
            self._assign(name)
        self._check_complete()

    def nbytes(self, blocks: str) -> int:
        """Bytes that reading everything outside the blocks and every block of one list once takes from the disk."""
        owners = [OUTSIDE, *(owner for owner in self._shares if owner[0] == blocks)]
        names = [name for owner in owners if owner in self._shares for name in self._shares[owner].sources]
        return sum(self.checkpoint[name].nbytes for name in names)

    def load_outside(self) -> None:
        """Reads and places everything outside the candidate lists, and ties what the model ties.

        Raises
        ------
        ModelError
            A tensor has the wrong shape, or cannot be converted.
        """
        self._load(OUTSIDE)
        self.model.tie_weights(missing_keys=self._empty.keys() - self._arrived, recompute_mapping=False)

    def load_block(self, blocks: str, index: int) -> None:
        """Reads and places the tensors of one block.

        Raises
        ------
        ModelError
            A tensor has the wrong shape, cannot be converted, or is still missing afterwards.
        """
        self._load((blocks, index))
        block = self.model.get_submodule(f"{blocks}.{index}")
        empty = [name for name, value in block.state_dict().items() if value.is_meta]
        if empty:
            raise ModelError(f"{self.checkpoint.folder} holds nothing for {blocks}.{index}.{empty[0]}")

    def free_block(self, blocks: str, index: int) -> None:
        """Puts a block's parameters and stored buffers back on the meta device."""
        for name in self.model.get_submodule(f"{blocks}.{index}").state_dict():
            self._set(f"{blocks}.{index}.{name}", self._empty[f"{blocks}.{index}.{name}"])

    def _load(self, owner: tuple[str, int]) -> None:
        share = self._shares.get(owner, _Share())
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
            except Exception as error:  # a conversion is arithmetic on shapes: it may fail in many ways
                raise ModelError(f"cannot convert {members[0][0]} to {target}: {error}") from error
            for place, value in made.items():
                self._put(place, value[0] if isinstance(value, list) else value)
            del made

    def _assign(self, name: str) -> None:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._empty)
        if target not in self._empty and name in self._empty:
            target, pattern = rename_source_key(name, [], [], prefix, self._empty)
        if target not in self._empty:
            self._left_over.append(target)
            return
        owner = next((self._prefixes[p] for p in _stems(target) if p in self._prefixes), OUTSIDE)
        share = self._shares.setdefault(owner, _Share())
        stored_dtype, wanted_dtype = self.checkpoint[name].dtype, self._empty[target].dtype
        if wanted_dtype.is_floating_point and not stored_dtype.is_floating_point:
            raise ModelError(
                f"{self.checkpoint.folder}: {name} is stored as {str(stored_dtype).removeprefix('torch.')}, which is a "
                "quantised format, and its scales are not known: use the original model"
            )
        if pattern is None:
            stored, wanted = self.checkpoint[name].shape, tuple(self._empty[target].shape)
            if stored != wanted:
                self._misshapen.append((target, stored, wanted))
            share.plain[target] = name
            self._arrived.add(target)
            return
        share.convert.setdefault(target, []).append((name, pattern))
        rule = next(rule for rule in self._converters if pattern in rule.source_patterns)
        self._arrived.update(target.replace(rule.target_patterns[0], other) for other in rule.target_patterns)

    def _check_complete(self) -> None:
        tied = dict(self.model.all_tied_weights_keys or {})
        inside = [name for pair in tied.items() for name in pair if any(p in self._prefixes for p in _stems(name))]
        if inside:
            raise ModelError(
                f"{type(self.model).__name__} ties {inside[0]} to other weights: its blocks cannot be run one at a time"
            )
        present = {name for pair in tied.items() if self._arrived & set(pair) for name in pair}
        for target, source in tied.items():  # more than two names of one weight share their source
            if source in present:
                present.add(target)
        missing = self._empty.keys() - (self._arrived | present)
        check_complete(
            self.model,
            str(self.checkpoint.folder),
            missing=missing,
            unexpected=self._left_over,
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
            if (found := search.search(target)) is not None:
                return self._exception_dtypes[patterns[str(found.lastgroup)]]
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
    """Stored names with numbers in numeric order: converters stack experts in the order in which they come."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def _stems(name: str) -> list[str]:
    """``a.``, ``a.b.``, ... of ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[:count]) + "." for count in range(1, len(parts))]
