"""Compares two lens backends on rows of one's own shape: python examples/benchmark_kernels.py [VOCABULARY]"""

import sys

import torch
from torch.utils.benchmark import Timer
from xprobe_kernels import Unembedding, available_backends, lens

vocabulary = int(sys.argv[1]) if len(sys.argv) > 1 else 49152
device = "cuda" if torch.cuda.is_available() else "cpu"
hidden = torch.randn(256, 576, device=device)  # 256 rows, layers and positions together
head = Unembedding(torch.randn(vocabulary, 576, device=device), norm="rms", gamma=torch.ones(576, device=device))
lookup = torch.zeros(256, dtype=torch.int64, device=device)
for backend in [available_backends(device)[0], "reference"]:  # the one that "auto" takes, and the fp64 definition
    names = {"lens": lens, "hidden": hidden, "head": head, "lookup": lookup, "backend": backend}
    seconds = Timer("lens(hidden, head, lookup, backend=backend)", globals=names).timeit(3).median
    print(f"{backend:<10} {256 / seconds:>10.0f} rows per second")
