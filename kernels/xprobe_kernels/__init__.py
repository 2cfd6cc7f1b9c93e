"""The logit lens of many rows and the capture of hidden rows. Functions take and return tensors.

The package depends on torch, and on Triton for the GPU kernels. It contains no code for models, datasets or files.

>>> import torch
>>> from xprobe_kernels import Unembedding, lens
>>> head = Unembedding(torch.eye(3), norm="none")
>>> lens(torch.tensor([[1.0, 2.0, 3.0]]), head, torch.tensor([1])).rank.tolist()
[[2]]
"""

from xprobe_kernels.capture import capture
from xprobe_kernels.readout import Readout, available_backends, lens
from xprobe_kernels.tokens import TokenStatistics, token_statistics
from xprobe_kernels.unembedding import Unembedding

__all__ = [
    "Readout",
    "TokenStatistics",
    "Unembedding",
    "available_backends",
    "capture",
    "lens",
    "token_statistics",
]
