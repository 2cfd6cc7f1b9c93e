"""Draws the pictures of docs/figures.md from a run with all stages: python docs/make_figures.py runs/figures"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

import xprobe

PICTURES = Path(__file__).resolve().parent / "images" / "figures"
COLOURS = 128  # of a picture: a palette keeps the files small


def main(run: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for path in xprobe.load_study(run).plot.save(folder, "png", dpi=150):
            with Image.open(path) as image:
                small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            small.save(PICTURES / path.name, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
