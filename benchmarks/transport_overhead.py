"""What a transport adds to the lens: both on the same rows, in turns, in one process.

python benchmarks/transport_overhead.py
python benchmarks/transport_overhead.py --device cuda --layers 33 --positions 512 --width 4096 --vocabulary 128256
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from xprobe_kernels import Unembedding

from xprobe.lenses.reading import read_answers
from xprobe.lenses.transport import from_maps
from xprobe.runs.provenance import environment


@click.command()
@click.option("--layers", default=31, show_default=True)
@click.option("--positions", default=64, show_default=True)
@click.option("--width", default=576, show_default=True)
@click.option("--vocabulary", default=49152, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="A GPU computes in bfloat16, a CPU in float32.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File to write.")
def main(layers: int, positions: int, width: int, vocabulary: int, device: str, rounds: int, out: Path | None) -> None:
    """Times the lens with and without a transport."""
    generator = torch.Generator(device).manual_seed(0)
    on_gpu = torch.device(device).type == "cuda"

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator, device=device)
        return drawn.bfloat16() if on_gpu else drawn

    rows = draw(layers, positions, width)
    head = Unembedding(draw(vocabulary, width) / width**0.5, norm="rms", eps=1e-5)
    targets = torch.randint(vocabulary, (positions,), generator=generator, device=device)
    maps = {layer: draw(width, width) / width**0.5 for layer in range(1, layers - 1)}
    transport = from_maps("jacobian", maps)
    work: dict[str, Callable[[], object]] = {
        "logit": lambda: read_answers(rows, targets, head),
        "transport": lambda: read_answers(rows, targets, head, transport=transport),
        "product alone": lambda: transport.apply(rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    ratio = statistics.median(b / a for a, b in zip(seconds["logit"], seconds["transport"], strict=True))
    result = {
        "rows": layers * positions, "width": width, "vocabulary": vocabulary, "rounds": rounds,
        "milliseconds": {name: round(1000 * value, 2) for name, value in medians.items()},
        "ratio": round(ratio, 4), "environment": environment(),
    }  # fmt: skip
    click.echo(json.dumps({key: value for key, value in result.items() if key != "environment"}))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
