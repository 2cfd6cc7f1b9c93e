"""Compiles every kernel for named targets on a machine without a GPU, and reports its use of registers and memory.

    python -m xprobe_kernels.aot [--targets sm_90,gfx942] [--json FILE] [--all]

For each kernel and target it prints registers per thread, spilled bytes (stack and local memory), shared memory and the
matrix instruction of the product. The exit code is 1 if a kernel does not build, spills in the product's loop, or does
not fit in shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from xprobe_kernels.attention import Blocks
from xprobe_kernels.configs import ARCHITECTURES, CONFIGS, MAX_BLOCK_ROWS, PLAIN, Config
from xprobe_kernels.continuation import FEWEST

TARGETS = {  # backend, architecture, threads per warp
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
PRODUCTS = ("lens_kernel", "tiles_kernel", "tree_attention_kernel", "continued_attention_kernel")
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
# names of the matrix instructions in each target's assembly, best first
MATRIX = {"ptx": ("wgmma.mma_async", "tcgen05.mma", "mma.sync"), "amdgcn": ("v_mfma",)}


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time arguments."""

    kernel: str
    label: str
    types: dict[str, str]  # argument -> Triton type
    constants: dict[str, Any]
    warps: int
    stages: int = 3


@dataclass(frozen=True)
class Report:
    """The result of one compilation. Sizes in bytes; None where the target's tools report nothing."""

    kernel: str
    label: str
    target: str
    registers: int | None = None
    spilled: int | None = None
    loop_spills: int | None = None  # loads and stores of local memory in the product's loop
    shared: int | None = None
    matrix: str | None = None
    error: str | None = None

    @property
    def good(self) -> bool:
        limit = ARCHITECTURES[self.target].shared
        return self.error is None and not self.loop_spills and (self.shared or 0) <= limit


def lens_variant(
    config: Config,
    dtype: str,
    *,
    top_k: int = 0,
    lookups: int = 1,
    bias: bool = False,
    cap: int = 0,
    kl: int = 0,
    tf32: bool = False,
    even: bool = True,
) -> Variant:
    """The fused pass.

    ``top_k``: number of largest logits that the programs carry along. ``bias``: with bias and scale. ``cap``: see
    ``cap_kind``. ``kl``: 1 for a pass over final rows, 2 for a pass over rows that are compared with them.
    """
    block = f"{config.block_m}x{config.block_n}x{config.block_k}"
    flags = [name for name in ("descriptors", "flat") if getattr(config, name)]
    flags += [{2: "halves", 4: "quarters"}[config.parts]] if config.parts > 1 else []
    flags += ["bias"] if bias else []
    flags += [["", "soft-cap", "large soft-cap"][cap]] if cap else []
    flags += [["", "keep", "compare"][kl]] if kl else []
    flags += [f"top {top_k}"] if top_k else []
    flags += ["tf32"] if tf32 else []
    flags += [] if even else ["any width"]
    label = " ".join([dtype, block, f"{config.warps} warps", f"{config.stages} stages", *flags])
    rows, weight = f"*{dtype}", f"*{dtype}"
    if config.descriptors:
        rows = f"tensordesc<{dtype}[{config.block_m}, {config.block_k}]>"
        weight = f"tensordesc<{dtype}[{config.block_n}, {config.block_k}]>"
    types = {
        "normed": rows, "weight": weight, "weight_stride": "i64:16", "bias_ptr": f"*{dtype}", "tokens_ptr": "*i64",
        "thresholds_ptr": "*fp32", "sums_ptr": "*fp32", "above_ptr": "*i32", "top_ptr": "*fp32", "top_ids_ptr": "*i32",
        "maxima_ptr": "*fp32", "maxima": "i32",
        "weights_ptr": "*fp32", "peaks_ptr": "*fp32", "masses_ptr": "*fp32", "final_of_ptr": "*i64",
        "final_logsumexp_ptr": "*fp32", "count": "i32", "vocabulary": "i32", "width": "i32:16", "splits": "i32",
        "group": "i32", "scale": "fp32", "cap": "fp32",
    }  # fmt: skip
    if not even:
        types |= {"width": "i32", "weight_stride": "i64"}
    constants: dict[str, Any] = {"lookups": 1} if lookups == 1 else {}  # Triton makes an argument of 1 a constant
    types |= {} if lookups == 1 else {"lookups": "i32"}
    constants |= {
        "HAS_BIAS": bias, "HAS_SCALE": bias, "CAP": cap, "LOOKUPS": lookups, "K": top_k, "KL": kl,
        "PLACES": 1 << (max(top_k, 1) - 1).bit_length(), "PRECISION": "tf32" if tf32 else "ieee",
        "EVEN": even,
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "PARTS": config.parts,
        "DESCRIPTORS": config.descriptors, "FLAT": config.flat,
    }  # fmt: skip
    return Variant("lens_kernel", label, types, constants, config.warps, config.stages)


def tiles_variant(config: Config, dtype: str, *, top_k: int = 5) -> Variant:
    """The kernel that computes the tiles with the k largest logits again, after a pass with ``config``."""
    rows = min(config.block_m, MAX_BLOCK_ROWS)
    label = f"{dtype} {rows}x{config.block_n}x{config.block_k} {config.warps} warps top {top_k}"
    types = {
        "normed_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "weight_stride": "i64:16", "bias_ptr": f"*{dtype}",
        "order_ptr": "*i64", "sizes_ptr": "*i32", "starts_ptr": "*i32", "programs_ptr": "*i32", "top_ptr": "*fp32",
        "top_ids_ptr": "*i32",
        "count": "i32", "vocabulary": "i32", "width": "i32:16", "tiles": "i32", "scale": "fp32",
    }  # fmt: skip
    constants = {
        "HAS_BIAS": True, "HAS_SCALE": True, "K": top_k, "PRECISION": "ieee", "EVEN": True, "BM": rows,
        "BN": config.block_n, "BK": config.block_k, "BT": 1024,
    }  # fmt: skip
    return Variant("tiles_kernel", label, types, constants, config.warps, min(config.stages, 3))


def small_variants() -> Iterator[Variant]:
    """The small kernels that run before and after the pass, ``row_kernel`` and ``capture_kernel``."""
    flags = {"NORM": 2, "GAMMA": True, "BETA": True, "HAS_BIAS": True, "HAS_CAP": True}
    yield Variant(
        "prepare_kernel", "bf16 layer norm, D 4096",
        {
            "hidden_ptr": "*bf16", "hidden_stride": "i64:16", "gamma_ptr": "*bf16", "beta_ptr": "*bf16", "eps": "fp32",
            "weight_ptr": "*bf16", "weight_stride": "i64:16", "bias_ptr": "*bf16", "scale": "fp32", "cap": "fp32",
            "tokens_ptr": "*i64", "lookups": "i32", "normed_ptr": "*bf16", "finite_ptr": "*i8", "logits_ptr": "*fp32",
            "thresholds_ptr": "*fp32", "width": "i32:16", "vocabulary": "i32",
        },
        {**flags, "STORE": True, "BD": 4096}, 8,
    )  # fmt: skip
    yield Variant(
        "merge_kernel", "top 5 of 264 parts",
        {
            "sums_ptr": "*fp32", "above_ptr": "*i32", "top_ptr": "*fp32", "top_ids_ptr": "*i32", "tokens_ptr": "*i64",
            "finite_ptr": "*i8", "cap": "fp32", "splits": "i32", "lists": "i32", "count": "i32", "lookups": "i32",
            "logsumexp_ptr": "*fp32", "entropy_ptr": "*fp32", "cross_ptr": "*fp32", "rank_ptr": "*i64",
            "out_ptr": "*fp32", "out_ids_ptr": "*i64",
        },
        {"HAS_CAP": True, "COMPARED": True, "K": 5, "BS": 512, "BC": 2048}, 8,
    )  # fmt: skip
    yield Variant(
        "select_kernel", "top 5 of 1024 tiles",
        {
            "maxima_ptr": "*fp32", "chosen_ptr": "*i32", "slots_ptr": "*i32", "sizes_ptr": "*i32", "count": "i32",
            "tiles": "i32",
        },
        {"J": 5, "BT": 1024}, 4,
    )  # fmt: skip
    yield Variant(
        "order_kernel", "1024 tiles",
        {
            "chosen_ptr": "*i32", "slots_ptr": "*i32", "sizes_ptr": "*i32", "order_ptr": "*i64", "starts_ptr": "*i32",
            "programs_ptr": "*i32", "pairs": "i32", "tiles": "i32",
        },
        {"BM": 64, "BP": 32, "BT": 1024}, 4,
    )  # fmt: skip
    yield Variant(
        "row_kernel", "top 5",
        {
            "products_ptr": "*fp32", "stride": "i32:16", "bias_ptr": "*bf16", "tokens_ptr": "*i64",
            "thresholds_ptr": "*fp32",
            "sums_ptr": "*fp32", "above_ptr": "*i32", "top_ptr": "*fp32", "top_ids_ptr": "*i32",
            "weights_ptr": "*fp32", "peaks_ptr": "*fp32", "masses_ptr": "*fp32", "final_of_ptr": "*i64",
            "final_logsumexp_ptr": "*fp32", "first_row": "i32",
            "count": "i32", "first_token": "i32", "tokens": "i32", "vocabulary": "i32", "scale": "fp32",
            "cap": "fp32",
        },
        {"part": 1, "lookups": 1, "HAS_BIAS": True, "HAS_SCALE": True, "CAP": 1, "LOOKUPS": 1, "K": 5, "PLACES": 8,
         "KL": 2, "BN": 4096}, 8,
    )  # fmt: skip

    yield Variant(
        "capture_kernel", "bf16 layer norm, D 4096",
        {
            "hidden_ptr": "*bf16", "batch_stride": "i64:16", "time_stride": "i64:16",
            "spans_ptr": "*i64", "gamma_ptr": "*bf16", "beta_ptr": "*bf16", "eps": "fp32", "out_ptr": "*bf16",
            "out_stride": "i64:16", "width": "i32:16",
        },
        {"width_stride": 1, "NORM": 2, "GAMMA": True, "BETA": True, "BD": 4096}, 8,
    )  # fmt: skip


def attention_variant(dtype: str, width: int, *, full: bool = False) -> Variant:
    """Attention over packed trees with heads of ``width``; ``full``: with window, soft-cap and sinks."""
    blocks = Blocks.choose(ITEMSIZE[dtype], width)
    label = f"{dtype} {blocks.queries}x{blocks.keys}, heads of {width}{', window, cap, sinks' if full else ''}"
    operand = f"*{dtype}"
    types = {
        "query_ptr": operand, "query_head": "i32:16", "query_stride": "i32:16",
        "key_ptr": operand, "key_head": "i32:16", "key_stride": "i32:16",
        "value_ptr": operand, "value_head": "i32:16", "value_stride": "i32:16",
        "sinks_ptr": operand, "out_ptr": operand, "until_ptr": "*i32", "positions_ptr": "*i32", "bounds_ptr": "*i32",
        "visits_ptr": "*i32", "tokens": "i32", "heads": "i32:16", "width": "i32:16", "value_width": "i32:16",
        "scale": "fp32", "window": "i32", "cap": "fp32",
    }  # fmt: skip
    constants = {
        "GROUP": 4, "HAS_WINDOW": full, "HAS_CAP": full, "HAS_SINKS": full,
        "BM": blocks.queries, "BN": blocks.keys, "BD": width, "BE": width,
    }  # fmt: skip
    return Variant("tree_attention_kernel", label, types, constants, blocks.warps, blocks.stages)


def continued_variant(dtype: str, width: int, *, few: bool = True, full: bool = False) -> Variant:
    """Attention of ``few`` or many tokens that continue a packed tree; the rest as for ``attention_variant``."""
    chosen = Blocks.choose(ITEMSIZE[dtype], width)
    blocks = replace(chosen, queries=FEWEST) if few else chosen
    label = f"{dtype} {blocks.queries}x{blocks.keys}, heads of {width}{', window, cap, sinks' if full else ''}"
    operand = f"*{dtype}"
    types = {"query_ptr": operand, "query_head": "i32:16", "query_stride": "i32:16"}
    for name in ("kept_key", "kept_value", "key", "value"):
        types |= {f"{name}_ptr": operand, f"{name}_head": "i32:16", f"{name}_stride": "i32:16"}
    types |= {
        "sinks_ptr": operand, "out_ptr": operand, "places_ptr": "*i32", "query_positions_ptr": "*i32",
        "since_ptr": "*i32", "until_ptr": "*i32", "positions_ptr": "*i32", "bounds_ptr": "*i32", "visits_ptr": "*i32",
        "queries": "i32", "kept": "i32", "tokens": "i32", "heads": "i32:16", "width": "i32:16",
        "value_width": "i32:16", "scale": "fp32", "window": "i32", "cap": "fp32",
    }  # fmt: skip
    constants = {
        "GROUP": 4, "HAS_WINDOW": full, "HAS_CAP": full, "HAS_SINKS": full,
        "BM": blocks.queries, "BN": blocks.keys, "BD": width, "BE": width,
    }  # fmt: skip
    return Variant("continued_attention_kernel", label, types, constants, blocks.warps, blocks.stages)


def variants(target: str, every: bool = False) -> Iterator[Variant]:
    """The kernels that run on ``target``, for many and few rows. ``every``: also the candidates for tuning."""
    for dtype in ("bf16", "fp32"):
        many, few = CONFIGS[target, ITEMSIZE[dtype]]
        for config in dict.fromkeys((many, few)):
            yield lens_variant(config, dtype)
            if dtype == "bf16":
                yield lens_variant(config, dtype, bias=True, lookups=4)
                yield lens_variant(config.for_work(capped=True, compared=False), dtype, cap=1)
                for kl in (1, 2):
                    yield lens_variant(config.for_work(capped=False, compared=True), dtype, kl=kl)
                yield tiles_variant(config, dtype)
            if dtype == "fp32":
                yield lens_variant(config, dtype, tf32=True)
        yield lens_variant(few, dtype, top_k=5)
        if dtype == "bf16":
            yield lens_variant(few.for_work(capped=True, compared=False), dtype, top_k=32, bias=True, cap=2, lookups=4)
    yield lens_variant(PLAIN, "bf16", even=False)
    yield from small_variants()
    for width in (64, 128, 256):
        yield attention_variant("bf16", width)
    yield attention_variant("bf16", 128, full=True)
    yield attention_variant("fp32", 128)
    for width in (64, 128, 256):
        yield continued_variant("bf16", width)
    yield continued_variant("bf16", 128, few=False)
    yield continued_variant("bf16", 128, full=True)
    yield continued_variant("fp32", 64)
    yield continued_variant("fp32", 128)
    if every:
        from xprobe_kernels.configs import candidates

        for config in candidates(target, 2):
            yield lens_variant(config, "bf16")


def compile_for(variant: Variant, target: str) -> Report:
    """Compiles one variant. An error is stored in the report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _kernel(variant.kernel)
    signature = {name: variant.types.get(name, "constexpr").partition(":")[0] for name in kernel.arg_names}
    aligned = {}
    for index, name in enumerate(kernel.arg_names):
        kind = variant.types.get(name, "")
        if kind.endswith(":16") or kind.startswith("*"):
            aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, constexprs=dict(variant.constants), signature=signature, attrs=aligned)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    try:
        built = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    except Exception as error:  # the compiler raises exceptions of many types; all of them are results here
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")] or [type(error).__name__]
        return Report(variant.kernel, variant.label, target, error=" | ".join(lines[-2:])[:300])
    usage = _nvidia(built) if target.startswith("sm_") else _amd(built)
    if variant.kernel not in PRODUCTS:
        usage |= {"loop_spills": None, "matrix": None}  # the kernel has no product
    return Report(variant.kernel, variant.label, target, shared=built.metadata.shared, **usage)


def _kernel(name: str) -> Any:
    from xprobe_kernels import triton_attention, triton_capture, triton_lens, triton_rows, triton_top, workspace
    from xprobe_kernels import triton_continued as continued

    modules = (triton_lens, triton_top, triton_rows, triton_capture, triton_attention, continued, workspace)
    for module in modules:
        if hasattr(module, name):
            return getattr(module, name)
    raise KeyError(name)


def _nvidia(built: Any) -> dict[str, Any]:
    import triton

    tools = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    matrix = next((name for name in MATRIX["ptx"] if name in built.asm["ptx"]), None)
    return {
        "registers": numbers.get("REG"),
        "spilled": numbers.get("STACK", 0) + numbers.get("LOCAL", 0),
        "loop_spills": loop_spills(code),
        "matrix": matrix,
    }


def loop_spills(code: str) -> int:
    """Counts loads and stores of local memory in innermost loops with a product. ``code`` is the output of nvdisasm."""
    lines = code.splitlines()
    labels = {line.strip()[:-1]: number for number, line in enumerate(lines) if re.fullmatch(r"\.L_\w+:", line.strip())}
    loops = []
    for number, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if jump and labels.get(jump.group(1), number) < number:
            loops.append((labels[jump.group(1)], number))
    product = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|FFMA)\b")
    inner = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
        and any(product.search(line) for line in lines[start:end])
    ]
    return sum(bool(re.search(r"\b(LDL|STL)\b", line)) for start, end in inner for line in lines[start:end])


def _amd(built: Any) -> dict[str, Any]:
    code = built.asm["amdgcn"]

    def number(name: str) -> int | None:
        match = re.search(rf"\.{name}:\s*(\d+)", code)
        return int(match.group(1)) if match else None

    return {
        "registers": number("vgpr_count"),
        "spilled": number("private_segment_fixed_size"),
        "matrix": next((name for name in MATRIX["amdgcn"] if name in code), None),
    }


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def table(reports: list[Report]) -> str:
    """The reports as text."""
    lines = [f"{'target':<8}{'kernel':<28}{'variant':<52}{'regs':>5}{'spilled':>9}{'in loop':>9}{'shared':>9}  matrix"]
    for report in reports:
        head = f"{report.target:<8}{report.kernel:<28}{report.label:<52}"
        if report.error:
            lines.append(f"{head}  FAILED: {report.error}")
            continue
        cells = [report.registers, report.spilled, report.loop_spills, report.shared]
        shown = ["-" if cell is None else str(cell) for cell in cells]
        lines.append(f"{head}{shown[0]:>5}{shown[1]:>9}{shown[2]:>9}{shown[3]:>9}  {report.matrix or '-'}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m xprobe_kernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, from " + ", ".join(TARGETS))
    parser.add_argument("--all", action="store_true", help="also compile the candidates for tuning")
    parser.add_argument("--json", help="write the reports to this file")
    options = parser.parse_args(arguments)
    wanted = options.targets.split(",")
    unknown = [name for name in wanted if name not in TARGETS]
    if unknown:
        parser.error(f"--targets: {unknown[0]!r} is not one of {', '.join(TARGETS)}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, so Triton interprets and does not compile: unset it")
    reports = []
    for target in wanted:
        for variant in variants(target, options.all):
            reports.append(compile_for(variant, target))
            print(table(reports).splitlines()[0 if len(reports) == 1 else -1], flush=True)
            if len(reports) == 1:
                print(table(reports).splitlines()[-1], flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    return 0 if all(report.good for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
