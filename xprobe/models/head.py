"""What a decoder does between its last block and its logits, read from numbers: norm, projection, bias, scale, cap.

The last block's output is replaced by rows of our own and the model's own code does the rest; norm and head are in fp32
meanwhile (fp64 models in fp64), so that the rounding of a 16-bit model hides neither a scale nor a soft-cap.
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
from xprobe.models.block_io import leaving, short_run, with_leaving

# Of the largest logit. Measured in fp32, where a head of width 8192 is right to about 1e-6
TOLERANCE = 2e-5
# Where norm and head have to stay in 16 bit, single logits are as coarse as that; the ratio of many is not
COARSE_ROUNDINGS, COARSE_RATIO = 16, 1e-3
BANNED = -1e30  # no head makes such a logit; what is added to it leaves it as it is


@dataclass
class Call:
    """One call of a module outside the blocks, in a forward pass."""

    name: str
    module: nn.Module
    given: Tensor
    result: Tensor


def read_head(
    model: Any, blocks: nn.ModuleList, calls: list[Call], ids: Tensor, state: Tensor
) -> tuple[Unembedding, str]:
    """The head of ``model`` as numbers, and the name of its final norm.

    Parameters
    ----------
    calls : list of Call
        Of the forward pass over ``ids`` [1, T], in order of completion.
    state : Tensor [1, T, D]
        Output of the last block in that pass.

    Raises
    ------
    ModelError
        A module on the way is of an unknown kind; the logits are more than the head gives; or the model does to them
        what bias, scale and soft-cap cannot express.
    """
    head_module = model.get_output_embeddings()
    chain = _chain(calls, state, head_module)
    head, norm_name = _without_scale(model, chain, head_module, state)
    before = next((call.given for call in calls if call.module is head_module), None)
    rows = _rows(head, ids.shape[1], state)
    modules = [*(call.module for call in chain), head_module]
    with _widened(modules, torch.float32) as wide:
        rows = rows.to(wide)
        try:
            with _ending_in(blocks, rows):
                logits = short_run(model, ids)[0]
        except ModelError as error:  # it has run as it is: what it does with rows of ours is not understood
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
        end = chain[-1].result if chain else state
        if before is None or not _proportional(end, before):
            raise ModelError(
                f"{type(model).__name__} changes the hidden state between {chain[-1].name if chain else 'its blocks'} "
                "and its head in a way that was not understood"
            ) from None
        raise


def _rows(head: Unembedding, count: int, state: Tensor) -> Tensor:
    """Rows [count, D] that take the head through its range: random ones, and ones that make single logits large."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, head.width, generator=generator)
    own = torch.randint(head.vocab_size, (count // 2,), generator=generator)
    strong = head.weight[own.to(head.weight.device)].float().cpu()
    if head.gamma is not None:
        gamma = head.gamma.float().cpu()
        strong = strong * torch.where(gamma < 0, -1.0, 1.0)
    strong = strong / strong.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    # half-way: a soft-cap that is fully saturated gives nothing away
    rows[: len(own)] = rows[: len(own)] + torch.linspace(0.5, 4, len(own))[:, None] * strong
    size = state.float().square().mean().sqrt().clamp(min=1e-3).cpu().repeat(count)
    # where even small logits are capped: rows so small that the norm's epsilon keeps them small
    size[-2:] = max(head.eps, 1e-12) ** 0.5 * torch.tensor([1e-2, 1e-4])
    return (rows * size[:, None]).to(state.device)


@contextmanager
def _ending_in(blocks: nn.ModuleList, rows: Tensor) -> Iterator[None]:
    """Forward passes inside go on from ``rows`` [T, D], whatever the last block hands on."""

    def from_rows(module: nn.Module, args: Any, output: Any) -> Any:
        return with_leaving(output, rows.to(leaving(output).device)[None])

    hook = blocks[-1].register_forward_hook(from_rows)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _widened(modules: list[nn.Module], dtype: torch.dtype) -> Iterator[torch.dtype]:
    """Gives the modules' parameters in ``dtype`` while inside, if they are coarser, and says in which dtype they are.

    Parameters that are elsewhere or in parts (offloaded, shared among processes) stay as they are.
    """
    members = list(dict.fromkeys(member for module in modules for member in module.modules()))
    own = [(m, name, value) for m in members for name, value in m._parameters.items() if value is not None]
    finest = max((value.dtype for _, _, value in own), key=lambda kind: kind.itemsize, default=dtype)
    away = any(value.is_meta or hasattr(value, "full_tensor") for _, _, value in own)
    if away or any(hasattr(member, "_hf_hook") for member in members):
        yield min((value.dtype for _, _, value in own), key=lambda kind: kind.itemsize, default=dtype)
        return
    wanted = max(dtype, finest, key=lambda kind: kind.itemsize)
    narrow = [entry for entry in own if entry[2].dtype != wanted]
    for module, name, value in narrow:
        module._parameters[name] = nn.Parameter(value.detach().to(wanted), requires_grad=False)
    try:
        yield wanted
    finally:
        for module, name, value in narrow:
            module._parameters[name] = value


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters, whole: those kept elsewhere or in parts are brought to where the module runs.

    Raises
    ------
    ModelError
        They cannot be brought there.
    """
    own = {name: _whole(value.detach()) for name, value in module.named_parameters(recurse=False)}
    if not any(value.is_meta for value in own.values()):
        return own
    from accelerate.utils import align_module_device

    with align_module_device(module):  # afterwards they are away again: hence the copies
        own = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}
    if any(value.is_meta for value in own.values()):
        raise ModelError(
            f"cannot read the weights of {type(module).__name__}, which are on no device: give the final norm and the "
            "head a device of their own in device_map"
        )
    return own


def _whole(value: Tensor) -> Tensor:
    """Gathers a weight of which every process holds a part."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _chain(calls: list[Call], state: Tensor, head: nn.Module) -> list[Call]:
    """Modules that the last state passes through on its way to the head, the head left out."""
    chain: list[Call] = []
    current = state.reshape(-1, state.shape[-1])
    for call in calls:
        given, result = (t.reshape(-1, t.shape[-1]) for t in (call.given, call.result))
        if call.module is head:
            break
        if given.shape != current.shape or result.shape[0] != given.shape[0]:
            continue
        if not _equal(given, current):
            continue
        if result.shape == given.shape and torch.equal(result.to(given.device), given):
            continue  # dropout, identity
        chain.append(call)
        current = result
    return chain


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in the coarser of their dtypes: some residual streams are in fp32."""
    dtype = min(one.dtype, other.dtype, key=lambda kind: kind.itemsize)
    return torch.equal(one.to(dtype), other.to(one.device, dtype))


def _proportional(one: Tensor, other: Tensor) -> bool:
    """Whether one tensor is a multiple of the other, up to rounding."""
    if one.shape != other.shape:
        return False
    a, b = one.double().flatten().to(other.device), other.double().flatten()
    return float(a @ b) ** 2 > 0.999 * float(a @ a) * float(b @ b)


def _without_scale(model: Any, chain: list[Call], head_module: Any, state: Tensor) -> tuple[Unembedding, str]:
    """Head spec with scale 1 and no soft-cap, from the modules between the last block and the logits."""
    own = weights_of(head_module)
    weight, bias = own.get("weight", head_module.weight.detach()), own.get("bias", getattr(head_module, "bias", None))
    norm: dict[str, Any] = {"norm": "none"}
    norm_name = "none"
    for position, call in enumerate(chain):
        if isinstance(call.module, nn.Linear):
            # OPT-350m projects to a narrower width before the head: fold both matrices into one
            wide = torch.promote_types(weight.dtype, torch.float32)
            inner = {name: value.to(weight.device, wide) for name, value in weights_of(call.module).items()}
            weight = weight.to(wide)
            if "bias" in inner:
                bias = weight @ inner["bias"] + (0 if bias is None else bias)
            weight = weight @ inner["weight"]
        elif position == 0:
            norm, norm_name = _read_norm(call, model.config), call.name
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


def _read_norm(call: Call, config: Any) -> dict[str, Any]:
    """Which norm a module computes: the candidate that reproduces it on inputs of several sizes."""
    module = call.module
    own = weights_of(module)
    weight, beta = own.get("weight"), own.get("bias")
    gammas = [None] if weight is None else [weight, 1 + weight.float()]
    epsilons = {v for k, v in vars(module).items() if "eps" in k and isinstance(v, float)}
    epsilons |= {
        v for k, v in config.get_text_config(decoder=True).to_dict().items() if "eps" in k and isinstance(v, float)
    }
    generator = torch.Generator().manual_seed(0)
    shape = (16, call.given.shape[-1])
    # a mean in proportion to the spread: beside a large one, the spread itself would be rounding
    rows = (torch.randn(shape, generator=generator) + 0.5) * torch.logspace(-5, 2, 16)[:, None]
    narrow = call.given.dtype
    if getattr(module, "eps", 0.0) is None:  # torch's RMSNorm then takes that of the dtype it runs in
        epsilons |= {torch.finfo(narrow).eps, torch.finfo(torch.promote_types(narrow, torch.float32)).eps}
    wider = narrow if getattr(module, "eps", 0.0) is None else torch.float64
    with _widened([module], wider) as wide, torch.inference_mode():
        rows = rows.to(call.result.device, wide if own else call.given.dtype)
        wanted = module(rows).double()
    best: tuple[float, dict[str, Any]] = (float("inf"), {})
    for kind, gamma, eps in product(("rms", "layer"), gammas, sorted(epsilons | {1e-5, 1e-6})):
        spec: dict[str, Any] = {"norm": kind, "gamma": gamma, "beta": beta, "eps": eps}
        blank = Unembedding(torch.zeros(1, shape[1], device=rows.device), **spec)
        error = float((blank.normalize(rows.double()) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        if error < best[0]:
            best = (error, spec)
    if not best[0] < 16 * max(torch.finfo(rows.dtype).eps, torch.finfo(torch.float32).eps):  # most compute in fp32
        raise ModelError(
            f"{type(module).__name__} ({call.name}) is neither RMSNorm nor LayerNorm: off by {best[0]:.1e}"
        )
    return best[1]


def _with_scale(
    model: Any, head: Unembedding, rows: Tensor, logits: Tensor, tolerance: float, ratio: float
) -> Unembedding:
    """Adds the logit scale, soft-cap and further bias that take the projection of ``rows`` to the model's logits."""
    device = head.weight.device
    raw = reference_logits(rows.double().to(device), head)
    wanted = logits.double().to(device)
    # tokens that can never be produced (image tokens of Chameleon): the same very low number in every row
    banned = (wanted == wanted[:1]).all(0) & (wanted[0] < BANNED) & torch.isfinite(raw).all(0)
    fixed, wanted = wanted[0], torch.where(banned, torch.nan, wanted)  # what is not finite is left out below
    values = {
        k: float(v) for k, v in model.config.get_text_config(decoder=True).to_dict().items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }  # fmt: skip
    caps: list[float | None] = [None, *dict.fromkeys(v for k, v in values.items() if "cap" in k and v > 0)]
    fits = [_fit(raw, wanted, cap, values, ratio) for cap in caps]
    best = min(fits, key=lambda fit: fit.error)
    if not best.error < tolerance and (cap := _guess_cap(raw, wanted)) is not None:
        best = min(best, _fit(raw, wanted, cap, values, ratio), key=lambda fit: fit.error)
    if not best.error < tolerance:
        centred = _fit(raw - raw.mean(0), wanted - wanted.mean(0), None, values, ratio)
        if centred.error < tolerance:  # what is left is the same in every row: a bias that no module holds
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
    error: float  # largest difference, as a share of the largest logit
    scale: float
    cap: float | None


def _fit(raw: Tensor, wanted: Tensor, cap: float | None, values: dict[str, float], within: float) -> _Fit:
    """The scale that fits best with this soft-cap; a known number if it is ``within`` that of it."""
    usable = torch.isfinite(raw) & torch.isfinite(wanted)
    if cap is None:
        bounded, steep = wanted, usable
    else:
        steep = usable & (wanted.abs() < 0.95 * cap)  # beyond, the soft-cap hides the number behind it
        bounded = cap * torch.atanh((wanted / cap).clamp(-0.999, 0.999))
    if not bool(steep.any()):
        return _Fit(float("inf"), 1.0, cap)
    measured = float((raw * bounded)[steep].sum() / raw.square()[steep].sum().clamp(min=1e-300))
    scale = _snap(measured, values, within)
    guess = raw * scale if cap is None else cap * torch.tanh(raw * scale / cap)
    error = float((guess - wanted)[usable].abs().max() / wanted[usable].abs().max().clamp(min=1e-300))
    return _Fit(error if scale else float("inf"), scale, cap)


def _guess_cap(raw: Tensor, wanted: Tensor) -> float | None:
    """A soft-cap that no entry of the configuration gives, from how the logits bend; None if they do not."""
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

    found = minimize_scalar(error, bounds=(-6, 2), method="bounded", options={"xatol": 1e-10})
    return largest * (1 + 10.0 ** float(found.x))


def _snap(ratio: float, values: dict[str, float], within: float) -> float:
    """The exact number behind a measured ratio; else the ratio.

    1, an entry of the configuration that speaks of a scale, one over it, or a quotient of two whole numbers there
    (MiniCPM: ``dim_model_base / hidden_size``).
    """
    named = [v for k, v in values.items() if v > 0 and any(w in k for w in ("scal", "multiplier", "logit"))]
    for exact in [1.0, *named, *(1 / v for v in named)]:
        if abs(ratio - exact) <= within * abs(exact):
            return exact
    whole = sorted({v for v in values.values() if v > 1 and v == int(v)})
    quotients = [one / other for one, other in product(whole, whole) if one != other]
    closest = min(quotients, key=lambda exact: abs(ratio - exact), default=ratio)
    return closest if abs(ratio - closest) <= within * abs(closest) else ratio
