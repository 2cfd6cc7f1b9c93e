"""Runs every kernel on small shapes and compares it with an fp64 lens on the CPU, also under ``compute-sanitizer``.

    python benchmarks/sanitize.py [--own]
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py --own

``--own`` leaves out calls that launch a matrix product of the library. The exit code is 1 if a result is wrong or
a call fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xprobe_kernels import Unembedding, capture, lens
from xprobe_kernels.attention import Blocks, Reach, tree_attention
from xprobe_kernels.configs import Config
from xprobe_kernels.request import MIB, LensRequest

# name, whether it launches only xprobe's kernels, error divided by its bound
Case = tuple[str, bool, Callable[[], float]]
WITH_DESCRIPTORS = Config(64, 64, 64, 4, 3, descriptors=True)
DEVICE, DTYPE = "cuda", torch.bfloat16
IN_HALVES = Config(64, 64, 32, 4, 3, parts=2)


def inputs(
    rows: int, width: int, vocabulary: int, lookups: int, dtype: torch.dtype, norm: str = "rms", **options: Any
) -> tuple[Tensor, Unembedding, Tensor]:
    """Rows, head and look-ups on the CPU.

    gamma, beta and bias are random vectors if they are True. The last of several look-ups is -1.
    """
    random = torch.Generator().manual_seed(rows * width + vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    for name, size in (("gamma", width), ("beta", width), ("bias", vocabulary)):
        wanted = options.pop(name, False)
        options[name] = (normal(size) * 0.5 + (name == "gamma")).to(dtype) if wanted else None
    head = Unembedding((normal(vocabulary, width) * 3 / width**0.5).to(dtype), norm=norm, **options)  # type: ignore[arg-type]
    lookup = torch.randint(0, vocabulary, (rows, lookups), generator=random)
    if lookups > 1:
        lookup[:, -1] = -1
    return normal(rows, width).to(dtype), head, lookup


def convert(head: Unembedding, dtype: torch.dtype | None, device: str) -> Unembedding:
    """The same head on another device or in another dtype."""
    fields = {name: getattr(head, name) for name in ("weight", "gamma", "beta", "bias")}
    fields = {name: value if value is None else value.to(device, dtype) for name, value in fields.items()}
    return Unembedding(**fields, norm=head.norm, eps=head.eps, scale=head.scale, softcap=head.softcap)


def lens_error(
    rows: int, width: int, vocabulary: int, *, backend: str, top_k: int = 5, lookups: int = 1, kl: bool = False,
    dtype: torch.dtype | None = None, rows_dtype: torch.dtype | None = None, config: Config | None = None,
    splits: int | None = None, **options: Any,
) -> float:  # fmt: skip
    """The largest error divided by its bound. The bounds are wide: they should find wrong addresses and races only."""
    dtype = dtype or DTYPE
    hidden, head, lookup = inputs(rows, width, vocabulary, lookups, dtype, **options)
    hidden = hidden.to(rows_dtype or dtype)
    finals = rows - 1 - torch.arange(rows) % max(1, rows // 3) if kl else None
    # the kernels round normed rows to the operands' dtype, so the truth does too: its bound can then be small
    normed = head.normalize(hidden.float()).to(hidden.dtype).double()
    plain = convert(head.without_norm(), torch.float64, "cpu")
    plain = Unembedding(plain.weight, norm="none", bias=plain.bias, scale=plain.scale, softcap=plain.softcap)
    truth = lens(normed, plain, lookup, top_k=top_k, final_rows=finals, backend="reference")
    gpu_hidden, gpu_head, gpu_lookup = hidden.to(DEVICE), convert(head, None, DEVICE), lookup.to(DEVICE)
    finals = None if finals is None else finals.to(DEVICE)
    options = {"top_k": top_k, "final_rows": finals, "backend": backend, "workspace_bytes": MIB}
    if config is None:
        result = vars(lens(gpu_hidden, gpu_head, gpu_lookup, **options))
    else:
        from xprobe_kernels import triton_readout

        request = LensRequest(gpu_hidden, gpu_head, gpu_lookup, top_k, finals, workspace_bytes=MIB)
        result = triton_readout.readout(request, config, splits)
    worst = 0.0
    for name, bound in (("logits", 1e-2), ("logsumexp", 1e-2), ("entropy", 2e-2), ("top_logits", 1e-2), ("kl", 2e-2)):
        if getattr(truth, name) is not None:
            expected, actual = getattr(truth, name), result[name].cpu().double()
            both_nan = expected.isnan() & actual.isnan()
            error = torch.where(both_nan, 0.0, (actual - expected).abs()).nan_to_num(nan=float("inf"))
            worst = max(worst, float((error / expected.abs().clamp(min=1).nan_to_num(nan=1.0)).max()) / bound)
    error = (result["rank"].cpu() - truth.rank).abs().double()
    return max(worst, float((error / (2 + 0.02 * vocabulary)).max()))


def capture_error(norm: str | None, strided: bool) -> float:
    hidden = torch.randn(3, 17, 200, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    spans = torch.tensor([[0, 0, 1], [2, 16, 17], [1, 3, 9], [0, 0, 17]])
    head = None
    if norm is not None:
        head = inputs(1, 200, 3, 1, DTYPE, norm=norm, gamma=True, beta=norm == "layer")[1]
    expected = torch.empty(4, 200)
    capture(
        hidden.float(), spans, expected, None if head is None else convert(head, torch.float32, "cpu"), backend="torch"
    )
    placed = hidden.to(DEVICE)
    placed = placed.transpose(0, 1).contiguous().transpose(0, 1) if strided else placed
    guarded = torch.full((6, 200), float("nan"), dtype=DTYPE, device=DEVICE)
    head = None if head is None else convert(head, None, DEVICE)
    capture(placed, spans.to(DEVICE), guarded[1:5], head, backend="triton")
    if not bool(guarded[[0, 5]].isnan().all()):
        return float("inf")  # it wrote outside of its output
    error = (guarded[1:5].cpu().float() - expected).abs() / expected.abs().clamp(min=1)
    return float(error.nan_to_num(nan=float("inf")).max()) / 2e-2


def attention_error(dtype: torch.dtype, tokens: int, width: int, **options: Any) -> float:
    """The error of attention over a packed tree: a prefix with two continuations, then a separate sequence."""
    random = torch.Generator().manual_seed(tokens + width)
    query, key, value = (torch.randn(n, tokens, width, generator=random).to(dtype) for n in (4, 2, 2))
    index, third = np.arange(tokens), tokens // 3
    until = np.select(
        [index < third, index < 2 * third, index < tokens - 5], [tokens - 5, 2 * third, tokens - 5], tokens
    )
    positions = np.where(index < 2 * third, index, np.where(index < tokens - 5, index - third, index - tokens + 5))
    reach = Reach.from_tree(until, positions, Blocks.choose(dtype.itemsize, width), torch.device(DEVICE))
    sinks = torch.randn(4, generator=random) if options.pop("sinks", False) else None
    gpu_sinks = None if sinks is None else sinks.to(DEVICE)
    result = tree_attention(*(t.to(DEVICE) for t in (query, key, value)), reach, scale=0.2, sinks=gpu_sinks, **options)

    scores = query.double() @ key.double().repeat_interleave(2, 0).transpose(1, 2) * 0.2
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    seen = torch.from_numpy((index[None] <= index[:, None]) & (index[:, None] < until[None]))
    if window := options.get("window"):
        seen &= torch.from_numpy(positions[:, None] - positions[None] < window)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(4, tokens, 1)], 2)
    expected = (scores.softmax(-1)[..., :tokens] @ value.double().repeat_interleave(2, 0)).transpose(0, 1)
    return float((result.cpu().double() - expected).abs().nan_to_num(nan=float("inf")).max()) / 5e-2


def cases() -> Iterator[Case]:
    def lens_case(name: str, *shape: int, own: bool = True, backend: str = "triton", **options: Any) -> Case:
        return name, own, lambda: lens_error(*shape, backend=backend, **options)

    everything = {"norm": "layer", "gamma": True, "beta": True, "bias": True, "softcap": 7.0, "scale": 0.5}
    yield lens_case("lens, default configuration, few rows", 33, 256, 2049)
    yield lens_case("lens, default configuration, many rows", 257, 128, 2100, gamma=True)
    yield lens_case("lens, layer norm, bias, cap, scale, 3 look-ups", 37, 200, 1031, lookups=3, **everything)
    yield lens_case("lens, odd width and vocabulary, no top-k", 19, 33, 517, top_k=0, norm="none")
    yield lens_case("lens, one row, one split", 1, 64, 300, config=IN_HALVES, splits=1)
    yield lens_case("lens, descriptors", 70, 192, 1000, config=WITH_DESCRIPTORS, splits=3)
    yield lens_case(
        "lens, descriptors, width not divisible by a block", 70, 200, 1000, config=WITH_DESCRIPTORS, splits=5
    )
    yield lens_case("lens, halves, flat", 70, 200, 1000, config=Config(64, 64, 32, 4, 3, parts=2, flat=True))
    yield lens_case("lens, fp32", 19, 100, 700, dtype=torch.float32, top_k=32)
    yield lens_case("lens, KL", 19, 128, 700, own=False, kl=True)
    yield lens_case("workspace", 37, 200, 1031, own=False, backend="workspace", lookups=3, kl=True, **everything)
    name = "workspace, fp32 rows and 16-bit weight, several parts"
    yield lens_case(name, 19, 200, 4001, own=False, backend="workspace", rows_dtype=torch.float32)
    for norm in (None, "rms", "layer"):
        for strided in (False, True):
            name = f"capture, {norm or 'no'} norm{', strided' if strided else ''}"
            yield name, True, lambda n=norm, s=strided: capture_error(n, s)
    for tokens, width, options in (
        (200, 64, {}),
        (130, 128, {"window": 9, "softcap": 3.0, "sinks": True}),
        (70, 256, {"sinks": True}),
    ):
        name = f"attention, {tokens} tokens, heads of {width}{', '.join(['', *options])}"
        yield name, True, lambda t=tokens, w=width, o=options: attention_error(DTYPE, t, w, **o)
    yield "attention, fp32", True, lambda: attention_error(torch.float32, 90, 128)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/sanitize.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--own", action="store_true", help="leave out calls that launch a matrix product of the library"
    )
    own = parser.parse_args().own
    if not torch.cuda.is_available():
        print("sanitize.py needs a GPU, and torch sees none", file=sys.stderr)
        return 1
    failed = 0
    for name, own_only, error in cases():
        if own and not own_only:
            continue
        try:
            share_of_bound = error()
        except Exception as problem:
            print(f"FAILED  {name}: {type(problem).__name__}: {' '.join(str(problem).split())[:300]}", flush=True)
            failed += 1
            continue
        failed += not share_of_bound <= 1
        print(f"{'ok' if share_of_bound <= 1 else 'WRONG':<6}  {name}: {share_of_bound:.3f} of its bound", flush=True)
    print("all correct" if not failed else f"{failed} wrong or failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
