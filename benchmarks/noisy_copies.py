"""Writes copies of a model with noise on its weights: models that are known to be worse, to compare with it.

    python benchmarks/noisy_copies.py OUT --noise 0.05,0.1,0.2

Every weight matrix of the blocks gets normal noise with this share of its own standard deviation. Embeddings, head and
norms stay as they are. OUT/noise-0.05 and so on are folders that xprobe and transformers load.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from xprobe.config import Execution
from xprobe.models import loading
from xprobe.models.anatomy import inspect
from xprobe.models.sources import resolve


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--noise", default="0.05,0.1,0.2", show_default=True, help="Shares, comma-separated.")
@click.option("--dtype", default="bfloat16", show_default=True)
def main(out: Path, model: str, noise: str, dtype: str) -> None:
    """Writes one folder for each level of noise."""
    loaded = loading.load(resolve(model), Execution(device="cpu"), dtype="float32")
    parameters = [one for block in inspect(loaded.model).blocks for one in block.parameters() if one.ndim == 2]
    before = [one.detach().clone() for one in parameters]
    for level in map(float, noise.split(",")):
        generator = torch.Generator().manual_seed(0)  # the same directions at every level
        with torch.no_grad():
            for parameter, own in zip(parameters, before, strict=True):
                drawn = torch.randn(own.shape, generator=generator)
                parameter.copy_(own + level * own.std() * drawn)
        folder = out / f"noise-{level:g}"
        loaded.model.to(getattr(torch, dtype)).save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        loaded.model.to(torch.float32)
        click.echo(str(folder))


if __name__ == "__main__":
    main()
