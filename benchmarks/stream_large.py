"""Runs a random 3B model layer by layer in a process whose memory limit is smaller than the checkpoint.

    python benchmarks/stream_large.py [--limit-gib 2] [--layers 28] [--passes 4] [--tokens 256] [--folder DIR] [--keep]

Writes a random Llama of the shape of Llama-3.2-3B in bf16 (6.4 GB at 28 layers; deleted afterwards), drops it from the
page cache, and sweeps it in a process with a memory limit (RLIMIT_DATA: an allocation beyond it fails). Prints one
JSON object. Memory is RssAnon, which counts neither libraries nor the page cache.

Measured on 2 shared cores, 28 layers, 4 passes of 256 tokens, --limit-gib 1.5: peak 1.41 GB of a 6.43 GB checkpoint
(0.79 GB embedding, two blocks of 0.20 GB, the rest tiles in fp64 and activations). Every byte was read once. 99 % of
the loading overlapped with computing (12.7 s of reading in a sweep of 26.6 s).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


def write_checkpoint(folder: Path, layers: int) -> None:
    """Writes one shard per block, in the layout of a sharded checkpoint on the Hugging Face hub."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = {n: v.shape for n, v in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in names:
        layer = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(f"model-{layer[1] if layer else 'rest'}.safetensors", []).append(name)
    torch.manual_seed(0)
    for file, members in shards.items():
        values = {}
        for name in members:
            wide = len(names[name]) > 1
            value = torch.empty(names[name], dtype=torch.bfloat16)
            values[name] = value.normal_(std=0.02) if wide else value.fill_(1.0)
        save_file(values, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in shards:
        with (folder / file).open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def status(field: str) -> int:
    """Bytes of one line of /proc/self/status."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def run(folder: Path, passes: int, tokens: int, limit: int, spill: int, memory: int) -> dict[str, object]:
    """Opens and sweeps the checkpoint. The process may take ``limit`` bytes more than the interpreter already holds."""
    import torch
    import transformers  # noqa: F401  counted as part of the interpreter

    from xprobe.models.passes import Pass
    from xprobe.models.streaming.streamed import open_streamed, own_logits, sweep

    torch.ones(64, 64) @ torch.ones(64, 64)  # starts torch's threads
    held = status("RssAnon")
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + limit,) * 2)
    peak, done = [held], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], status("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    streamed = open_streamed(folder, "bfloat16", "cpu")
    opened = time.perf_counter() - start
    last: list[torch.Tensor] = []

    def receive(layer: int, hidden: torch.Tensor) -> None:
        if layer == streamed.anatomy.n_layers - 1:
            last.append(hidden[0, -1:].clone())

    ids = torch.randint(10, 128000, (passes, 1, tokens), generator=torch.Generator().manual_seed(0))
    report = sweep(
        streamed, [Pass({"input_ids": one}, receive) for one in ids], spill_bytes=spill, folder=folder,
        progress=lambda n, total: print(f"\r{n}/{total}", end="", file=sys.stderr),
    )  # fmt: skip
    logits = own_logits(streamed, torch.cat(last))
    done.set()
    blocks = [sum(v.nbytes for v in block.state_dict().values()) for block in streamed.anatomy.blocks]
    outside = sum(v.nbytes for v in {id(v): v for v in streamed.model.parameters() if not v.is_meta}.values())
    return {
        "peak_anonymous_bytes": peak[0] - held,
        "checkpoint_bytes": streamed.checkpoint.nbytes,
        "peak_over_checkpoint": round((peak[0] - held) / streamed.checkpoint.nbytes, 3),
        "outside_blocks_bytes": outside,
        "block_bytes": max(blocks),
        "limit_bytes": limit,
        "bytes_read": streamed.checkpoint.bytes_read,
        "read_once": streamed.checkpoint.bytes_read == streamed.checkpoint.nbytes,
        "spilled_bytes": report.spilled_bytes,
        "open_seconds": round(opened, 2),
        "sweep_seconds": round(report.seconds, 2),
        "loading_seconds": round(report.loading, 2),
        "waited_seconds": round(report.waited, 2),
        "overlap": round(report.overlap, 3),
        "tokens_per_second": round(passes * tokens / report.seconds, 1),
        "finite": bool(torch.isfinite(logits).all()),
        "memory_of_machine_bytes": memory,
    }


def main() -> None:
    """Writes the checkpoint, sweeps it in a separate process, and deletes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gib", type=float, default=2.0, help="memory limit of the process")
    parser.add_argument(
        "--spill-mib", type=float, default=4.0, help="memory for hidden states; the rest goes to the disk"
    )
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written (default: the temporary folder)")
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit, spill = int(options.limit_gib * 2**30), int(options.spill_mib * 2**20)
        print(json.dumps(run(options.run, options.passes, options.tokens, limit, spill, memory), indent=1))
        return
    needed = (options.layers * 101 + 400) * 2 * 10**6
    folder = Path(tempfile.mkdtemp(prefix="xprobe-large-", dir=options.folder))
    try:
        if shutil.disk_usage(folder).free < needed + 2 * 10**9:
            sys.exit(f"{folder} has no room for {needed / 1e9:.1f} GB")
        write_checkpoint(folder, options.layers)
        command = [sys.executable, __file__, *sys.argv[1:], "--run", str(folder)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        sys.exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
