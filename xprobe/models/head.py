"""Measures what a decoder computes between its last block and its logits: norm, projection, bias, scale, soft-cap.

xprobe replaces the last block's output by test rows and runs the model's own code on them. Meanwhile norm and head are
in fp32 (in fp64 models in fp64), because the rounding of a 16-bit model can hide a scale or a soft-cap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from xprobe_kernels import Unembedding
from xprobe_kernels.reference import logits as reference_logits

from xprobe.errors import ModelError
from xprobe.models.block_io import compute_logits, hidden_output, with_hidden_output
from xprobe.models.norms import own_weights, read_norm, with_precision

# Largest error as a share of the largest logit. In fp32 a head of width 8192 has an error of about 1e-6
TOLERANCE = 2e-5
# If norm and head must stay in 16 bit, a single logit has the error of 16 bit, but the ratio of many logits is finer
COARSE_ROUNDINGS, COARSE_RATIO = 16, 1e-3
MASKED_LOGIT = -1e30  # a token with a lower logit is masked: the model never produces it


@dataclass
class Call:
    """One call of a module outside the blocks, with its input and output."""

    name: str
    module: nn.Module
    inputs: Tensor
    outputs: Tensor


def read_head(
    model: Any, blocks: nn.ModuleList, calls: list[Call], ids: Tensor, state: Tensor
) -> tuple[Unembedding, str]:
    """The final norm and the head of ``model`` as an ``Unembedding``.

    ``xprobe.models.anatomy.inspect`` calls this function.

    Parameters
    ----------
    model : PreTrainedModel
    blocks : ModuleList
        The decoder blocks.
    calls : list of Call
        The calls of one forward pass over ``ids`` [1, T], in order of completion.
    ids : Tensor [1, T], int64
    state : Tensor [1, T, D]
        Output of the last block in that pass.

    Returns
    -------
    head : Unembedding
    norm_name : str
        Name of the final norm in the model.

    Raises
    ------
    ModelError
        A module between the blocks and the logits is of an unknown kind, the model gives more logits than the head
        has rows, or bias, scale and soft-cap cannot express what the model does to the logits.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, GraniteConfig
    >>> from xprobe.models.anatomy import inspect
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 160}
    >>> config = GraniteConfig(num_hidden_layers=2, logits_scaling=8.0, **sizes)
    >>> head = inspect(AutoModelForCausalLM.from_config(config).eval()).head
    >>> head.norm, head.scale, head.softcap
    ('rms', 0.125, None)
    """
    head_module = model.get_output_embeddings()
    chain = _modules_between(calls, state, head_module)
    head, norm_name = _without_scale(model, chain, head_module, state)
    before = next((call.inputs for call in calls if call.module is head_module), None)
    rows = _test_rows(head, ids.shape[1], state)
    modules = [*(call.module for call in chain), head_module]
    with with_precision(modules, torch.float32) as wide:
        rows = rows.to(wide)
        try:
            with _with_last_output(blocks, rows):
                logits = compute_logits(model, ids)[0]
        except ModelError as error:  # the model runs on a prompt but not on the test rows
            reason = str(error).rpartition("its own code fails: ")[2]
            raise ModelError(
                f"what {type(model).__name__} does between its last block and its logits was not understood ({reason})"
            ) from error
    if logits.shape[0] != len(rows):
        raise ModelError(
            f"{type(model).__name__} gives logits for {logits.shape[0]} tokens where its last block has {len(rows)}: "
            "it does not predict one token from each state"
        )
    columns = logits.shape[-1]
    if columns > head.vocab_size:
        raise ModelError(
            f"{type(model).__name__} gives {columns} logits for each token, and its head has {head.vocab_size} rows: "
            "where the others come from was not understood"
        )
    if columns < head.vocab_size:  # a padded head whose last rows the model drops
        head = replace(head, weight=head.weight[:columns], bias=None if head.bias is None else head.bias[:columns])
    tolerance = ratio = TOLERANCE
    if wide.itemsize < 4:
        tolerance, ratio = COARSE_ROUNDINGS * torch.finfo(wide).eps, COARSE_RATIO
    try:
        return _with_scale(model, head, rows, logits, tolerance, ratio), norm_name
    except ModelError:
        end = chain[-1].outputs if chain else state
        if before is None or not _proportional(end, before):
            raise ModelError(
                f"{type(model).__name__} changes the hidden state between {chain[-1].name if chain else 'its blocks'} "
                "and its head in a way that was not understood"
            ) from None
        raise


def _test_rows(head: Unembedding, count: int, state: Tensor) -> Tensor:
    """Rows [count, D] that cover the range of the head: random rows, and rows that make single logits large."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, head.width, generator=generator)
    own = torch.randint(head.vocab_size, (count // 2,), generator=generator)
    strong = head.weight[own.to(head.weight.device)].float().cpu()
    if head.gamma is not None:
        gamma = head.gamma.float().cpu()
        strong = strong * torch.where(gamma < 0, -1.0, 1.0)
    strong = strong / strong.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    # the logits must not saturate a soft-cap: a saturated logit does not show the value of the cap
    rows[: len(own)] = rows[: len(own)] + torch.linspace(0.5, 4, len(own))[:, None] * strong
    size = state.float().square().mean().sqrt().clamp(min=1e-3).cpu().repeat(count)
    # two rows so small that the norm's epsilon keeps them small: for soft-caps that change even small logits
    size[-2:] = max(head.eps, 1e-12) ** 0.5 * torch.tensor([1e-2, 1e-4])
    return (rows * size[:, None]).to(state.device)


@contextmanager
def _with_last_output(blocks: nn.ModuleList, rows: Tensor) -> Iterator[None]:
    """Replaces the output of the last block by ``rows`` [T, D] in forward passes inside the context."""

    def replace_output(module: nn.Module, args: Any, output: Any) -> Any:
        return with_hidden_output(output, rows.to(hidden_output(output).device)[None])

    hook = blocks[-1].register_forward_hook(replace_output)
    try:
        yield
    finally:
        hook.remove()


def _modules_between(calls: list[Call], state: Tensor, head: nn.Module) -> list[Call]:
    """The calls that lead from the last state to the head, without the head."""
    chain: list[Call] = []
    current = state.reshape(-1, state.shape[-1])
    for call in calls:
        inputs, outputs = (t.reshape(-1, t.shape[-1]) for t in (call.inputs, call.outputs))
        if call.module is head:
            break
        if inputs.shape != current.shape or outputs.shape[0] != inputs.shape[0]:
            continue
        if not _equal(inputs, current):
            continue
        if outputs.shape == inputs.shape and torch.equal(outputs.to(inputs.device), inputs):
            continue  # dropout, identity
        chain.append(call)
        current = outputs
    return chain


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in the coarser of their dtypes. (Some 16-bit models keep their states in fp32.)"""
    dtype = min(one.dtype, other.dtype, key=lambda kind: kind.itemsize)
    return torch.equal(one.to(dtype), other.to(one.device, dtype))


def _proportional(one: Tensor, other: Tensor) -> bool:
    """Whether one tensor is a multiple of the other, apart from rounding."""
    if one.shape != other.shape:
        return False
    a, b = one.double().flatten().to(other.device), other.double().flatten()
    return float(a @ b) ** 2 > 0.999 * float(a @ a) * float(b @ b)


def _without_scale(model: Any, chain: list[Call], head_module: Any, state: Tensor) -> tuple[Unembedding, str]:
    """The head with scale 1 and no soft-cap, from the modules between the last block and the logits."""
    own = own_weights(head_module)
    weight, bias = own.get("weight", head_module.weight.detach()), own.get("bias", getattr(head_module, "bias", None))
    norm: dict[str, Any] = {"norm": "none"}
    norm_name = "none"
    for position, call in enumerate(chain):
        if isinstance(call.module, nn.Linear):
            # OPT-350m projects to a narrower width before the head: multiply both matrices into one
            wide = torch.promote_types(weight.dtype, torch.float32)
            inner = {name: value.to(weight.device, wide) for name, value in own_weights(call.module).items()}
            weight = weight.to(wide)
            if "bias" in inner:
                bias = weight @ inner["bias"] + (0 if bias is None else bias)
            weight = weight @ inner["weight"]
        elif position == 0:
            norm, norm_name = read_norm(call.module, call.name, call.inputs, model.config), call.name
        else:
            raise ModelError(
                f"{type(model).__name__}: unknown module {call.name!r} between the final norm and the head"
            )
    if weight.shape[1] != state.shape[-1]:
        raise ModelError(
            f"{type(model).__name__}: the head has width {weight.shape[1]} and the blocks {state.shape[-1]}"
        )
    device = weight.device
    norm = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in norm.items()}
    return Unembedding(weight, bias=bias, **norm), norm_name


def _with_scale(
    model: Any, head: Unembedding, rows: Tensor, logits: Tensor, tolerance: float, ratio: float
) -> Unembedding:
    """Adds to ``head`` the scale, the soft-cap and the bias that turn the projection of ``rows`` into ``logits``."""
    device = head.weight.device
    raw = reference_logits(rows.double().to(device), head)
    wanted = logits.double().to(device)
    # tokens that the model masks (image tokens of Chameleon): the same very low logit in every row
    banned = (wanted == wanted[:1]).all(0) & (wanted[0] < MASKED_LOGIT) & torch.isfinite(raw).all(0)
    fixed, wanted = wanted[0], torch.where(banned, torch.nan, wanted)  # the fits below skip what is not finite
    values = {
        k: float(v) for k, v in model.config.get_text_config(decoder=True).to_dict().items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }  # fmt: skip
    caps: list[float | None] = [None, *dict.fromkeys(v for k, v in values.items() if "cap" in k and v > 0)]
    fits = [_fit(raw, wanted, cap, values, ratio) for cap in caps]
    best = min(fits, key=lambda fit: fit.error)
    if not best.error < tolerance and (cap := _estimate_cap(raw, wanted)) is not None:
        best = min(best, _fit(raw, wanted, cap, values, ratio), key=lambda fit: fit.error)
    if not best.error < tolerance:
        centred = _fit(raw - raw.mean(0), wanted - wanted.mean(0), None, values, ratio)
        if centred.error < tolerance:  # the rest is the same in every row: a bias outside of all modules
            bias = (wanted / centred.scale - raw).mean(0) + (0 if head.bias is None else head.bias.double())
            head, best = replace(head, bias=bias.to(torch.promote_types(head.weight.dtype, torch.float32))), centred
    if not best.error < tolerance:
        raise ModelError(
            f"{type(model).__name__} does to its logits what bias, scale and soft-cap cannot express (off by "
            f"{best.error:.1e} of the largest)"
        )
    if bool(banned.any()):
        bias = torch.zeros_like(fixed) if head.bias is None else head.bias.double()
        bias = torch.where(banned, fixed / best.scale, bias)
        head = replace(head, bias=bias.to(torch.promote_types(head.weight.dtype, torch.float32)))
    return replace(head, scale=best.scale, softcap=best.cap)


@dataclass(frozen=True)
class _Fit:
    """How well a scale and a soft-cap explain the logits."""

    error: float  # largest difference as a share of the largest logit
    scale: float
    cap: float | None


def _fit(raw: Tensor, wanted: Tensor, cap: float | None, values: dict[str, float], tolerance: float) -> _Fit:
    """The scale that fits best with this soft-cap. ``tolerance`` is that of ``_nearest_exact_scale``."""
    usable = torch.isfinite(raw) & torch.isfinite(wanted)
    if cap is None:
        bounded, steep = wanted, usable
    else:
        steep = usable & (wanted.abs() < 0.95 * cap)  # above this the soft-cap is saturated
        bounded = cap * torch.atanh((wanted / cap).clamp(-0.999, 0.999))
    if not bool(steep.any()):
        return _Fit(float("inf"), 1.0, cap)
    measured = float((raw * bounded)[steep].sum() / raw.square()[steep].sum().clamp(min=1e-300))
    scale = _nearest_exact_scale(measured, values, tolerance)
    guess = raw * scale if cap is None else cap * torch.tanh(raw * scale / cap)
    error = float((guess - wanted)[usable].abs().max() / wanted[usable].abs().max().clamp(min=1e-300))
    return _Fit(error if scale else float("inf"), scale, cap)


def _estimate_cap(raw: Tensor, wanted: Tensor) -> float | None:
    """Estimates a soft-cap that is not in the configuration, by least squares. None if all logits are 0."""
    from scipy.optimize import minimize_scalar

    usable = torch.isfinite(raw) & torch.isfinite(wanted)
    x, y = raw[usable], wanted[usable]
    largest = float(y.abs().max())
    if not largest > 0:
        return None

    def error(log_share: float) -> float:
        cap = largest * (1 + 10.0**log_share)
        bounded = cap * torch.atanh(y / cap)
        slope = (x * bounded).sum() / x.square().sum().clamp(min=1e-300)
        return float((cap * torch.tanh(x * slope / cap) - y).square().mean())

    optimum = minimize_scalar(error, bounds=(-6, 2), method="bounded", options={"xatol": 1e-10})
    return largest * (1 + 10.0 ** float(optimum.x))


def _nearest_exact_scale(ratio: float, values: dict[str, float], tolerance: float) -> float:
    """The exact number within the relative ``tolerance`` of a measured ratio. If there is none, the ratio.

    The exact numbers are 1, the scales in the configuration, their reciprocals, and the quotients of two whole numbers
    in the configuration (MiniCPM: ``dim_model_base / hidden_size``).

    Examples
    --------
    >>> _nearest_exact_scale(0.12500001, {"logits_scaling": 8.0}, 2e-5)
    0.125
    >>> _nearest_exact_scale(1.05, {"logits_scaling": 8.0}, 2e-5)
    1.05
    """
    named = [v for k, v in values.items() if v > 0 and any(w in k for w in ("scal", "multiplier", "logit"))]
    for exact in [1.0, *named, *(1 / v for v in named)]:
        if abs(ratio - exact) <= tolerance * abs(exact):
            return exact
    whole = sorted({v for v in values.values() if v > 1 and v == int(v)})
    quotients = [one / other for one, other in product(whole, whole) if one != other]
    closest = min(quotients, key=lambda exact: abs(ratio - exact), default=ratio)
    return closest if abs(ratio - closest) <= tolerance * abs(closest) else ratio
