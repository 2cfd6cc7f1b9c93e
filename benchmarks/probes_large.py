"""Time and peak memory of the probing stage on the states of a large model, which it reads from a folder.

    python benchmarks/probes_large.py --layers 2                       14,280 examples, 4096 wide: XQuAD in 12 languages
    python benchmarks/probes_large.py --paragraphs 30 --width 576

The states are random, with one direction per question: only their number matters here. The layers are read a few at a
time, so memory does not depend on their number. Time is proportional to it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from xprobe.config import DEFAULT_PROBES
from xprobe.probes.settings import ProbeSettings
from xprobe.probes.training import train
from xprobe.runs.folder import RunFolder
from xprobe.runs.manifest import Manifest
from xprobe.runs.provenance import environment
from xprobe.runs.states import LAYER_BYTES, StoredStates
from xprobe.stages.phases import encoding_signals

LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")


def write_states(path: Path, paragraphs: int, questions: int, layers: int, width: int) -> StoredStates:
    """A run folder that holds bf16 states and nothing else."""
    folder = RunFolder.create(path)
    folder.write_manifest(Manifest())
    generator = torch.Generator().manual_seed(0)
    rows = []
    for p in range(paragraphs):
        examples = [(q, x) for q in range(questions + (p % 2)) for x in LANGUAGES]
        rows += [
            {
                "setting": "en-x",
                "language": x,
                "question_id": f"{p}/{q}",
                "paragraph": f"p{p}",
                "context_language": "en",
            }
            for q, x in examples
        ]
        direction = torch.randn(questions + 1, layers, width, generator=generator)
        states = torch.randn(len(examples), layers, width, generator=generator) + direction[[q for q, _ in examples]]
        states = states.bfloat16()
        folder.write_shard(f"en-x/en/p{p}", {"prompt_end": states, "question_mean": states.clone()}, {"examples": []})
    correct = np.random.default_rng(0).random(len(rows)) < 0.3
    return StoredStates(folder, pd.DataFrame(rows).assign(first_token_correct=correct), layers, width)


def resident() -> int:
    """Bytes of memory of this process and its workers, without memory that files back (RssAnon)."""
    own, total = str(os.getpid()), 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            command = (status.parent / "cmdline").read_text()
        except OSError:
            continue
        if status.parent.name == own or (fields["PPid"].strip() == own and "loky" in command):
            total += int(fields.get("RssAnon", "0 kB").split()[0]) * 1024
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paragraphs", type=int, default=240)
    parser.add_argument(
        "--questions", type=int, default=4, help="questions per paragraph; every second paragraph has one more"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stored = write_states(
            Path(folder) / "run", arguments.paragraphs, arguments.questions, arguments.layers, arguments.width
        )
        before, peak, finished = resident(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not finished.wait(0.1):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        encoding_signals(stored)
        encoded = time.perf_counter()
        train(stored, DEFAULT_PROBES, ProbeSettings(jobs=arguments.jobs))
        trained = time.perf_counter()
        finished.set()
        watcher.join()
        result = {
            "examples": len(stored.frame),
            "layers": arguments.layers,
            "width": arguments.width,
            "encoding_seconds": round(encoded - started, 1),
            "probes_seconds": round(trained - encoded, 1),
            "peak_gb_above_start": round((peak - before) / 1e9, 2),
            "all_states_gb": round(2 * 4 * len(stored.frame) * arguments.layers * arguments.width / 1e9, 2),
            "layer_bytes": LAYER_BYTES,
            "environment": environment(),
        }
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
